"""Whole documents in windows, so that few are cut and none sees another ("Fewer Truncations Improve Language Modeling",
Ding et al. 2024).

What is packed are predictions: a document of l tokens is l - 1 of them, from each token to the next, and its last token
is only a target. A window has room for n_ctx predictions. A document of more is cut in pieces of n_ctx first, which
loses no prediction, only context. The pieces are then packed by best-fit decreasing: the longest first, each into the
fullest window that has room for it. What stays empty is padding.
"""

import math

import numpy as np
import torch

from classiclm.data.streams import Batch, TokenArray, visited
from classiclm.errors import BAD_INPUT, Error
from classiclm.nn.mask import IGNORE

PADDING = -1  # the document number of places that hold no token


class PackedStream:
    """The documents in tokens[first:end], packed into windows of n_ctx predictions.

    The packing is the same in every epoch, the order of the windows is not. An epoch has each prediction inside a
    document exactly once. `padding` is the share of places that stay empty. Raises Error (exit 3) if there is nothing
    to predict.
    """

    def __init__(
        self,
        tokens: TokenArray,
        first: int,
        end: int,
        n_ctx: int,
        key: tuple[object, ...],  # what the order follows from
        document_ends: np.ndarray,  # (D,) ascending, in all of `tokens`
        name: str = "training text",
    ):
        starts, lengths = cut_pieces(_borders(document_ends, first, end), n_ctx)
        if not len(starts):
            raise Error(name, "has no document of two tokens", "give more text", BAD_INPUT)
        windows = best_fit(lengths, n_ctx)
        order = np.argsort(windows, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]  # (P,), window by window
        self._ends = np.bincount(windows).cumsum()  # (W,): where a window's pieces end
        self.n_windows = len(self._ends)
        self.padding = 1 - int(lengths.sum()) / (self.n_windows * n_ctx)
        self._tokens, self._n_ctx, self._key = tokens, n_ctx, key

    def __call__(self, numbers: np.ndarray) -> Batch:
        """Sequences by number, (B,) -> a batch of (B, T): inputs, targets, documents and positions, all int64.

        Padding is at the end of a row: input 0, target IGNORE, document PADDING, position 0.
        """
        windows = visited(numbers, self.n_windows, self._key)
        last = self._ends[windows]
        counts = last - np.where(windows > 0, self._ends[windows - 1], 0)  # pieces of each row
        nth = _count_up(counts)  # piece 0, 1, ... of its row
        pieces = np.repeat(last - counts, counts) + nth
        lengths = self._lengths[pieces]
        rows = np.repeat(np.repeat(np.arange(len(numbers)), counts), lengths)
        columns = _count_up(np.bincount(rows, minlength=len(numbers)))  # rows are filled from the left, without gaps
        # Slices, as these are read from disk faster than single places.
        text = [self._tokens[a : a + n + 1] for a, n in zip(self._starts[pieces].tolist(), lengths, strict=True)]
        values = {
            "inputs": (np.concatenate([piece[:-1] for piece in text]), 0),
            "targets": (np.concatenate([piece[1:] for piece in text]), IGNORE),
            "documents": (np.repeat(nth, lengths), PADDING),
            "positions": (_count_up(lengths), 0),
        }
        return {name: self._spread(value, rows, columns, len(numbers), rest) for name, (value, rest) in values.items()}

    def _spread(self, values: np.ndarray, rows: np.ndarray, columns: np.ndarray, n: int, rest: int) -> torch.Tensor:
        table = np.full((n, self._n_ctx), rest, dtype=np.int64)
        table[rows, columns] = values
        return torch.from_numpy(table)


def cut_pieces(borders: np.ndarray, n_ctx: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of up to n_ctx predictions out of the documents between `borders` (D + 1,) ascending.

    Returns the token each begins with, and its number of predictions: both (P,) int64, in the order of the text.
    """
    predictions = np.diff(borders) - 1
    counts = -(-predictions // n_ctx)  # 0 for a document of one token
    skipped = _count_up(counts) * n_ctx
    starts = np.repeat(borders[:-1], counts) + skipped
    return starts, np.minimum(np.repeat(predictions, counts) - skipped, n_ctx)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The window 0, 1, ... of each piece (P,): the longest first, each into the fullest window that has room for it.

    Pieces of one length, and windows with equally much room, are handled together: what a window gets of a length, it
    gets at once, as having some it is fuller than before. So the work in Python is O(capacity^2), whatever P is.
    """
    # An unsigned type that is as small as it can be has a sort in linear time.
    order = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    windows: list[np.ndarray] = []  # of the pieces in this order
    room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]  # room[r]: windows with room for r predictions
    opened = 0
    for length, n in reversed(list(enumerate(np.bincount(lengths).tolist()))):
        for space in range(length, capacity) if n else ():
            while n and room[space]:
                windows.append(_place(n, length, room[space].pop(), space, room))
                n -= len(windows[-1])
        if n:
            new = np.arange(opened, opened + math.ceil(n / (capacity // length)))
            opened += len(new)
            windows.append(_place(n, length, new, capacity, room))
    result = np.empty(len(lengths), dtype=np.int64)
    result[order] = np.concatenate(windows)
    return result


def _place(n: int, length: int, ids: np.ndarray, space: int, room: list[list[np.ndarray]]) -> np.ndarray:
    """Put up to n pieces of a length into windows `ids`, which have `space` left, and note in `room` what is left then.

    Returns the windows of the pieces that were placed.
    """
    fit = space // length
    used = min(len(ids), math.ceil(n / fit))
    placed = np.repeat(ids[:used], fit)[:n]
    full, last, untouched = ids[: used - 1], ids[used - 1 : used], ids[used:]
    in_last = len(placed) - (used - 1) * fit  # may be fewer
    parts = ((full, space - fit * length), (last, space - in_last * length), (untouched, space))
    for part, left in parts:
        if len(part) and left:
            room[left].append(part)
    return placed


def _borders(document_ends: np.ndarray, first: int, end: int) -> np.ndarray:
    """Where the documents of tokens[first:end] begin, and `end`."""
    low, high = np.searchsorted(document_ends, [first, end])
    inner = document_ends[low:high]
    return np.unique(np.concatenate([[first], inner, [end]])).astype(np.int64)


def _count_up(counts: np.ndarray) -> np.ndarray:
    """0, 1, ..., n - 1 for each n of `counts`, in a row: (3, 0, 2) -> (0, 1, 2, 0, 1)."""
    return np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
