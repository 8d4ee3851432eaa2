"""Token shards on disk: STEM.bin holds the token ids and nothing else, STEM.idx where sequences and documents end.

The layout is that of Megatron-LM's indexed datasets, so that others read what we write: Megatron takes STEM as it is,
and `np.memmap("STEM.bin", dtype=np.uint16)`, nanoGPT's way, gives all tokens. All numbers are little-endian. STEM.idx:

    9 bytes  MMIDIDX, 0, 0
    u64      version, 1
    u8       code of the tokens' type: 8 for uint16, 4 for int32
    u64      number of sequences S
    u64      number of documents + 1, D + 1
    S i32    tokens of each sequence
    S i64    where each sequence begins in STEM.bin, in bytes
    D+1 i64  which sequence each document begins with; the last number is S
"""

import functools
import itertools
import mmap
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, cast

import numpy as np

from classiclm.errors import BAD_INPUT, Error
from classiclm.files import sha256, write_once

_MAGIC = b"MMIDIDX\0\0"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_LENGTH, _OFFSET = np.dtype("<i4"), np.dtype("<i8")
CODES: dict[int, np.dtype[Any]] = {
    8: np.dtype("<u2"),
    4: np.dtype("<i4"),
}  # Megatron's numbers for the types it may store
_MAPS = 64  # each map holds a file descriptor, and a system may allow 256 in all
_AGAIN = "write the dataset again with classiclm prepare"


@dataclass(frozen=True, slots=True)
class Index:
    """What a .idx says of its .bin: S sequences in D documents."""

    dtype: np.dtype[Any]
    lengths: np.ndarray  # (S,) int32, tokens
    offsets: np.ndarray  # (S,) int64, bytes
    documents: np.ndarray  # (D + 1,) int64, sequences

    @property
    def n_tokens(self) -> int:
        """The tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def sequence_ends(self) -> np.ndarray:
        """(S,) int64: how many tokens stand before the end of each sequence."""
        return np.cumsum(self.lengths, dtype=np.int64)

    @property
    def document_ends(self) -> np.ndarray:
        """(D,) int64: how many tokens stand before the end of each document."""
        return self.sequence_ends[self.documents[1:] - 1]


def write_shard(
    folder: Path, stem: str, tokens: np.ndarray, lengths: np.ndarray, documents: np.ndarray | None = None
) -> dict[str, Any]:
    """Write STEM.bin, then STEM.idx, each whole or not at all; returns what meta.json says of them. Those that
    have this content already stay as they are.

    tokens (N,): uint16 or int32. lengths (S,): tokens of each sequence, at least 1. documents (D + 1,): which sequence
    each document begins with, and S; None makes every sequence a document.
    Raises ValueError if these do not fit together, Error (exit 4) if a file cannot be written.
    """
    index = _make_index(tokens, lengths, documents)
    data = _bytes(np.ascontiguousarray(tokens, index.dtype))
    head = _HEADER.pack(_MAGIC, _VERSION, _code(index.dtype), len(index.lengths), len(index.documents))
    about = head + index.lengths.tobytes() + index.offsets.tobytes() + index.documents.tobytes()
    write_once(folder / f"{stem}.bin", data)
    write_once(folder / f"{stem}.idx", about)
    return {
        "file": f"{stem}.bin",
        "bytes": len(data),
        "sha256": sha256(data),
        "index_sha256": sha256(about),
        "tokens": len(tokens),
        "sequences": len(index.lengths),
        "documents": len(index.documents) - 1,
    }


def _make_index(tokens: np.ndarray, lengths: np.ndarray, documents: np.ndarray | None) -> Index:
    dtype = tokens.dtype.newbyteorder("<")
    if tokens.ndim != 1 or dtype not in CODES.values():
        raise ValueError(f"tokens are {tokens.ndim}-dimensional {tokens.dtype}, not a row of uint16 or int32")
    if not len(lengths) or lengths.min() < 1 or lengths.max() > np.iinfo(_LENGTH).max:
        raise ValueError("a shard has sequences, each of 1 to 2^31 - 1 tokens")
    starts = np.arange(len(lengths) + 1) if documents is None else documents
    offsets = _offsets(lengths, dtype)
    index = Index(dtype, lengths.astype(_LENGTH), offsets, starts.astype(_OFFSET))
    if index.n_tokens != len(tokens):
        raise ValueError(f"the sequences have {index.n_tokens} tokens, there are {len(tokens)}")
    if not _are_borders(index.documents, len(lengths)):
        raise ValueError("documents do not part the sequences")
    return index


def _offsets(lengths: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    """Where sequences of these many tokens begin, in bytes, if they follow one another."""
    ends = np.cumsum(lengths, dtype=_OFFSET)
    return (ends - lengths.astype(_OFFSET, copy=False)) * dtype.itemsize


def _are_borders(documents: np.ndarray, n_sequences: int) -> bool:
    """Whether numbers rise from 0 to the number of sequences, so that every document has one at least."""
    inside = len(documents) > 1 and documents[0] == 0 and documents[-1] == n_sequences
    return bool(inside and (documents[1:] > documents[:-1]).all())


def _bytes(array: np.ndarray) -> bytes:
    """The bytes of a contiguous array, not copied: a shard may take a good part of the memory."""
    return cast(bytes, array.view(np.uint8).data)


def _code(dtype: np.dtype[Any]) -> int:
    return next(code for code, known in CODES.items() if known == dtype)


def read_index(path: Path) -> Index:
    """The index of one shard. Raises Error (exit 3) for a file that is missing, cut or does not add up."""
    size = file_size(path)
    try:
        with path.open("rb") as file:
            dtype, n_sequences, n_borders = _read_header(path, file.read(_HEADER.size))
            expected = index_bytes(n_sequences, n_borders - 1)
            if size != expected:  # before memory is taken for what the header claims
                raise _bad(path, f"has {size} bytes, not the {expected} that its counts need")
            return _checked(path, _parse(file.read(expected), dtype, n_sequences, n_borders))
    except (OSError, ValueError) as e:  # ValueError: cut while it was read
        raise _bad(path, f"cannot be read ({getattr(e, 'strerror', None) or e})") from e


def index_bytes(n_sequences: int, n_documents: int) -> int:
    """The size of a .idx of so many sequences and documents."""
    numbers = n_sequences * (_LENGTH.itemsize + _OFFSET.itemsize) + (n_documents + 1) * _OFFSET.itemsize
    return _HEADER.size + numbers


def _read_header(path: Path, head: bytes) -> tuple[np.dtype[Any], int, int]:
    """The tokens' type, the number of sequences, and that of documents + 1."""
    if len(head) < _HEADER.size:
        raise _bad(path, "is no index: it has no whole header")
    magic, version, code, n_sequences, n_borders = _HEADER.unpack(head)
    if magic != _MAGIC or version != _VERSION:
        raise _bad(path, "is no index of a shard, or of another version")
    if code not in CODES:
        raise _bad(path, f"says that its tokens are of type {code}, not uint16 (8) or int32 (4)")
    return CODES[code], n_sequences, n_borders


def _parse(data: bytes, dtype: np.dtype[Any], n_sequences: int, n_borders: int) -> Index:
    lengths = np.frombuffer(data, _LENGTH, n_sequences)
    offsets = np.frombuffer(data, _OFFSET, n_sequences, lengths.nbytes)
    documents = np.frombuffer(data, _OFFSET, n_borders, lengths.nbytes + offsets.nbytes)
    return Index(dtype, lengths, offsets, documents)


def _checked(path: Path, index: Index) -> Index:
    if not len(index.lengths) or index.lengths.min() < 1:
        raise _bad(path, "has no sequence, or an empty one")
    if not np.array_equal(index.offsets, _offsets(index.lengths, index.dtype)):
        raise _bad(path, "has sequences that do not follow one another")
    if not _are_borders(index.documents, len(index.lengths)):
        raise _bad(path, "has documents that do not part its sequences")
    return index


def file_size(path: Path) -> int:
    """The bytes of a plain file. Raises Error (exit 3) if it is missing or something else, such as a pipe."""
    try:
        found = path.stat()
    except (OSError, ValueError) as e:  # ValueError: a null character in a name
        why = "is missing" if isinstance(e, FileNotFoundError) else f"cannot be read ({getattr(e, 'strerror', e)})"
        raise _bad(path, why) from e
    if not stat.S_ISREG(found.st_mode):
        raise _bad(path, "is no plain file")
    return found.st_size


def _bad(path: Path, why: str) -> Error:
    return Error(path, why, _AGAIN, BAD_INPUT)


class Tokens:
    """The tokens of several .bin files as one array of N ids on disk, to be read by index.

    `tokens[ids]` for integers of any shape gives an array of that shape, `tokens[a:b]` a copy of that part. Files are
    mapped when they are needed, a few at a time, so that there may be thousands.
    """

    ndim = 1

    def __init__(self, paths: Sequence[Path], dtype: Any):
        """Raises Error (exit 3) for a file that is missing or does not hold a whole number of tokens."""
        self.paths = tuple(paths)
        self.dtype = np.dtype(dtype)
        sizes = [_count(path, self.dtype) for path in self.paths]
        self._starts = np.array([0, *itertools.accumulate(sizes)], np.int64)  # (files + 1,)
        self._file = functools.lru_cache(maxsize=_MAPS)(_map)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> tuple[int]:
        """(N,), as an array's."""
        return (len(self),)

    def __getitem__(self, key: Any) -> Any:
        """The ids at places, as NumPy has it. Raises IndexError beyond the ends, TypeError for other keys."""
        if isinstance(key, slice | EllipsisType):
            start, stop, step = (slice(None) if key is ... else key).indices(len(self))
            return self._part(start, stop) if step == 1 else self._scattered(np.arange(start, stop, step))
        places = np.asarray(key)
        if places.size and places.dtype.kind not in "iu":
            raise TypeError(f"places of tokens are integers or a slice, not {places.dtype}")
        places = self._inside(places.astype(np.int64, copy=False))
        if places.ndim and places.shape[-1] > 1 and (places[..., 1:] - places[..., :-1] == 1).all():
            return self._rows(places)
        found = self._scattered(places.reshape(-1)).reshape(places.shape)
        return found if places.ndim else found[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All tokens in memory."""
        if copy is False:
            raise ValueError("tokens on disk cannot become an array without a copy")
        return self[:] if dtype is None else self[:].astype(dtype, copy=False)

    def _inside(self, places: np.ndarray) -> np.ndarray:
        """Places counted from the front. Raises IndexError for one beyond the ends."""
        if not places.size:
            return places
        low, high = int(places.min()), int(places.max())
        if low < -len(self) or high >= len(self):
            raise IndexError(f"place {low if low < -len(self) else high} is not among {len(self)} tokens")
        return places if low >= 0 else np.where(places < 0, places + len(self), places)

    def _rows(self, places: np.ndarray) -> np.ndarray:
        """Rows of neighbours, what every batch asks for: each is one copy, or two across a border of files."""
        rows = places.reshape(-1, places.shape[-1])
        result = np.empty(rows.shape, self.dtype)
        for row, start in zip(result, rows[:, 0].tolist(), strict=True):
            self._read(start, row)
        return result.reshape(places.shape)

    def _part(self, start: int, stop: int) -> np.ndarray:
        result = np.empty(max(0, stop - start), self.dtype)
        self._read(start, result)
        return result

    def _read(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (n,) with the tokens from `start`."""
        done = 0
        file = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < len(out):
            place = start + done - int(self._starts[file])
            piece = self._tokens_of(file)[place : place + len(out) - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
            file += 1

    def _scattered(self, places: np.ndarray) -> np.ndarray:
        """The tokens at any places (n,), file by file."""
        files = np.searchsorted(self._starts, places, side="right") - 1  # (n,)
        order = np.argsort(files, kind="stable")
        present, firsts = np.unique(files[order], return_index=True)
        result = np.empty(len(places), self.dtype)
        for file, mine in zip(present.tolist(), np.split(order, firsts[1:]), strict=False):
            result[mine] = self._tokens_of(file)[places[mine] - self._starts[file]]
        return result

    def _tokens_of(self, file: int) -> np.ndarray:
        return self._file(self.paths[file], self.dtype)


def _count(path: Path, dtype: np.dtype[Any]) -> int:
    size = file_size(path)
    if not size or size % dtype.itemsize:
        raise _bad(path, f"has {size} bytes, no whole number of {dtype.name} tokens above 0")
    return size // dtype.itemsize


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    """One file's tokens; the map and its descriptor go with the last array on them."""
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    except (OSError, ValueError) as e:
        raise _bad(path, f"cannot be read ({e})") from e
