"""A dataset in the forms of other trainers: nanoGPT's two files, and the shards of llm.c and modded-nanogpt.

nanoGPT (data/*/prepare.py): train.bin and val.bin, the ids as uint16 and nothing else. llm.c (dev/data/data_common.py):
a header of 256 int32, of which the first three are 20240520, the version 1 and the number of tokens, then the ids as
uint16; llm.c and modded-nanogpt find the files by a pattern such as "train_*.bin".
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from classiclm.data.dataset import Dataset, ShardSplit
from classiclm.data.dataset_meta import SPLITS
from classiclm.data.shards import Tokens
from classiclm.errors import BAD_INPUT, RESOURCE, Error
from classiclm.files import make_folder, write_stream

_PIECE = 2**22  # tokens that are in memory at once
_LARGEST_VOCABULARY = 2**16  # of uint16, the ids from 0 to 65,535
_LLMC_MAGIC, _LLMC_VERSION, _LLMC_HEADER = 20240520, 1, 256
_LLMC_LARGEST = 2**31 - 1  # tokens of a file: their number stands in an int32


def export_nanogpt(dataset: Dataset, out: Path) -> list[Path]:
    """Write out/train.bin and out/val.bin, each whole or not at all; returns them.

    Raises Error: exit 2 for a vocabulary that uint16 cannot hold, 3 for a split without tokens, 4 if it cannot write.
    """
    splits = _splits(dataset, "nanoGPT")
    make_folder(out)
    for name, split in splits.items():
        write_stream(out / f"{name}.bin", _pieces(split.tokens))
    return [out / f"{name}.bin" for name in splits]


def export_llmc(dataset: Dataset, out: Path) -> list[Path]:
    """Write out/train_000000.bin, ..., out/val_000000.bin, ..., one for each shard; returns them.

    Raises Error: exit 2 for a vocabulary that uint16 cannot hold, 3 for a split without tokens, 4 for a shard with
    more tokens than the header can count, or if it cannot write.
    """
    files = {
        out / f"{name}_{i:06d}.bin": Tokens([path], split.tokens.dtype)
        for name, split in _splits(dataset, "llm.c").items()
        for i, path in enumerate(split.tokens.paths)
    }
    largest = max(map(len, files.values()))
    if largest > _LLMC_LARGEST:
        why = f"has a shard of {largest:,} tokens, and a file of llm.c has at most {_LLMC_LARGEST:,}"
        raise Error(dataset.path, why, "prepare it with smaller shards", RESOURCE)
    make_folder(out)
    for path, tokens in files.items():
        write_stream(path, _llmc(tokens))
    return list(files)


def _splits(dataset: Dataset, whose: str) -> dict[str, ShardSplit]:
    """Both splits, found to be such that this trainer can read them."""
    size = dataset.meta.tokenizer.vocab_size
    if size > _LARGEST_VOCABULARY:
        why = f"has a vocabulary of {size:,} tokens, and {whose} stores each in 16 bits, which end at 65,535"
        raise Error(dataset.path, why, "prepare it with a smaller vocabulary, such as --tokenizer gpt2")
    splits = {name: dataset.split(name) for name in SPLITS}
    for name, split in splits.items():
        if not len(split.tokens):
            why = f"has no {name} tokens, and {whose} needs both splits"
            raise Error(dataset.path, why, "prepare it from more documents", BAD_INPUT)
    return splits


def _llmc(tokens: Tokens) -> Iterator[bytes]:
    header = np.zeros(_LLMC_HEADER, "<i4")
    header[:3] = _LLMC_MAGIC, _LLMC_VERSION, len(tokens)
    yield header.tobytes()
    yield from _pieces(tokens)


def _pieces(tokens: Tokens) -> Iterator[bytes]:
    """The ids as little-endian uint16, part by part; read, not mapped, so that they do not fill this process."""
    for path in tokens.paths:
        with path.open("rb") as file:
            while piece := file.read(_PIECE * tokens.dtype.itemsize):
                yield np.frombuffer(piece, tokens.dtype).astype("<u2", copy=False).tobytes()
