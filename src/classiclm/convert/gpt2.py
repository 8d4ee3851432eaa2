"""GPT-2 <-> `GPT2LMHeadModel`: its files keep q, k and v in one matrix, and every matrix as [in, out]."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from classiclm.convert.names import WEIGHT, Row, Size, Sizes, Tensors, shapes_of
from classiclm.errors import BAD_INPUT, Error
from classiclm.models.gpt2 import Config, build

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"

SIZES = Sizes(
    MODEL_TYPE,
    ARCHITECTURE,
    rows=(
        Size("n_layers", ("n_layer",), 12),
        Size("d_model", ("n_embd",), 768),
        Size("n_heads", ("n_head",), 12),
        Size("d_ff", ("n_inner",), None),
        Size("n_ctx", ("n_positions",), 1024),
        Size("vocab_size", ("vocab_size",), 50257),
        Size("dropout", ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
    ),
    fixed={
        "activation_function": ("gelu_new", "gelu_new"),  # the tanh form
        "layer_norm_epsilon": (1e-5, 1e-5),
        "scale_attn_weights": (True, True),
        "scale_attn_by_inverse_layer_idx": (False, False),
        "add_cross_attention": (False, False),
        "tie_word_embeddings": (True, True),
    },
    synonyms={"activation_function": ("gelu_pytorch_tanh",)},
)

TENSORS = Tensors(
    prefix="transformer.",
    rows=(
        Row("tok_emb", "transformer.wte", parts=WEIGHT),
        Row("pos_emb", "transformer.wpe", parts=WEIGHT),
        Row("blocks.{i}.ln1", "transformer.h.{i}.ln_1"),
        Row("blocks.{i}.attn.{slot}", "transformer.h.{i}.attn.c_attn", conv1d=True, joined=("q", "k", "v")),
        Row("blocks.{i}.attn.o", "transformer.h.{i}.attn.c_proj", conv1d=True),
        Row("blocks.{i}.ln2", "transformer.h.{i}.ln_2"),
        Row("blocks.{i}.mlp.up", "transformer.h.{i}.mlp.c_fc", conv1d=True),
        Row("blocks.{i}.mlp.down", "transformer.h.{i}.mlp.c_proj", conv1d=True),
        Row("ln_f", "transformer.ln_f"),
    ),
    tied={"lm_head.weight": "wte.weight"},
    buffers=("h.*.attn.bias", "h.*.attn.masked_bias"),
)


def hf_config(config: Config) -> dict[str, Any]:
    """config.json. Raises Error (exit 2) for heads of a width of their own."""
    return SIZES.write(config)


def our_config(hf: Mapping[str, Any]) -> Config:
    """The Config of a config.json. Raises Error (exit 3) naming a key that GPT-2 cannot follow."""
    return SIZES.read(hf, Config)


def to_hf(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict -> the tensors of model.safetensors. The format always has biases: a model without gets zeros."""
    absent = {} if config.bias else _biases(config)
    zeros = {name: weights["tok_emb.weight"].new_zeros(shape.shape) for name, shape in absent.items()}
    return TENSORS.write(config.n_layers, {**weights, **zeros})


def from_hf(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of model.safetensors -> our state_dict.

    Raises Error (exit 3) naming a tensor that does not fit, and for a bias that is not 0 if the config has none.
    """
    full = dataclasses.replace(config, bias=True)
    weights = TENSORS.read(config.n_layers, shapes_of(build, full), tensors)
    if config.bias:
        return weights
    absent = _biases(config)
    for name in absent:
        if weights[name].any():
            raise Error(name, "is not 0, and the config has no biases", "set model.bias to true", BAD_INPUT)
    return {name: weight for name, weight in weights.items() if name not in absent}


def _biases(config: Config) -> dict[str, Tensor]:
    """Name -> tensor of the right shape, of what bias=True would add."""
    full = shapes_of(build, dataclasses.replace(config, bias=True))
    return {name: shape for name, shape in full.items() if name.endswith(".bias")}
