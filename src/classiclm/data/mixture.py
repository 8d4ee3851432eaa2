"""Several texts in one stream, in fixed shares: which sequence comes from which text is arithmetic, as all else is.

A pattern of 10,000 slots is shared out by the weights and repeated without end; each repetition has its slots in an
order of its own. So after every 10,000 sequences the shares are exact, to a slot, and sequence g is found without
looking at those before it. Each text goes through epochs of its own: a small one with a large weight comes round often.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch

from classiclm.data.streams import Batch, Stream, derive, shuffled
from classiclm.errors import Error

SLOTS = 10_000  # of the pattern


class Mixture:
    """A stream of streams: sequence g is one of theirs. All must have sequences of the same form.

    Raises Error (exit 2) for weights that are not positive and finite, or for more streams than slots.
    """

    def __init__(self, streams: Sequence[Stream], weights: Sequence[float], key: tuple[object, ...]):
        self.streams, self.slots = tuple(streams), share_out(weights, SLOTS)
        self.n_windows = sum(stream.n_windows for stream in streams)  # as many as there are different ones
        self.padding = sum(n * stream.padding for n, stream in zip(self.slots.tolist(), streams, strict=True)) / SLOTS
        self._key = key
        # A step asks for neighbours, which share a repetition: 1 ms is spent once per 10,000 sequences.
        self._repetition = functools.lru_cache(maxsize=2)(self._lay_out)

    def __call__(self, numbers: np.ndarray) -> Batch:
        """Sequences by number, (B,) -> a batch of (B, T)."""
        who, places = self.where(numbers)
        present = np.unique(who)
        parts = [self.streams[i](places[who == i]) for i in present]
        back = torch.from_numpy(np.argsort(np.argsort(who, kind="stable")))  # from the parts, in a row, to the numbers
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def where(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For each sequence (B,) the stream it comes from, and its number there; a stream's own come in their order."""
        who, places = np.empty_like(numbers), np.empty_like(numbers)
        repetitions = numbers // SLOTS
        for repetition in np.unique(repetitions):
            here = repetitions == repetition
            owner, rank = self._repetition(int(repetition))
            slot = numbers[here] % SLOTS
            who[here] = owner[slot]
            places[here] = repetition * self.slots[owner[slot]] + rank[slot]
        return who, places

    def _lay_out(self, repetition: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each slot of a repetition: its stream, and how many slots of that stream are before it."""
        order = shuffled(np.arange(SLOTS), SLOTS, derive("mixture", *self._key, repetition))
        owner = np.repeat(np.arange(len(self.slots)), self.slots)[order]
        rank = np.empty_like(owner)
        rank[np.argsort(owner, kind="stable")] = np.concatenate([np.arange(n) for n in self.slots])
        return owner, rank


def share_out(weights: Sequence[float], n: int) -> np.ndarray:
    """n slots in proportion to the weights, by largest remainders, but at least one for each: (len(weights),) int64.

    Raises Error (exit 2) for weights that are not positive and finite, or for more of them than slots.
    """
    wrong = [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]
    if wrong:
        raise Error("weights", f"{wrong[0]} is not a positive number", "give each source a positive weight")
    if not 0 < len(weights) <= n:
        raise Error("weights", f"there are {len(weights)}, a mixture has 1 to {n}", "mix fewer sources")
    total = sum(map(Fraction, weights))  # exact, so that a tie is one on every machine, and large ones cannot overflow
    shares = [n * Fraction(weight) / total for weight in weights]
    slots = [max(1, math.floor(share)) for share in shares]
    while sum(slots) != n:
        by_need = sorted(range(len(slots)), key=lambda i: slots[i] - shares[i])  # ties: the first
        if sum(slots) < n:
            slots[by_need[0]] += 1
        else:  # the smallest were given more than their share; those who have most above theirs pay
            slots[next(i for i in reversed(by_need) if slots[i] > 1)] -= 1
    return np.array(slots)
