"""Batches as pure functions: the content of step t follows from (fingerprint of the data, seed, t) and nothing else.

There is no iterator and so no state to save. To resume, or to go on with another number of processes, is arithmetic.
"""

import bisect
import math
from collections.abc import Iterator

import numpy as np

from classiclm.data.corpora import Documents
from classiclm.data.mixture import Mixture
from classiclm.data.packing import PackedStream
from classiclm.data.splits import Split
from classiclm.data.streams import Batch as Batch
from classiclm.data.streams import Stream, TextStream, cut_windows
from classiclm.data.streams import derive as derive
from classiclm.data.streams import shuffled as shuffled
from classiclm.errors import Error
from classiclm.recipe import Recipe, TokenRecipe


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
    """Training batches for a causal language model: inputs of n_ctx tokens and their targets, by step.

    The sequences come from one stream over the split, or from a mixture of its ranges. Raises Error: exit 3 if the text
    (or one of the ranges) does not fill a window; exit 2 for impossible weights, or if documents are to be told apart
    and the split does not say where they end.
    """

    def __init__(self, split: Split, n_ctx: int, recipe: Recipe, seed: int, documents: Documents = "joined"):
        self.sizes = BatchSizes(recipe, n_ctx)
        self.stream = make_stream(split, n_ctx, seed, documents)
        self.n_windows = self.stream.n_windows  # of an epoch
        self.padding = self.stream.padding  # share of the places that hold no token

    def __call__(self, step: int) -> Batch:
        """The batch of optimizer step `step` (0, 1, ...): inputs and targets, (B, T) int64; unless documents are
        joined, also the document and the position of each input."""
        return self.stream(np.arange(self.sizes.before(step), self.sizes.before(step + 1)))


def make_stream(split: Split, n_ctx: int, seed: int, documents: Documents = "joined") -> Stream:
    """The split's sequences by number; arguments and errors as of `Windows`."""
    ends = _ends_for(split, documents)

    def stream(name: str, first: int, end: int, *source: str) -> Stream:
        where = (split.tokens, first, end, n_ctx, (split.fingerprint, seed, *source))
        if ends is not None and documents == "packed":
            return PackedStream(*where, ends, name)
        return TextStream(*where, ends, name)

    if not split.ranges:
        return stream("training text", 0, len(split.tokens))
    streams = [stream(name, first, end, name) for name, first, end, _ in split.ranges]
    return Mixture(streams, [weight for *_, weight in split.ranges], (split.fingerprint, seed))


def _ends_for(split: Split, documents: Documents) -> np.ndarray | None:
    """The ends of documents where they matter, else None. Raises Error (exit 2)."""
    if documents == "joined":
        return None
    if split.document_ends is None:
        fix = "use --data.documents joined, or a dataset that classiclm prepare has written"
        raise Error("documents", f"{documents!r} needs to know where documents end, which this data does not say", fix)
    return split.document_ends


def evaluation_batches(
    split: Split, n_ctx: int, batch: int, n_windows: int | None = None, documents: Documents = "joined"
) -> Iterator[Batch]:
    """Adjoining windows of a split, in order: all of it, each token but the first predicted once (the last window may
    be shorter), or `n_windows` full windows spread evenly over it.

    Unless documents are joined, attention stays inside them, and the first token of each is not predicted. Packed
    training is measured on these windows too, so that its loss compares. Raises Error (exit 2) as `Windows`.
    """
    ends = _ends_for(split, documents)
    n = len(split.tokens) - 1
    starts = np.arange(0, n - n_ctx + 1, n_ctx)
    whole = n_windows is None or n_windows >= len(starts)
    if n_windows is not None and not whole:
        starts = starts[np.linspace(0, len(starts) - 1, n_windows).astype(np.int64)]
    for i in range(0, len(starts), batch):
        yield cut_windows(split.tokens, starts[i : i + batch], n_ctx, ends)
    rest = n % n_ctx
    if whole and rest:
        yield cut_windows(split.tokens, np.array([n - rest]), rest, ends)


def rows_of(batch: Batch, n: int) -> Iterator[Batch]:
    """The batch in parts of n sequences; the last may be smaller."""
    n_rows = len(next(iter(batch.values())))
    return ({name: tensor[i : i + n] for name, tensor in batch.items()} for i in range(0, n_rows, n))


def rows_of_rank(batch: Batch, rank: int, world: int) -> Batch:
    """The sequences of process 0 <= rank < world: neighbours, so that the ranks' in a row are the batch.

    Raises Error (exit 2) if the processes cannot have equally many.
    """
    n_rows = len(next(iter(batch.values())))
    if n_rows % world:
        fix = f"use --batch {max(1, n_rows // world) * world}, or another number of processes"
        raise Error("batch", f"{n_rows} sequences cannot be shared out equally to {world} processes", fix)
    n = n_rows // world
    return {name: tensor[rank * n : (rank + 1) * n] for name, tensor in batch.items()}
