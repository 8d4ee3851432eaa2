"""GPT-1 <-> `OpenAIGPTLMHeadModel`: its files keep q, k and v in one matrix, and every matrix as [in, out]."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from classiclm.convert.names import WEIGHT, Row, Size, Sizes, Tensors, shapes_of
from classiclm.errors import Error
from classiclm.models.gpt1 import Config, build

MODEL_TYPE = "openai-gpt"
ARCHITECTURE = "OpenAIGPTLMHeadModel"

SIZES = Sizes(
    MODEL_TYPE,
    ARCHITECTURE,
    rows=(
        Size("n_layers", ("n_layer",), 12),
        Size("d_model", ("n_embd",), 768),
        Size("n_heads", ("n_head",), 12),
        Size("n_ctx", ("n_positions",), 512),
        Size("vocab_size", ("vocab_size",), 40478),
        Size("dropout", ("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1),
    ),
    fixed={
        "afn": ("gelu", "gelu"),  # in this one class the name means the tanh form
        "layer_norm_epsilon": (1e-5, 1e-5),
        "tie_word_embeddings": (True, True),
    },
)

TENSORS = Tensors(
    prefix="transformer.",
    rows=(
        Row("tok_emb", "transformer.tokens_embed", parts=WEIGHT),
        Row("pos_emb", "transformer.positions_embed", parts=WEIGHT),
        Row("blocks.{i}.attn.{slot}", "transformer.h.{i}.attn.c_attn", conv1d=True, joined=("q", "k", "v")),
        Row("blocks.{i}.attn.o", "transformer.h.{i}.attn.c_proj", conv1d=True),
        Row("blocks.{i}.ln1", "transformer.h.{i}.ln_1"),
        Row("blocks.{i}.mlp.up", "transformer.h.{i}.mlp.c_fc", conv1d=True),
        Row("blocks.{i}.mlp.down", "transformer.h.{i}.mlp.c_proj", conv1d=True),
        Row("blocks.{i}.ln2", "transformer.h.{i}.ln_2"),
    ),
    tied={"lm_head.weight": "tokens_embed.weight"},
    buffers=("h.*.attn.bias", "position_ids"),
)


def hf_config(config: Config) -> dict[str, Any]:
    """config.json. Raises Error (exit 2) for heads or an MLP of a width of their own."""
    if config.d_ff not in (None, 4 * config.d_model):
        why = f"is {config.d_ff}; the format has MLPs of 4 d_model only"
        raise Error("model.d_ff", why, "train with --model.d_ff null")
    return SIZES.write(config)


def our_config(hf: Mapping[str, Any]) -> Config:
    """The Config of a config.json. Raises Error (exit 3) naming a key that GPT-1 cannot follow."""
    return SIZES.read(hf, Config)


def to_hf(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict -> the tensors of model.safetensors."""
    return TENSORS.write(config.n_layers, weights)


def from_hf(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of model.safetensors -> our state_dict. Raises Error (exit 3) naming a tensor that does not fit."""
    return TENSORS.read(config.n_layers, shapes_of(build, config), tensors)
