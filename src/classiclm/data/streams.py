"""Sequences by number: a stream says what its sequence 0, 1, 2, ... is, through its epochs, without any state.

Shuffling is a permutation that can be asked for single places, so that an epoch of any length needs no memory.
"""

import hashlib
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from classiclm.errors import BAD_INPUT, Error
from classiclm.nn.mask import IGNORE

Batch = dict[str, Tensor]
_ROUNDS = 6
_BLOCK = 256


class TokenArray(Protocol):
    """Token ids by place: an array (N,) in memory, or one that stays on disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, places: np.ndarray | slice, /) -> np.ndarray:
        """The ids at places of any shape, in that shape; or those of a slice."""


class Stream(Protocol):
    """Sequences of one length, by number: a batch's, in ascending order."""

    n_windows: int  # sequences in an epoch
    padding: float  # share of the places that hold no token

    def __call__(self, numbers: np.ndarray) -> Batch:
        """The sequences number 0, 1, ...: (B,) int64 -> tensors (B, T)."""


def shuffled(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The positions of `index` under a random permutation of range(n) that `key` chooses; needs no memory for n.

    A Feistel network permutes the next power of four; values that fall outside n are sent through again ("cycle
    walking", Black and Rogaway 2002), so the result is a permutation of range(n) exactly.
    """
    half_bits = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    result = _feistel(index.astype(np.uint64), half_bits, key)
    while (outside := result >= n).any():
        result[outside] = _feistel(result[outside], half_bits, key)
    return result.astype(np.int64)


def _feistel(x: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    low = np.uint64((1 << half_bits) - 1)
    left, right = x >> np.uint64(half_bits), x & low
    for i in range(_ROUNDS):
        left, right = right, left ^ (_mix(right, key + i) & low)
    return (left << np.uint64(half_bits)) | right


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014) as a keyed hash of 64-bit words; overflow is meant."""
    z = x + np.uint64(key * 0x9E3779B97F4A7C15 & (2**64 - 1))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def derive(*parts: object) -> int:
    """A 63-bit number from any names and numbers: equal parts, equal number, on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def visited(numbers: np.ndarray, n: int, key: tuple[object, ...]) -> np.ndarray:
    """Which of n things is visited at number 0, 1, ..., if each epoch visits all of them, in an order of its own."""
    epochs = numbers // n
    places = np.empty(len(numbers), dtype=np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        places[here] = shuffled(numbers[here] % n, n, derive("order", *key, int(epoch)))
    return places


class InBlocks:
    """A function of ascending numbers (B,) -> (B,), evaluated for 256 neighbours at a time: of a dozen, NumPy's calls
    would take longer than its arithmetic, and longer than they may beside a small model's step."""

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]):
        self._block = lru_cache(maxsize=2)(lambda block: function(np.arange(block * _BLOCK, (block + 1) * _BLOCK)))

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        first, last = int(numbers[0]) // _BLOCK, int(numbers[-1]) // _BLOCK
        values = [self._block(block) for block in range(first, last + 1)]
        return (values[0] if first == last else np.concatenate(values))[numbers - first * _BLOCK]


class TextStream:
    """Windows of n_ctx tokens out of tokens[first:end], and their targets, one later.

    An epoch cuts the text into adjoining windows, from a random offset, and visits each once in a random order. With
    the ends of documents, windows are as in `cut_windows`. Raises Error (exit 3) if the text does not fill one window.
    """

    padding = 0.0

    def __init__(
        self,
        tokens: TokenArray,
        first: int,
        end: int,
        n_ctx: int,
        key: tuple[object, ...],  # what the order follows from
        document_ends: np.ndarray | None = None,  # (D,) ascending, in all of `tokens`
        name: str = "training text",
    ):
        n = end - first - 1  # the last token is only a target
        if n < n_ctx:
            fix = f"give more text, or a shorter context, as in --model.n_ctx {max(n // 2, 1)}"
            raise Error(name, f"has {n + 1} tokens, a window needs {n_ctx + 1}", fix, BAD_INPUT)
        self.n_windows = max(1, (n - n_ctx + 1) // n_ctx)  # as many as fit behind any offset
        self._n_offsets = n - self.n_windows * n_ctx + 1  # so that every token has its turn, the last one too
        self._tokens, self._first, self._n_ctx, self._key = tokens, first, n_ctx, key
        self._document_ends = document_ends
        self._starts = InBlocks(self._starts_of)

    def __call__(self, numbers: np.ndarray) -> Batch:
        """Sequences by ascending number, (B,) -> a batch of (B, T)."""
        return cut_windows(self._tokens, self._starts(numbers), self._n_ctx, self._document_ends)

    def _starts_of(self, numbers: np.ndarray) -> np.ndarray:
        """Where they begin, (B,)."""
        epochs, which = np.unique(numbers // self.n_windows, return_inverse=True)
        offsets = np.array([derive("offset", *self._key, int(epoch)) % self._n_offsets for epoch in epochs])
        return self._first + offsets[which] + visited(numbers, self.n_windows, self._key) * self._n_ctx


def cut_windows(tokens: TokenArray, starts: np.ndarray, n_ctx: int, document_ends: np.ndarray | None = None) -> Batch:
    """The windows that begin at `starts` (B,): inputs and targets, (B, T) int64.

    With the ends of documents there are also, for each input, "documents" (the number of its document in this window,
    from 0) and "positions" (the distance to where that document begins in this window). No document is predicted from
    the one before: the target behind a document's last token is IGNORE.
    """
    rows = tokens[starts[:, None] + np.arange(n_ctx + 1)].astype(np.int64)  # (B, T + 1)
    if document_ends is None:
        pair = torch.from_numpy(rows)
        return {"inputs": pair[:, :-1], "targets": pair[:, 1:]}
    begins = _begins(starts, n_ctx, document_ends)  # (B, T + 1)
    since = np.maximum.accumulate(np.where(begins, np.arange(n_ctx + 1), 0), axis=1)  # where the present one began
    return {
        "inputs": torch.from_numpy(rows[:, :-1]),
        "targets": torch.from_numpy(np.where(begins[:, 1:], IGNORE, rows[:, 1:])),
        "documents": torch.from_numpy(begins[:, :-1].cumsum(axis=1)),
        "positions": torch.from_numpy((np.arange(n_ctx + 1) - since)[:, :-1]),
    }


def _begins(starts: np.ndarray, n_ctx: int, document_ends: np.ndarray) -> np.ndarray:
    """(B, T + 1) True where a document begins behind the window's first place: two searches a row, not one a token."""
    low, high = (np.searchsorted(document_ends, starts + shift, side="right") for shift in (0, n_ctx))
    rows = np.repeat(np.arange(len(starts)), high - low)
    nth = np.arange(len(rows)) - np.repeat((high - low).cumsum() - (high - low), high - low)  # end 0, 1, ... of its row
    begins = np.zeros((len(starts), n_ctx + 1), dtype=bool)
    begins[rows, document_ends[low[rows] + nth] - starts[rows]] = True
    return begins
