"""Batches as pure functions: the content of step t follows from (fingerprint of the data, seed, t) and nothing else.

There is no iterator and so no state to save. To resume, or to go on with another number of processes, is arithmetic.
"""

import bisect
import hashlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from classiclm.data.splits import Split
from classiclm.errors import BAD_INPUT, Error
from classiclm.recipe import Recipe, TokenRecipe

Batch = dict[str, Tensor]
_ROUNDS = 6


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


class BatchSizes:
    """How many sequences each optimizer step takes, and how many came before it: arithmetic, no state.

    It is recipe.batch; that of a TokenRecipe grows linearly with the tokens seen, from ramp_from to batch over the
    first ramp_tokens tokens, in multiples of ramp_from (GPT-3, appendix B).
    """

    def __init__(self, recipe: Recipe, n_ctx: int):
        self.full = recipe.batch
        self._ends = [0]  # sequences before step 0, 1, ... of the ramp
        if not isinstance(recipe, TokenRecipe):
            return
        while (tokens := self._ends[-1] * n_ctx) < recipe.ramp_tokens:
            grown = recipe.ramp_from + (recipe.batch - recipe.ramp_from) * tokens // recipe.ramp_tokens
            self._ends.append(self._ends[-1] + grown // recipe.ramp_from * recipe.ramp_from)

    def before(self, step: int) -> int:
        """Sequences seen before optimizer step 0, 1, ..."""
        ramp = len(self._ends) - 1
        return self._ends[min(step, ramp)] + max(0, step - ramp) * self.full

    def steps_for(self, sequences: int) -> int:
        """The number of steps that see at least so many sequences."""
        ramp = len(self._ends) - 1
        if sequences <= self._ends[-1]:
            return bisect.bisect_left(self._ends, sequences)
        return ramp + math.ceil((sequences - self._ends[-1]) / self.full)


class Windows:
    """Training batches for a causal language model: windows of n_ctx tokens and, one later, their targets.

    An epoch cuts the text into adjoining windows, from a random offset, and visits each once in a random order.
    Raises Error (exit 3) if the text does not fill one window.
    """

    def __init__(self, split: Split, n_ctx: int, recipe: Recipe, seed: int):
        n = len(split.tokens) - 1  # the last token is only a target
        if n < n_ctx:
            fix = f"give more text, or a shorter context, as in --model.n_ctx {max(n // 2, 1)}"
            raise Error("training text", f"has {n + 1} tokens, a window needs {n_ctx + 1}", fix, BAD_INPUT)
        self.tokens, self.n_ctx = split.tokens, n_ctx
        self.sizes = BatchSizes(recipe, n_ctx)
        self.n_windows = max(1, (n - n_ctx + 1) // n_ctx)  # as many as fit behind any offset
        self.n_offsets = n - self.n_windows * n_ctx + 1  # so that every token has its turn, the last one too
        self._key = (split.fingerprint, seed)

    def __call__(self, step: int) -> Batch:
        """The batch of optimizer step `step` (0, 1, ...): inputs and targets, (B, T) int64."""
        index = np.arange(self.sizes.before(step), self.sizes.before(step + 1))
        starts = np.empty(len(index), dtype=np.int64)
        for epoch in np.unique(index // self.n_windows):
            here = index // self.n_windows == epoch
            starts[here] = self._starts(index[here] % self.n_windows, int(epoch))
        return _windows(self.tokens, starts, self.n_ctx)

    def _starts(self, positions: np.ndarray, epoch: int) -> np.ndarray:
        offset = derive("offset", *self._key, epoch) % self.n_offsets
        order = shuffled(positions, self.n_windows, derive("order", *self._key, epoch))
        return offset + order * self.n_ctx


def evaluation_batches(split: Split, n_ctx: int, batch: int, n_windows: int | None = None) -> Iterator[Batch]:
    """Adjoining windows of a split, in order: all of it, each token but the first predicted once (the last window may
    be shorter), or `n_windows` full windows spread evenly over it."""
    n = len(split.tokens) - 1
    starts = np.arange(0, n - n_ctx + 1, n_ctx)
    whole = n_windows is None or n_windows >= len(starts)
    if n_windows is not None and not whole:
        starts = starts[np.linspace(0, len(starts) - 1, n_windows).astype(np.int64)]
    for i in range(0, len(starts), batch):
        yield _windows(split.tokens, starts[i : i + batch], n_ctx)
    rest = n % n_ctx
    if whole and rest:
        yield _windows(split.tokens, np.array([n - rest]), rest)


def rows_of(batch: Batch, n: int) -> Iterator[Batch]:
    """The batch in parts of n sequences; the last may be smaller."""
    n_rows = len(next(iter(batch.values())))
    return ({name: tensor[i : i + n] for name, tensor in batch.items()} for i in range(0, n_rows, n))


def _windows(tokens: np.ndarray, starts: np.ndarray, n_ctx: int) -> Batch:
    rows = tokens[starts[:, None] + np.arange(n_ctx + 1)].astype(np.int64)  # (B, T + 1)
    pair = torch.from_numpy(rows)
    return {"inputs": pair[:, :-1], "targets": pair[:, 1:]}
