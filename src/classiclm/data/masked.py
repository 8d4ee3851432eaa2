"""BERT's exercises: two segments, some tokens masked, and the question whether b follows a (section 3.1, appendix A.1).

How a text becomes exercises ("instances") is as in the official create_pretraining_data.py: a chunk of sentences up to
the target length is cut at a random sentence into a and b; half of the time b is then replaced by sentences from
another document, and those that were b go back to begin the next instance; a pair that is too long loses tokens from
the longer segment, at either end at random. Three things differ. The shorter target length is drawn for one sequence in
ten, there for one document in ten; "another document" is always another one, there with ten tries; and an epoch has a
fixed length.

That length is what makes step -> (epoch, place in it) a division. How many instances a text gives depends on the
draws, by about one per cent; if each epoch had as many as it happens to have, resuming at step 100,000 would mean to
cut all the epochs before. So the length is the smallest of ten trial cuts; a set is cut again if it falls short (one in
eleven does), and an epoch leaves out the few instances that are too many: others in each epoch, as each has an order of
its own. What happens if an instance begins at a sentence is drawn for all sentences at once, in NumPy; then one walk
from each instance to the next finds those that are there. The masks of an instance come from random numbers that are
addressed by its set and its number (Philox, Salmon et al. 2011), so none are kept.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch

from classiclm.data.batches import Batch, derive, shuffled
from classiclm.data.sentences import Sentences
from classiclm.data.wordpiece import WordPiece
from classiclm.errors import BAD_INPUT, Error
from classiclm.nn.mask import IGNORE
from classiclm.recipe import MaskedRecipe

_SPECIAL = 3  # tokens of a sequence that are no text: [CLS] a [SEP] b [SEP]
_SHORTEST = 2  # tokens of a and b together
_TRIALS = 10  # cuts whose smallest number of instances is the length of an epoch; and how many sets are kept at hand


class MaskedBatches:
    """Training batches for BERT, as pure functions of (fingerprint of the text, seed, step). Each holds

    inputs (B, T) ids, [CLS] a [SEP] b [SEP], masked and padded;  segments (B, T) 0 or 1, the padding 0;
    keep (B, T) False at padding;  places (B, P) ascending positions to predict, then 0;  targets (B, P) the ids that
    were there, then IGNORE;  next (B,) 0 where b follows a, 1 where it is random. All int64, but keep: bool.

    T is n_ctx, or recipe.first_ctx in the first phase of training, which is recipe.first_share of the steps; each phase
    begins with an epoch of its own. P is mask_share * T, rounded up. Raises Error: exit 2 if T has no room for two
    segments or first_ctx is more than n_ctx, exit 3 for a text of one document.
    """

    def __init__(self, split: Sentences, tokenizer: WordPiece, n_ctx: int, recipe: MaskedRecipe, seed: int):
        first_ctx = recipe.first_ctx or n_ctx
        if first_ctx > n_ctx:
            raise Error("first_ctx", f"{first_ctx} is more than n_ctx = {n_ctx}", f"use --first_ctx {n_ctx} or less")
        exercises = [_Exercises(split, tokenizer, length, recipe) for length in (first_ctx, n_ctx)]
        self._phases = [_Phase(made, (split.fingerprint, seed, phase)) for phase, made in enumerate(exercises)]
        self.n_first = round(recipe.first_share * recipe.steps) if recipe.first_ctx is not None else 0
        self._batch = recipe.batch

    def __call__(self, step: int) -> Batch:
        """The batch of optimizer step `step` (0, 1, ...)."""
        phase = int(step >= self.n_first)
        begin = (step - phase * self.n_first) * self._batch
        return self._phases[phase](np.arange(begin, begin + self._batch))


def masked_evaluation_batches(
    split: Sentences,
    tokenizer: WordPiece,
    n_ctx: int,
    recipe: MaskedRecipe,
    batch: int,
    n_sequences: int | None = None,
) -> Iterator[Batch]:
    """One set of exercises on a split, the same for every seed: all of them in the text's order, or `n_sequences`
    spread evenly over it. Raises Error as MaskedBatches does."""
    exercises = _Exercises(split, tokenizer, n_ctx, recipe)
    instances = exercises.cut("evaluation", split.fingerprint)
    chosen = np.arange(instances.shape[1])
    if n_sequences is not None and n_sequences < len(chosen):
        chosen = np.linspace(0, len(chosen) - 1, n_sequences).astype(np.int64)
    parts = (chosen[i : i + batch] for i in range(0, len(chosen), batch))
    return (exercises(instances[:, part], exercises.noise(part, "evaluation", split.fingerprint)) for part in parts)


def unigram_entropy(split: Sentences) -> float:
    """The entropy of the split's tokens, in nats: the loss of a model that knows how frequent they are and no more."""
    counts = np.bincount(split.tokens)
    shares = counts[counts > 0] / len(split.tokens)
    return float(-(shares * np.log(shares)).sum())


class _Phase:
    """The sequences of one phase of training by number: 0, 1, ... through its epochs."""

    def __init__(self, exercises: "_Exercises", key: tuple[object, ...]):
        self._exercises, self._key = exercises, key
        self._sets: dict[int, tuple[np.ndarray, int]] = {}  # number of a set -> its instances, the attempt they are of
        self._n_instances = 0  # of an epoch; found when the phase is first asked for something

    def __call__(self, numbers: np.ndarray) -> Batch:
        self._n_instances = self._n_instances or min(self._cut(i, 0).shape[1] for i in range(_TRIALS))
        epochs = numbers // self._n_instances
        parts = [self._of_epoch(int(epoch), numbers[epochs == epoch]) for epoch in np.unique(epochs)]
        instances, noise = zip(*parts, strict=True)
        return self._exercises(np.concatenate(instances, axis=1), np.concatenate(noise))

    def _of_epoch(self, epoch: int, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Instances and noise of sequences that are all of one epoch."""
        recipe = self._exercises.recipe
        which = epoch % recipe.n_sets if recipe.masking == "static" else epoch
        instances, attempt = self._set(which)
        key = derive("order", *self._key, epoch)
        chosen = shuffled(numbers % self._n_instances, instances.shape[1], key)
        return instances[:, chosen], self._exercises.noise(chosen, *self._key, which, attempt)

    def _set(self, which: int) -> tuple[np.ndarray, int]:
        """A set that fills an epoch, and the attempt that made it; the last few are kept."""
        if which not in self._sets:
            cuts = ((self._cut(which, attempt), attempt) for attempt in itertools.count())
            found = next((cut, attempt) for cut, attempt in cuts if cut.shape[1] >= self._n_instances)
            if len(self._sets) == _TRIALS:
                del self._sets[next(iter(self._sets))]
            self._sets[which] = found
        return self._sets[which]

    def _cut(self, which: int, attempt: int) -> np.ndarray:
        return self._exercises.cut(*self._key, which, attempt)


class _Exercises:
    """Cuts a text into instances and makes batches of them, for one length T of the sequences."""

    def __init__(self, split: Sentences, tokenizer: WordPiece, n_ctx: int, recipe: MaskedRecipe):
        if n_ctx < _SPECIAL + _SHORTEST:
            why = f"{n_ctx} has no room for two segments and three special tokens"
            raise Error("n_ctx", why, f"use --model.n_ctx {_SPECIAL + _SHORTEST} or more")
        if len(split.document_ends) < 2:
            why = "is one document, and a segment that does not follow another comes from another document"
            raise Error("text", why, "part it with blank lines, or give more files", BAD_INPUT)
        self.split, self.tokenizer, self.n_ctx, self.recipe = split, tokenizer, n_ctx, recipe
        self.n_places = max(1, math.ceil(n_ctx * recipe.mask_share))

    def cut(self, *key: object) -> np.ndarray:
        """The instances that `key` chooses, in the order of the text, as `draw_instances` gives them."""
        rng = np.random.Generator(np.random.PCG64(derive("instances", *key, self.n_ctx)))
        return draw_instances(self.split, self.n_ctx - _SPECIAL, self.recipe.short_share, rng)

    def noise(self, numbers: np.ndarray, *key: object) -> np.ndarray:
        """(B, T + 2 P) random numbers from [0, 1): a row for each instance of the set that `key` chooses."""
        word = derive("masks", *key, self.n_ctx)
        width = self.n_ctx + 2 * self.n_places
        streams = (np.random.Philox(key=word, counter=[0, int(number), 0, 0]) for number in numbers)
        return np.stack([np.random.Generator(stream).random(width) for stream in streams])

    def __call__(self, instances: np.ndarray, noise: np.ndarray) -> Batch:
        """Instances (5, B) and noise (B, T + 2 P) -> a batch."""
        a_start, a_length, b_start, b_length, random = instances[:, :, None]  # each (B, 1)
        t = np.arange(self.n_ctx)
        b_place = a_length + 2  # behind [CLS] a [SEP]
        end = b_place + b_length  # the last [SEP]
        in_a = (t > 0) & (t <= a_length)  # (B, T)
        in_b = (t >= b_place) & (t < end)
        source = np.where(in_a, a_start + t - 1, np.where(in_b, b_start + t - b_place, 0))
        rows = np.where(in_a | in_b, self.split.tokens[source], self.tokenizer.pad).astype(np.int64)
        rows[:, 0] = self.tokenizer.cls
        rows[(t == a_length + 1) | (t == end)] = self.tokenizer.sep
        keep = t <= end
        segments = ((t >= b_place) & keep).astype(np.int64)
        inputs, places, targets = self._mask(rows, in_a | in_b, noise)
        made = {"inputs": inputs, "segments": segments, "keep": keep, "places": places, "targets": targets}
        return {name: torch.from_numpy(array) for name, array in {**made, "next": random[:, 0]}.items()}

    def _mask(self, rows: np.ndarray, text: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, ...]:
        """mask_share of a sequence's tokens, special ones counted but never chosen; (B, T) -> (B, T), (B, P), (B, P).

        Of the chosen, mask_token become [MASK], mask_random any token of the vocabulary, and the rest stay.
        """
        rank, kind, any_token = np.split(noise, [self.n_ctx, self.n_ctx + self.n_places], axis=1)
        n_text = text.sum(axis=1)
        n_chosen = np.rint((n_text + _SPECIAL) * self.recipe.mask_share).clip(1, n_text)
        used = np.arange(self.n_places) < n_chosen[:, None]  # (B, P)
        chosen = np.where(text, rank, 1.0).argsort(axis=1)[:, : self.n_places]
        places = np.where(used, np.sort(np.where(used, chosen, self.n_ctx), axis=1), 0)
        there = np.take_along_axis(rows, places, axis=1)
        replaced = np.where(used, kind, 1.0)  # at the unused ones, place 0, [CLS] stays
        other = (any_token * self.tokenizer.vocab_size).astype(np.int64)
        shown = np.where(replaced < self.recipe.mask_token + self.recipe.mask_random, other, there)
        shown = np.where(replaced < self.recipe.mask_token, self.tokenizer.mask, shown)
        inputs = rows.copy()
        np.put_along_axis(inputs, places, shown, axis=1)
        return inputs, places, np.where(used, there, IGNORE)


def draw_instances(split: Sentences, longest: int, short_share: float, rng: np.random.Generator) -> np.ndarray:
    """Cut a text once, in instances of at most `longest` tokens: (5, I) int64, in the order of the text.

    Rows: where a starts in split.tokens, its length, where b starts, its length, and 1 where b is random, else 0.
    """
    bounds = np.concatenate([[0], split.sentence_ends])  # sentence i is tokens[bounds[i] : bounds[i + 1]]
    n = len(split.sentence_ends)
    sentence = np.arange(n)
    document = np.searchsorted(split.document_ends, sentence, side="right")
    is_short = rng.random(n) < short_share
    target = np.where(is_short, rng.integers(_SHORTEST, longest + 1, n), longest)
    chunk_end = _reach(split, sentence, target, document)
    a_end = sentence + rng.integers(1, np.maximum(chunk_end - sentence, 2))  # a chunk of one sentence is all a
    is_random = (a_end == chunk_end) | (rng.random(n) < 0.5)
    first = _walk(np.where(is_random, a_end, chunk_end))
    a_end, chunk_end, is_random = a_end[first], chunk_end[first], is_random[first]
    a_start, a_length = bounds[first], bounds[a_end] - bounds[first]
    elsewhere = _sentence_elsewhere(split, document[first], rng)
    elsewhere_end = _reach(split, elsewhere, target[first] - a_length, document[elsewhere])
    b_first, b_end = np.where(is_random, elsewhere, a_end), np.where(is_random, elsewhere_end, chunk_end)
    b_start, b_length = bounds[b_first], bounds[b_end] - bounds[b_first]
    a_kept, b_kept = shortened(a_length, b_length, longest)
    a_start = a_start + rng.binomial(a_length - a_kept, 0.5)  # so many of the tokens to lose are at the front
    b_start = b_start + rng.binomial(b_length - b_kept, 0.5)
    return np.stack([a_start, a_kept, b_start, b_kept, is_random])


def shortened(a: np.ndarray, b: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """The lengths of two segments after the longer one (b, if they are equal) has lost a token, again and again, until
    both together have no more than `longest`."""
    b_kept = np.minimum(b, np.maximum(longest - a, longest // 2))
    return np.minimum(a, longest - b_kept), b_kept


def _reach(split: Sentences, first: np.ndarray, n_tokens: np.ndarray, document: np.ndarray) -> np.ndarray:
    """The end of the shortest run of whole sentences, from `first` on, that has n_tokens or ends the document; it has
    one sentence at least."""
    start = np.where(first > 0, split.sentence_ends[first - 1], 0)
    enough = np.searchsorted(split.sentence_ends, start + n_tokens) + 1
    return np.clip(enough, first + 1, split.document_ends[document])


def _sentence_elsewhere(split: Sentences, document: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each of these documents, any sentence of any other one."""
    other = rng.integers(0, len(split.document_ends) - 1, len(document))
    other += other >= document
    first = np.where(other > 0, split.document_ends[other - 1], 0)
    return first + rng.integers(0, split.document_ends[other] - first)


def _walk(following: np.ndarray) -> np.ndarray:
    """The sentences at which instances begin: from 0, always to the one that follows."""
    steps, place, visited = following.tolist(), 0, []
    while place < len(steps):
        visited.append(place)
        place = steps[place]
    return np.array(visited)
