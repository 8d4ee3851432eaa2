"""Files of tensors in the safetensors format: written as a stream, one tensor at a time, and read by rows.

    8 bytes   the length of the header
    header    JSON, name -> dtype, shape and place; blanks up to a multiple of 8
    data      one tensor behind the other

The bytes are those that the library's own `save` makes, but it needs them all in memory, and this does not. Tensors
whose rows are shared out to processes (FSDP2's DTensors) are a file for each process, STEM-00001-of-00002.safetensors;
the header's metadata says which rows are in it, and a reader takes the rows it wants from whichever files have them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from classiclm.errors import BAD_INPUT, Error

# The widest come first in a file, so that each lies at a multiple of its width; by name among equals.
_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES)}


@dataclass(frozen=True)
class Piece:
    """What one process holds of a tensor: all of it, or the rows from `first` on of `n_rows`."""

    tensor: Tensor
    first: int = 0
    n_rows: int | None = None  # of the whole tensor; None if this is the whole tensor


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this is a DTensor. (Told by what it has: to import its class takes seconds.)"""
    return hasattr(tensor, "device_mesh")


def piece_of(tensor: Tensor) -> Piece | None:
    """This process's part of a tensor, not copied; None for rows that another process saves: there are none here, or
    they are a copy of its own (HSDP).

    Raises ValueError for a layout other than FSDP2's: rows shared out evenly, in order, along one mesh dimension.
    """
    if not is_shared_out(tensor):
        return Piece(tensor.detach())
    rows, is_copy = _own_rows(tensor)
    if is_copy or not rows:
        return None
    shared: Any = tensor.detach()
    return Piece(shared.to_local(), rows.start, tensor.shape[0])


def _own_rows(tensor: Tensor) -> tuple[range, bool]:
    """The rows of a DTensor that are in this process, and whether another one holds them too and comes first."""
    shared: Any = tensor
    rows, is_copy, n_shards = range(tensor.shape[0] if tensor.ndim else 0), False, 0
    coordinates = zip(shared.device_mesh.shape, shared.device_mesh.get_coordinate(), strict=True)
    for placement, (size, at) in zip(shared.placements, coordinates, strict=True):
        if placement.is_replicate():
            is_copy = is_copy or at > 0
        elif placement.is_shard(0) and n_shards == 0:
            share = -(-len(rows) // size)
            rows, n_shards = rows[at * share : (at + 1) * share], 1
        else:
            raise ValueError(f"a tensor placed {shared.placements} cannot be saved; only rows may be shared out, once")
    return rows, is_copy


def size_of(tensors: Mapping[str, Piece]) -> int:
    """Bytes of the data in a file of these tensors."""
    return sum(piece.tensor.numel() * piece.tensor.element_size() for piece in tensors.values())


def non_finite(tensors: Mapping[str, Piece]) -> str | None:
    """The name of a tensor that holds NaN or an infinity, if there is one. Nothing is copied."""
    floats = {name: piece.tensor for name, piece in tensors.items() if piece.tensor.is_floating_point()}
    for name, tensor in floats.items():
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            return name
    return None


def stream(tensors: Mapping[str, Piece]) -> Iterator[bytes | memoryview]:
    """The bytes of a file that holds the tensors. One at a time is copied to the host, if it is not there."""
    order = sorted(tensors.items(), key=lambda item: (_RANKS[item[1].tensor.dtype], item[0]))
    yield _header(order)
    for _, piece in order:
        flat = piece.tensor.cpu().contiguous().reshape(-1)
        if flat.numel():
            yield flat.view(torch.uint8).numpy().data


def _header(order: Sequence[tuple[str, Piece]]) -> bytes:
    rows = {name: [piece.first, piece.n_rows] for name, piece in order if piece.n_rows is not None}
    header: dict[str, Any] = {"__metadata__": {"rows": json.dumps(rows)}} if rows else {}
    end = 0
    for name, piece in order:
        begin, end = end, end + piece.tensor.numel() * piece.tensor.element_size()
        dtype, shape = _DTYPES[piece.tensor.dtype], list(piece.tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Reader:
    """The tensors of one file, or of the several that hold their rows. Made by `reading`."""

    def __init__(self, source: Path, files: Sequence[Any]):
        self.source = source
        self._parts: dict[str, list[tuple[int, int, Any]]] = {}  # name -> first row, end, open file
        self._shapes: dict[str, torch.Size] = {}
        for file in files:
            rows = json.loads((file.metadata() or {}).get("rows", "{}"))
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                self._add(name, file, rows.get(name))

    def _add(self, name: str, file: Any, rows: Sequence[int] | None) -> None:
        shape = file.get_slice(name).get_shape()
        if rows is None:
            self._shapes[name] = torch.Size(shape)
            self._parts[name] = [(0, shape[0] if shape else 0, file)]
            return
        first, n_rows = rows
        self._shapes[name] = torch.Size([n_rows, *shape[1:]])
        self._parts.setdefault(name, []).append((first, first + shape[0], file))

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of each whole tensor, by name."""
        return self._shapes

    def read(self, name: str) -> Tensor:
        """A whole tensor. Raises Error (exit 3) if rows of it are missing."""
        parts = self._parts[name]
        if len(parts) == 1 and (not self._shapes[name] or parts[0][:2] == (0, self._shapes[name][0])):
            return parts[0][2].get_tensor(name)
        return self.rows(name, range(self._shapes[name][0]))

    def rows(self, name: str, rows: range) -> Tensor:
        """Some rows of a tensor, from as many files as have them. Raises Error (exit 3) if one has not."""
        found, at = [], rows.start
        for first, end, file in sorted(self._parts[name], key=lambda part: part[:2]):
            if first <= at < min(end, rows.stop):
                found.append(file.get_slice(name)[at - first : min(end, rows.stop) - first])
                at = min(end, rows.stop)
        if at < rows.stop:
            fix = "restore the folder from a copy"
            raise Error(self.source, f"lacks row {at} of {name}", fix, BAD_INPUT)
        return torch.cat(found) if len(found) != 1 else found[0]

    def like(self, name: str, target: Tensor) -> Tensor:
        """A tensor laid out as `target` is: this process's rows of it if target is shared out, and else all of it.

        One of another shape than target's comes whole, for the caller to refuse.
        """
        if not is_shared_out(target) or self._shapes[name] != target.shape:
            return self.read(name)
        from torch.distributed.tensor import DTensor

        shared: Any = target
        own, _ = _own_rows(target)
        local = self.rows(name, own) if own else torch.empty((0, *target.shape[1:]), dtype=target.dtype)
        mesh, placements = shared.device_mesh, shared.placements
        return DTensor.from_local(
            local.to(target.device), mesh, placements, shape=target.shape, stride=target.stride(), run_check=False
        )


@contextmanager
def reading(folder: Path, stem: str) -> Iterator[Reader]:
    """The open tensors of FOLDER/STEM.safetensors, or of its parts. What is read may lie in the file: copy it.

    Raises Error (exit 3) for a file that is not of this format.
    """
    paths = sorted(folder.glob(f"{stem}-*-of-*.safetensors")) or [folder / f"{stem}.safetensors"]
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
            reader = Reader(folder / f"{stem}.safetensors", files)
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as e:
            fix = "restore the folder from a copy"
            raise Error(paths[0], f"is no safetensors file ({e})", fix, BAD_INPUT) from e
        yield reader


def part_name(stem: str, rank: int, size: int) -> str:
    """The file of one process's rows."""
    return f"{stem}-{rank + 1:05d}-of-{size:05d}.safetensors"
