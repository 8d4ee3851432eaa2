"""Sentence pairs for translation: tokens, and batches that hold sentences of about equal length.

The paper batches pairs "by approximate sequence length", counted in tokens (Vaswani et al. 2017, section 5.1). The
content of step t is still a pure function of (fingerprint, seed, t): sorted by length, pairs are cut into batches at
the same places in every epoch, because the sequence of lengths is the same in every epoch; only who stands where among
equally long pairs, and the order of the batches, are drawn anew.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from classiclm.data.batches import Batch, derive, shuffled
from classiclm.data.corpora import Data, SentencePairs, read_sentences
from classiclm.data.tokenizers import Tokenizer, make_tokenizer
from classiclm.errors import BAD_INPUT, USAGE, Error, did_you_mean
from classiclm.nn.mask import IGNORE
from classiclm.recipe import PairRecipe


@dataclass(frozen=True)
class Pairs:
    """The sentence pairs of one split. All sentences of a side lie end to end in one array, each with its end token."""

    source: np.ndarray  # token ids
    target: np.ndarray
    source_starts: np.ndarray  # (P + 1,) int64: sentence i is source[source_starts[i] : source_starts[i + 1]]
    target_starts: np.ndarray  # (P + 1,)
    texts: tuple[tuple[str, str], ...]  # source and target as they were, which BLEU is measured on
    n_chars: int  # of the target's texts
    n_bytes: int  # likewise, in UTF-8
    n_empty: int  # pairs that were left out because a side is empty
    fingerprint: str  # sha256 of tokens, lengths and tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> np.ndarray:
        """(2, P): tokens of each source and each target, with the end token."""
        return np.stack([np.diff(self.source_starts), np.diff(self.target_starts)])

    @property
    def n_target_tokens(self) -> int:
        """How many tokens are predicted: those of the targets, the end tokens among them."""
        return len(self.target)

    def within(self, n_ctx: int | None) -> "Pairs":
        """The pairs whose sides both have at most n_ctx tokens; None = all. Raises Error (exit 3) if there are none."""
        longer = self.lengths.max(axis=0, initial=0)
        if n_ctx is None or (longer <= n_ctx).all():
            return self
        kept = np.flatnonzero(longer <= n_ctx)
        if not len(kept):
            fix = f"raise --model.n_ctx; {longer.min()} is enough for the shortest"
            raise Error("sentence pairs", f"all have a side of more than {n_ctx} tokens", fix, BAD_INPUT)
        sides = [(self.source, self.source_starts), (self.target, self.target_starts)]
        (source, source_starts), (target, target_starts) = (_taken(*side, kept) for side in sides)
        texts = tuple(self.texts[i] for i in kept)
        text = "".join(target_text for _, target_text in texts)
        return Pairs(
            source,
            target,
            source_starts,
            target_starts,
            texts,
            len(text),
            len(text.encode()),
            self.n_empty,
            self.fingerprint,
        )

    def sources(self) -> list[list[int]]:
        """The source sentences as lists of token ids, as `translate` takes them."""
        return [part.tolist() for part in np.split(self.source, self.source_starts[1:-1])]


@dataclass(frozen=True)
class PairData:
    """A corpus of sentence pairs, tokenised: its splits by name, with `train` and `val` among them."""

    name: str
    tokenizer: Tokenizer
    splits: dict[str, Pairs]

    @property
    def train(self) -> Pairs:
        """What is learnt from."""
        return self.splits["train"]

    @property
    def val(self) -> Pairs:
        """What training is judged by."""
        return self.splits["val"]

    def split(self, name: str) -> Pairs:
        """The split by name. Raises Error (exit 2)."""
        if name not in self.splits:
            raise Error(name, "is no split", did_you_mean(name, self.splits))
        return self.splits[name]


def prepare_pairs(data: Data, tokenizer: str | Tokenizer) -> PairData:
    """Read, learn the tokenizer if it is one to be learnt (from both sides of the training split together), encode.

    Raises Error: exit 2 for a tokenizer without an end-of-text token, which ends sentences, starts them and pads them;
    otherwise as `read_pairs` does.
    """
    texts = read_sentences(data)
    if isinstance(tokenizer, str):
        sides = zip(*texts["train"].pairs, strict=True)  # all sources, all targets
        tokenizer = make_tokenizer(tokenizer, "\n".join(sentence for side in sides for sentence in side))
    if tokenizer.end_of_text is None:
        why = "has no end-of-text token, which a translator ends its sentences with"
        raise Error("tokenizer", why, "use a byte-level one, as in --tokenizer bpe-8000", USAGE)
    return PairData(data.name, tokenizer, {name: _encode(split, tokenizer) for name, split in texts.items()})


def _encode(sentences: SentencePairs, tokenizer: Tokenizer) -> Pairs:
    source, source_starts = _end_to_end([pair[0] for pair in sentences.pairs], tokenizer)
    target, target_starts = _end_to_end([pair[1] for pair in sentences.pairs], tokenizer)
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for array in (source, target, source_starts, target_starts):
        digest.update(array.tobytes())
    text = "".join(target for _, target in sentences.pairs)
    sizes = (len(text), len(text.encode()), sentences.n_empty)
    pairs = tuple(sentences.pairs)
    return Pairs(source, target, source_starts, target_starts, pairs, *sizes, digest.hexdigest())


def _end_to_end(texts: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    sentences = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in texts]
    starts = np.cumsum([0, *map(len, sentences)], dtype=np.int64)
    return np.asarray(list(itertools.chain.from_iterable(sentences)), dtype=tokenizer.dtype), starts


def _taken(tokens: np.ndarray, starts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some of the sentences that lie end to end in an array, end to end again."""
    parts = [tokens[starts[i] : starts[i + 1]] for i in which]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)], dtype=np.int64)


class PairBatches:
    """Training batches for translation: as many pairs as fill recipe.batch tokens on the longer side, with padding.

    An epoch has `n_batches` batches and each pair once, but for the `n_left_out` with a side of more than n_ctx tokens.
    A pair with more tokens than a batch should have is a batch by itself. Raises Error (exit 3) if no pair is left.
    """

    def __init__(self, split: Pairs, end: int, n_ctx: int, recipe: PairRecipe, seed: int):
        self.split, self.end = split.within(n_ctx), end
        self.order, self.lengths = _by_length(self.split)
        self.n_left_out = len(split) - len(self.order)
        self.cuts = _cuts(self.lengths, recipe.batch)
        self.n_batches = len(self.cuts) - 1
        self._key = (split.fingerprint, seed)

    def __call__(self, step: int) -> Batch:
        """The batch of optimizer step `step` (0, 1, ...): see `_batch`."""
        epoch, position = divmod(step, self.n_batches)
        key = derive("batches", *self._key, epoch)
        chosen = int(shuffled(np.array([position]), self.n_batches, key)[0])
        places = np.arange(self.cuts[chosen], self.cuts[chosen + 1])
        return _batch(self.split, self.order[self._among_equals(places, epoch)], self.end)

    def _among_equals(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Who stands at these places in this epoch: within each run of equally long pairs, a random order."""
        who = places.copy()
        for length in np.unique(self.lengths[places]):
            here = self.lengths[places] == length
            first, last = np.searchsorted(self.lengths, [length, length + 1])
            key = derive("equals", *self._key, epoch, length)
            who[here] = first + shuffled(places[here] - first, int(last - first), key)
        return who


def pair_evaluation_batches(split: Pairs, end: int, tokens: int, n_pairs: int | None = None) -> Iterator[Batch]:
    """The pairs in order of length, in batches of up to `tokens` tokens: all of them, or `n_pairs` spread evenly."""
    order, lengths = _by_length(split)
    if n_pairs is not None and n_pairs < len(order):
        chosen = np.linspace(0, len(order) - 1, n_pairs).astype(np.int64)
        order, lengths = order[chosen], lengths[chosen]
    for first, last in itertools.pairwise(_cuts(lengths, tokens)):
        yield _batch(split, order[first:last], end)


def micro_batches(batch: Batch, tokens: int) -> Iterator[Batch]:
    """A batch in parts of up to `tokens` tokens on the longer side (at least one pair), each no wider than its longest
    sentences. Together they hold the same pairs, so the sums of their losses are the sum of the whole."""
    source, target = batch["source_keep"].sum(dim=1), (batch["targets"] != IGNORE).sum(dim=1)  # (B,)
    longer = torch.maximum(source, target)
    order = longer.argsort(stable=True)
    cuts = _cuts(longer[order].numpy(), tokens)
    for first, last in itertools.pairwise(cuts):
        rows = order[first:last]
        widths = {"source": source[rows].max(), "inputs": target[rows].max()}
        widths |= {"source_keep": widths["source"], "targets": widths["inputs"]}
        yield {name: tensor[rows, : widths[name]] for name, tensor in batch.items()}


def _by_length(split: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """The pairs by the length of their longer side: their numbers and those lengths, (P,)."""
    longer = split.lengths.max(axis=0, initial=0)
    order = np.argsort(longer, kind="stable")
    return order, longer[order]


def _cuts(lengths: np.ndarray, tokens: int) -> list[int]:
    """Where to cut pairs of ascending lengths so that pairs x longest <= tokens in each part, and no part is empty."""
    cuts = [0]
    while (first := cuts[-1]) < len(lengths):
        here = lengths[first : first + max(1, tokens // int(lengths[first]))]
        fits = int((np.arange(1, len(here) + 1) * here <= tokens).sum())
        cuts.append(first + max(1, fits))
    return cuts


def _batch(split: Pairs, which: np.ndarray, end: int) -> Batch:
    """source (B, S) and source_keep (B, S), False where it is padding; inputs (B, T), the targets one place to the
    right, behind the end token; targets (B, T), IGNORE where they are padding. Padding is the end token."""
    source, keep = _rows(split.source, split.source_starts, which)
    target, inside = _rows(split.target, split.target_starts, which)
    inputs = np.full_like(target, end)
    inputs[:, 1:] = np.where(inside, target, end)[:, :-1]
    arrays = {
        "source": np.where(keep, source, end),
        "source_keep": keep,
        "inputs": inputs,
        "targets": np.where(inside, target, IGNORE),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _rows(tokens: np.ndarray, starts: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sentences as the rows of a matrix (B, W) int64, and where they are: behind its end a row holds anything."""
    first, lengths = starts[which], starts[which + 1] - starts[which]
    columns = np.arange(lengths.max())
    inside = columns < lengths[:, None]  # (B, W)
    return tokens[np.where(inside, first[:, None] + columns, 0)].astype(np.int64), inside
