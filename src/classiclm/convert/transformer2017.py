"""The Transformer of 2017 <-> `MarianMTModel`, post-LN with ReLU and one matrix for all embeddings.

Marian keeps the sines of the positions in the first half of the dimensions and the cosines in the second, where the
paper alternates them. A network does not mind a permutation of its residual stream, if every tensor that reads from it
or writes into it follows: `to_hf` moves all even dimensions before the odd ones, `from_hf` moves them back.

Marian's layer norms add 1e-5 to the variance whatever config.json says: an import has that as its ln_eps, and a model
trained with the paper's 1e-6 comes out minutely different.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from classiclm.convert.names import WEIGHT, Row, Size, Sizes, Tensors, shapes_of, without_default_d_ff
from classiclm.errors import BAD_INPUT, Error
from classiclm.models.transformer2017 import Config, build

MODEL_TYPE = "marian"
ARCHITECTURE = "MarianMTModel"
LN_EPS = 1e-5

SIZES = Sizes(
    MODEL_TYPE,
    ARCHITECTURE,
    rows=(
        Size("n_layers", ("encoder_layers", "decoder_layers"), 12),
        Size("d_model", ("d_model",), 1024),
        Size("n_heads", ("encoder_attention_heads", "decoder_attention_heads"), 16),
        Size("d_ff", ("encoder_ffn_dim", "decoder_ffn_dim"), 4096),
        Size("n_ctx", ("max_position_embeddings",), 1024),
        Size("vocab_size", ("vocab_size", "decoder_vocab_size"), 58101),
        Size("dropout", ("dropout",), 0.1),
    ),
    fixed={
        "activation_function": ("relu", "gelu"),
        "scale_embedding": (True, False),
        "normalize_before": (False, False),
        "normalize_embedding": (False, False),
        "add_final_layer_norm": (False, False),
        "static_position_embeddings": (True, True),
        "share_encoder_decoder_embeddings": (True, True),
        "tie_word_embeddings": (True, True),
    },
    training=dict.fromkeys(
        ("attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop"), (0.0, 0.0)
    ),
)

TENSORS = Tensors(
    prefix="model.",
    rows=(
        Row("tok_emb", "model.shared", parts=WEIGHT),
        Row("encoder.{i}.attn.q", "model.encoder.layers.{i}.self_attn.q_proj"),
        Row("encoder.{i}.attn.k", "model.encoder.layers.{i}.self_attn.k_proj"),
        Row("encoder.{i}.attn.v", "model.encoder.layers.{i}.self_attn.v_proj"),
        Row("encoder.{i}.attn.o", "model.encoder.layers.{i}.self_attn.out_proj"),
        Row("encoder.{i}.ln1", "model.encoder.layers.{i}.self_attn_layer_norm"),
        Row("encoder.{i}.mlp.up", "model.encoder.layers.{i}.fc1"),
        Row("encoder.{i}.mlp.down", "model.encoder.layers.{i}.fc2"),
        Row("encoder.{i}.ln2", "model.encoder.layers.{i}.final_layer_norm"),
        Row("decoder.{i}.attn.q", "model.decoder.layers.{i}.self_attn.q_proj"),
        Row("decoder.{i}.attn.k", "model.decoder.layers.{i}.self_attn.k_proj"),
        Row("decoder.{i}.attn.v", "model.decoder.layers.{i}.self_attn.v_proj"),
        Row("decoder.{i}.attn.o", "model.decoder.layers.{i}.self_attn.out_proj"),
        Row("decoder.{i}.ln1", "model.decoder.layers.{i}.self_attn_layer_norm"),
        Row("decoder.{i}.cross.q", "model.decoder.layers.{i}.encoder_attn.q_proj"),
        Row("decoder.{i}.cross.k", "model.decoder.layers.{i}.encoder_attn.k_proj"),
        Row("decoder.{i}.cross.v", "model.decoder.layers.{i}.encoder_attn.v_proj"),
        Row("decoder.{i}.cross.o", "model.decoder.layers.{i}.encoder_attn.out_proj"),
        Row("decoder.{i}.ln2", "model.decoder.layers.{i}.encoder_attn_layer_norm"),
        Row("decoder.{i}.mlp.up", "model.decoder.layers.{i}.fc1"),
        Row("decoder.{i}.mlp.down", "model.decoder.layers.{i}.fc2"),
        Row("decoder.{i}.ln3", "model.decoder.layers.{i}.final_layer_norm"),
    ),
    tied=dict.fromkeys(
        ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), "shared.weight"
    ),
    buffers=("final_logits_bias", "encoder.embed_positions.weight", "decoder.embed_positions.weight"),
)

READS = ("q", "k", "v", "up")  # modules whose inputs lie in the residual stream; the others' outputs do


def hf_config(config: Config) -> dict[str, Any]:
    """config.json. decoder_start_token_id, which has no null, is left to who knows the tokenizer.

    Raises Error (exit 2) for learned positions, heads or values of a width of their own, and a large ln_eps.
    """
    if config.positions != "sinusoids":
        raise Error("model.positions", "is learned; the format has sinusoids only", "use --model.positions sinusoids")
    if config.d_value not in (None, config.d_head, config.d_model / config.n_heads):
        why = f"is {config.d_value}; the format has values as wide as keys only"
        raise Error("model.d_value", why, "train with --model.d_value null")
    if config.ln_eps > LN_EPS:
        raise Error("model.ln_eps", f"is {config.ln_eps}; the format has {LN_EPS}", f"use --model.ln_eps {LN_EPS}")
    widened = dataclasses.replace(config, d_ff=config.d_ff or 4 * config.d_model)
    return {**SIZES.write(widened), "is_encoder_decoder": True, "forced_eos_token_id": None}


def our_config(hf: Mapping[str, Any]) -> Config:
    """The Config of a config.json. Raises Error (exit 3) naming a key that the model of 2017 cannot follow."""
    if hf.get("decoder_vocab_size") is None:  # to them: the same as the source's
        hf = {**hf, "decoder_vocab_size": hf.get("vocab_size", 58101)}
    return dataclasses.replace(without_default_d_ff(SIZES.read(hf, Config)), ln_eps=LN_EPS)


def to_hf(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict -> the tensors of model.safetensors, sines first."""
    order = torch.cat([torch.arange(0, config.d_model, 2), torch.arange(1, config.d_model, 2)])
    tensors = TENSORS.write(config.n_layers, _permuted(weights, order))
    return {**tensors, "final_logits_bias": weights["tok_emb.weight"].new_zeros(1, config.vocab_size)}


def from_hf(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of model.safetensors -> our state_dict, sines and cosines in turn.

    Raises Error (exit 3) naming a tensor that does not fit, and for a final_logits_bias, which ours lacks.
    """
    bias = tensors.get("final_logits_bias")
    if bias is not None and bias.any():
        fix = "give a model whose last layer has no bias"
        raise Error("final_logits_bias", "is not 0, and this model has no such bias", fix, BAD_INPUT)
    half = (config.d_model + 1) // 2  # sines; of an odd width they are one more than the cosines
    order = torch.tensor([half * (i % 2) + i // 2 for i in range(config.d_model)])
    return _permuted(TENSORS.read(config.n_layers, shapes_of(build, config), tensors), order)


def _permuted(weights: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
    """All tensors with the dimensions of the residual stream in another order, (D,) numbers of dimensions."""
    return {name: _along_stream(name, weight, order) for name, weight in weights.items()}


def _along_stream(name: str, weight: Tensor, order: Tensor) -> Tensor:
    module, part = name.split(".")[-2:]
    if module in READS and part == "bias":
        return weight
    axis = 1 if module in READS or module == "tok_emb" else 0
    return weight.index_select(axis, order.to(weight.device))
