"""GPT-2 and dense GPT-3 as one GGUF file, the format of llama.cpp: sizes, tokenizer and weights in fp32.

Names of tensors and keys are the gguf library's own for its architecture "gpt2". The tokenizer has to be a byte-level
BPE with an end-of-text token: the format knows merges, and takes token 11 for the end of a text if it is not told.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from classiclm.convert import gpt2, gpt3
from classiclm.convert.check import Difference
from classiclm.data.tokenizers import ByteBPE, Tokenizer
from classiclm.errors import Error
from classiclm.extras import need

PACKAGE = "gguf"
FILE = "model.gguf"
FAMILIES = ("gpt2", "gpt3")
LN_EPS = 1e-5
_TABLES = {"gpt2": gpt2, "gpt3": gpt3}


def contents(family: str, config: Any, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> dict[str, bytes]:
    """{"model.gguf": bytes}. Raises Error: exit 2 for what the format cannot express, 4 without the gguf library."""
    library = need(PACKAGE, "export")
    _TABLES[family].hf_config(config)  # for its errors
    vocabulary = _vocabulary(tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FILE
        writer = library.GGUFWriter(path, "gpt2")
        _add_sizes(writer, library, config)
        _add_tokenizer(writer, library, vocabulary, tokenizer.end_of_text)
        for name, tensor in tensors(config, weights).items():
            writer.add_tensor(name, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {FILE: path.read_bytes()}


def tensors(config: Any, weights: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Name in the file -> fp32 array; matrices as [out, in]."""
    library = need(PACKAGE, "export")
    names = library.get_tensor_name_map(library.MODEL_ARCH.GPT2, config.n_layers)
    arrays = {}
    for name, tensor in gpt2.to_hf(config, weights).items():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        is_conv1d = ".h." in name and tensor.ndim == 2
        arrays[theirs] = np.ascontiguousarray((tensor.T if is_conv1d else tensor).float().cpu().numpy())
    return arrays


def compare(folder: Path, config: Any, weights: Mapping[str, Tensor]) -> list[Difference]:
    """Read a written file back with the library's own reader: no tensor may differ at all."""
    reader = need(PACKAGE, "export").GGUFReader(folder / FILE)
    written = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = tensors(config, weights)
    absent = float(len(expected.keys() ^ written.keys()))
    largest = max(float(np.abs(written[name] - expected[name]).max()) for name in expected.keys() & written.keys())
    return [Difference("tensors missing or too many", absent, 0.0), Difference("largest of all weights", largest, 0.0)]


def _add_sizes(writer: Any, library: Any, config: Any) -> None:
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff or 4 * config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_head_count(config.n_heads)
    writer.add_layer_norm_eps(LN_EPS)
    writer.add_file_type(library.LlamaFileType.ALL_F32)


def _add_tokenizer(writer: Any, library: Any, vocabulary: tuple[list[str], list[str]], end: int | None) -> None:
    tokens, merges = vocabulary
    types = [library.TokenType.CONTROL if i == end else library.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")  # the pattern that cuts a text into words
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(end)
    writer.add_add_bos_token(False)


def _vocabulary(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """Tokens by id, and merges in order. Raises Error (exit 2) for a tokenizer that the format cannot express."""
    if not isinstance(tokenizer, ByteBPE) or tokenizer.end_of_text is None:
        why = "is no byte-level BPE with an end-of-text token, and GGUF has no place for another"
        raise Error("the run's tokenizer", why, "train with --tokenizer bpe-512, or export with --to hf")
    tree = json.loads(tokenizer.to_json())
    ids = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    merges = tree["model"]["merges"]
    if not merges:
        raise Error("the run's tokenizer", "has no merges, and GGUF needs some", "train with --tokenizer bpe-512")
    return sorted(ids, key=ids.__getitem__), [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
