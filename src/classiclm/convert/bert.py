"""BERT <-> `BertForPreTraining`, both heads included."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from classiclm.convert.names import BIAS, WEIGHT, Row, Size, Sizes, Tensors, shapes_of, without_default_d_ff
from classiclm.models.bert import LN_EPS, Config, build

MODEL_TYPE = "bert"
ARCHITECTURE = "BertForPreTraining"

SIZES = Sizes(
    MODEL_TYPE,
    ARCHITECTURE,
    rows=(
        Size("n_layers", ("num_hidden_layers",), 12),
        Size("d_model", ("hidden_size",), 768),
        Size("n_heads", ("num_attention_heads",), 12),
        Size("d_ff", ("intermediate_size",), 3072),
        Size("n_ctx", ("max_position_embeddings",), 512),
        Size("n_segments", ("type_vocab_size",), 2),
        Size("vocab_size", ("vocab_size",), 30522),
        Size("dropout", ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.1),
    ),
    fixed={
        "hidden_act": ("gelu", "gelu"),  # the exact form, with erf
        "layer_norm_eps": (LN_EPS, 1e-12),
        "position_embedding_type": ("absolute", "absolute"),
        "is_decoder": (False, False),
        "add_cross_attention": (False, False),
        "tie_word_embeddings": (True, True),
    },
)

TENSORS = Tensors(
    prefix="bert.",
    rows=(
        Row("tok_emb", "bert.embeddings.word_embeddings", parts=WEIGHT),
        Row("pos_emb", "bert.embeddings.position_embeddings", parts=WEIGHT),
        Row("seg_emb", "bert.embeddings.token_type_embeddings", parts=WEIGHT),
        Row("ln_emb", "bert.embeddings.LayerNorm"),
        Row("blocks.{i}.attn.q", "bert.encoder.layer.{i}.attention.self.query"),
        Row("blocks.{i}.attn.k", "bert.encoder.layer.{i}.attention.self.key"),
        Row("blocks.{i}.attn.v", "bert.encoder.layer.{i}.attention.self.value"),
        Row("blocks.{i}.attn.o", "bert.encoder.layer.{i}.attention.output.dense"),
        Row("blocks.{i}.ln1", "bert.encoder.layer.{i}.attention.output.LayerNorm"),
        Row("blocks.{i}.mlp.up", "bert.encoder.layer.{i}.intermediate.dense"),
        Row("blocks.{i}.mlp.down", "bert.encoder.layer.{i}.output.dense"),
        Row("blocks.{i}.ln2", "bert.encoder.layer.{i}.output.LayerNorm"),
        Row("pooler", "bert.pooler.dense"),
        Row("mlm.dense", "cls.predictions.transform.dense"),
        Row("mlm.ln", "cls.predictions.transform.LayerNorm"),
        Row("mlm", "cls.predictions", parts=BIAS),
        Row("nsp", "cls.seq_relationship"),
    ),
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    buffers=("embeddings.position_ids", "embeddings.token_type_ids"),
)

TENSORFLOW = {".gamma": ".weight", ".beta": ".bias"}  # names of a norm's parts in the first published files


def hf_config(config: Config) -> dict[str, Any]:
    """config.json. Raises Error (exit 2) for heads of a width of their own."""
    return SIZES.write(dataclasses.replace(config, d_ff=config.d_ff or 4 * config.d_model))


def our_config(hf: Mapping[str, Any]) -> Config:
    """The Config of a config.json. Raises Error (exit 3) naming a key that BERT cannot follow."""
    return without_default_d_ff(SIZES.read(hf, Config))


def to_hf(config: Config, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state_dict -> the tensors of model.safetensors."""
    return TENSORS.write(config.n_layers, weights)


def from_hf(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of model.safetensors -> our state_dict. Raises Error (exit 3) naming a tensor that does not fit."""
    renamed = {_modern(name): tensor for name, tensor in tensors.items()}
    return TENSORS.read(config.n_layers, shapes_of(build, config), renamed)


def _modern(name: str) -> str:
    for old, new in TENSORFLOW.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
