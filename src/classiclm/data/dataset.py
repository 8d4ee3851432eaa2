"""A prepared dataset: a folder of token shards, their tokenizer, and meta.json, which says what each file has to be.

    train-00000.bin, train-00000.idx, ..., val-00000.bin, ...    see shards.py; ordered by split, then by source
    tokenizer.json
    meta.json                                                    see dataset_meta.py; written last

Nothing is handed out before every file was found to be what meta.json says. No time, host or path of a machine is in
meta.json, so equal input gives equal bytes.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from classiclm.data.dataset_meta import (
    FIX,
    FORMAT,
    META,
    SPLITS,
    Meta,
    Shard,
    contradictions,
    load_meta,
    read_meta,
    write_meta,
)
from classiclm.data.shards import Tokens, file_size, index_bytes, read_index
from classiclm.data.tokenizer import Tokenizer
from classiclm.data.tokenizers import from_json
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import sha256_of_file

__all__ = ["Dataset", "Meta", "ShardSplit", "defects", "is_dataset", "load_meta", "open_dataset", "write_meta"]

TOKENIZER = "tokenizer.json"
_PIECE = 2**22  # bytes that are read at once
_THREADS = min(8, os.cpu_count() or 1)  # sha256 and NumPy work outside of Python's lock
_SHARD = re.compile(r"(train|val)-\d{5,9}\.(bin|idx)")


@dataclass(frozen=True)
class ShardSplit:
    """One split on disk: its tokens as one stream, where things end in it, and how much text they stand for."""

    tokens: Tokens  # (N,)
    sequence_ends: np.ndarray  # (S,) int64: sequence i is tokens[sequence_ends[i - 1] : sequence_ends[i]]
    document_ends: np.ndarray  # (D,) int64, likewise
    sources: list[tuple[str, int, int]]  # name, first token, end: neighbouring parts of the stream
    n_bytes: int
    n_chars: int
    fingerprint: str  # of the tokens, their borders and the tokenizer


@dataclass(frozen=True)
class Dataset:
    """A checked dataset folder."""

    path: Path
    meta: Meta
    tokenizer: Tokenizer

    def split(self, name: str) -> ShardSplit:
        """The split train or val. Raises Error: exit 2 for another name, 3 if an index has changed since the check."""
        if name not in SPLITS:
            raise Error(name, "is no split", f"choose from {', '.join(SPLITS)}")
        shards, counts = self.meta.shards_of(name), getattr(self.meta.splits, name)
        sequence_ends: list[np.ndarray] = [np.zeros(0, np.int64)]
        document_ends: list[np.ndarray] = [np.zeros(0, np.int64)]
        sources: list[tuple[str, int, int]] = []
        place = 0
        for shard in shards:
            index = read_index(self.path / shard.index)
            sequence_ends.append(index.sequence_ends + place)
            document_ends.append(index.document_ends + place)
            first = sources.pop()[1] if sources and sources[-1][0] == shard.source else place
            place += shard.tokens
            sources.append((shard.source, first, place))
        tokens = Tokens([self.path / shard.file for shard in shards], np.dtype(self.meta.dtype).newbyteorder("<"))
        ends = np.concatenate(sequence_ends), np.concatenate(document_ends)
        return ShardSplit(tokens, *ends, sources, counts.bytes, counts.chars, self._fingerprint(shards))

    def _fingerprint(self, shards: list[Shard]) -> str:
        named = [self.meta.tokenizer.sha256, *(part for shard in shards for part in (shard.sha256, shard.index_sha256))]
        return hashlib.sha256(" ".join(named).encode()).hexdigest()


def is_dataset(path: Path) -> bool:
    """Whether a path is meant as a dataset: a folder with such a meta.json, or with what a dataset begins with."""
    if not path.is_dir():
        return False
    try:
        return bool(json.loads((path / META).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return (path / ".pieces").is_dir() or any(path.glob("train-*.idx")) or any(path.glob("train-*.bin"))


def open_dataset(path: Path | str, verify: Literal["sha256", "size"] = "sha256") -> Dataset:
    """The dataset in a folder, once all its files are found to be as meta.json says.

    verify: "sha256" reads every byte; "size" trusts the content of the .bin files. Raises Error (exit 3).
    """
    folder = Path(path)
    _check_folder(folder)
    meta = load_meta(folder)
    found = _file_defects(folder, meta, verify)
    if found:
        what, _, why = found[0].partition(": ")
        more = f" (and {len(found) - 1} more defects: classiclm fsck lists them)" if len(found) > 1 else ""
        raise Error(what, why + more, FIX, BAD_INPUT)
    return Dataset(folder, meta, _load_tokenizer(folder))


def _check_folder(folder: Path) -> None:
    """Raises Error (exit 3) for what is no finished dataset at all."""
    if not folder.is_dir():
        raise Error(folder, "is not a folder", "name the folder that classiclm prepare wrote", BAD_INPUT)
    if not os.path.lexists(folder / META):
        why = "is missing: this is no dataset, or one whose preparation was not finished"
        raise Error(folder / META, why, "run classiclm prepare with this --out, again if need be", BAD_INPUT)


def defects(path: Path | str) -> list[str]:
    """All that is wrong with a dataset, a line each with the file's path; none if it is sound."""
    folder = Path(path)
    try:
        _check_folder(folder)
        meta = read_meta(folder)
    except Error as e:
        return [_line(e)]
    return [*(f"{folder / META}: {why}" for why in contradictions(meta)), *_file_defects(folder, meta, "sha256")]


def _line(e: Exception) -> str:
    return " ".join(str(e).partition(". Fix: ")[0].split())


def _file_defects(folder: Path, meta: Meta, verify: str) -> list[str]:
    found = [*_tokenizer_defects(folder, meta), *_strays(folder, meta)]
    with ThreadPoolExecutor(_THREADS) as pool:
        for lines in pool.map(lambda shard: _shard_defects(folder, meta, shard, verify), meta.shards):
            found += lines
    return found


def _load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    try:
        return from_json(path.read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as e:
        raise Error(path, "cannot be read as text", FIX, BAD_INPUT) from e


def _tokenizer_defects(folder: Path, meta: Meta) -> list[str]:
    path, stated = folder / TOKENIZER, meta.tokenizer
    try:
        file_size(path)
        if sha256_of_file(path) != stated.sha256:
            return [f"{path}: its sha256 is not the one in {META}"]
        tokenizer = _load_tokenizer(folder)
    except (Error, OSError) as e:
        return [_line(e)]
    found = []
    if stated.fingerprint not in (tokenizer.fingerprint, stated.sha256):  # equal where the file is our own to_json()
        found.append(f"{path}: is not the tokenizer whose fingerprint is in {META}")
    if stated.vocab_size != tokenizer.vocab_size:
        found.append(f"{path}: has {tokenizer.vocab_size} tokens, {META} says {stated.vocab_size}")
    if meta.end_of_text not in (None, tokenizer.end_of_text):
        found.append(f"{path}: ends a text with {tokenizer.end_of_text}, {META} says {meta.end_of_text}")
    return found


def _strays(folder: Path, meta: Meta) -> Iterator[str]:
    known = {name for shard in meta.shards for name in (shard.file, shard.index)}
    for name in sorted(os.listdir(folder)):
        if _SHARD.fullmatch(name) and name not in known:
            yield f"{folder / name}: is not in {META}"


def _shard_defects(folder: Path, meta: Meta, shard: Shard, verify: str) -> list[str]:
    found: list[str] = []
    for check in (_bin_defects, _index_defects):
        try:
            found += check(folder, meta, shard, verify)
        except (Error, OSError) as e:
            found.append(_line(e))
    return found


def _bin_defects(folder: Path, meta: Meta, shard: Shard, verify: str) -> Iterator[str]:
    path = folder / shard.file
    size = file_size(path)
    if size != shard.bytes:
        yield f"{path}: has {size} bytes, {META} says {shard.bytes}"
    elif verify == "sha256":
        total, largest = _sum_and_largest(path, np.dtype(meta.dtype).itemsize)
        if total != shard.sha256:
            yield f"{path}: its sha256 is not the one in {META}"
        if largest >= meta.tokenizer.vocab_size:
            yield f"{path}: holds token {largest}, and the tokenizer has {meta.tokenizer.vocab_size}"


def _sum_and_largest(path: Path, itemsize: int) -> tuple[str, int]:
    """The sha256 of a file, and the largest of its numbers; one below 0 counts as beyond all others."""
    digest, largest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            ids = np.frombuffer(piece, f"<u{itemsize}", len(piece) // itemsize)
            largest = max(largest, int(ids.max(initial=0)))
    return digest.hexdigest(), largest


def _index_defects(folder: Path, meta: Meta, shard: Shard, verify: str) -> Iterator[str]:
    path = folder / shard.index
    size, expected = file_size(path), index_bytes(shard.sequences, shard.documents)
    if size != expected:
        yield f"{path}: has {size} bytes, not the {expected} that the counts in {META} need"
        return
    if sha256_of_file(path) != shard.index_sha256:
        yield f"{path}: its sha256 is not the one in {META}"
    index = read_index(path)
    found = (index.n_tokens, len(index.lengths), len(index.documents) - 1)
    if found != (shard.tokens, shard.sequences, shard.documents) or index.dtype.name != meta.dtype:
        of = f"{found[0]} tokens in {found[1]} sequences of {found[2]} documents"
        yield f"{path}: tells of {of}, as {index.dtype.name}; {META} does not"
