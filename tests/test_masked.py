"""BERT's exercises: sentences from text, pairs of segments, masks, epochs; against the official rules, written out."""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm import objectives
from classiclm.data import masked
from classiclm.data.corpora import Data
from classiclm.data.masked import (
    MaskedBatches,
    draw_instances,
    masked_evaluation_batches,
    shortened,
    unigram_entropy,
)
from classiclm.data.sentences import Sentences, prepare_sentences
from classiclm.data.wordpiece import WordPiece
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.recipe import MaskedRecipe

PAD, UNK, CLS, SEP, MASK = range(5)
FIRST = 5  # the id of the first token that is not special


def text_of(*documents):
    """A text whose token at each place is the place + FIRST, so that it says where it was; documents as lists of the
    lengths of their sentences."""
    lengths = np.array(list(itertools.chain(*documents)))
    tokens = np.arange(FIRST, FIRST + lengths.sum(), dtype=np.int32)
    return Sentences(tokens, np.cumsum(lengths), np.cumsum([len(d) for d in documents]), 0, "f")


def tokenizer_of(split, vocab_size=None):
    vocab_size = vocab_size or int(split.tokens.max()) + 1
    return SimpleNamespace(vocab_size=vocab_size, pad=PAD, unk=UNK, cls=CLS, sep=SEP, mask=MASK)


def batches_of(split, n_ctx=32, seed=0, **recipe):
    recipe = MaskedRecipe(**{"batch": 8, "steps": 1000, "masking": "dynamic", **recipe})
    return MaskedBatches(split, tokenizer_of(split), n_ctx, recipe, seed)


def evaluated(split, n_ctx=32, batch=64, n_sequences=None, **recipe):
    made = masked_evaluation_batches(split, tokenizer_of(split), n_ctx, MaskedRecipe(**recipe), batch, n_sequences)
    return joined(list(made))


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sequences(batch):
    """(a, b, next) of each sequence, the masks undone: the places of a and of b in the text."""
    found = []
    for i in range(len(batch["inputs"])):
        row, targets = batch["inputs"][i].clone(), batch["targets"][i]
        used = targets != -100
        row[batch["places"][i][used]] = targets[used]
        row = row.tolist()
        assert row[0] == CLS
        first = row.index(SEP)
        last = row.index(SEP, first + 1)
        assert row[last + 1 :] == [PAD] * (len(row) - last - 1)
        a, b = ([t - FIRST for t in part] for part in (row[1:first], row[first + 1 : last]))
        assert a == list(range(a[0], a[0] + len(a)))  # a run of the text, so no special token and nothing left out
        assert b == list(range(b[0], b[0] + len(b)))
        found.append((a, b, int(batch["next"][i])))
    return found


def in_order(found):
    """The places of the text that are in an a or in a b that follows; those of random segments are not."""
    return [place for a, b, is_random in found for place in (a if is_random else a + b)]


def document_of(split, place):
    sentence = np.searchsorted(split.sentence_ends, place, side="right")
    return int(np.searchsorted(split.document_ends, sentence, side="right"))


def near(count, n, share, sigmas=4.5):
    """Whether a count is what n draws with this share give."""
    return abs(count - n * share) <= sigmas * math.sqrt(n * share * (1 - share)) + 1e-9


ONES = text_of(*[[1] * 400] * 40)  # sentences of one token: chunks are exactly as long as they are to be
MIXED = text_of(*[[7, 3, 11, 5, 2, 9][: 1 + i % 6] for i in range(300)], [4] * 200, [60, 80, 1, 50])
LENGTHS = st.lists(st.lists(st.integers(1, 25), min_size=1, max_size=9), min_size=2, max_size=9)


# The form of a batch


@settings(deadline=None, max_examples=40)
@given(documents=LENGTHS, n_ctx=st.integers(5, 40), seed=st.integers(0, 99), share=st.sampled_from([0.0, 0.15, 1.0]))
def test_every_sequence_is_two_runs_of_the_text_with_the_right_segments_and_masks(documents, n_ctx, seed, share):
    split = text_of(*documents)
    for step in (0, 3, 10**6):
        made = batches_of(split, n_ctx, seed, mask_share=share)(step)
        assert {name: tensor.dtype for name, tensor in made.items()} == {
            **dict.fromkeys(("inputs", "segments", "places", "targets", "next"), torch.int64),
            "keep": torch.bool,
        }
        for i, (a, b, random_next) in enumerate(sequences(made)):
            n = len(a) + len(b) + 3
            assert a
            assert b
            assert n <= n_ctx
            assert made["keep"][i].tolist() == [True] * n + [False] * (n_ctx - n)
            assert made["segments"][i].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1) + [0] * (n_ctx - n)
            assert {document_of(split, place) for place in a} == {document_of(split, a[0])}
            assert {document_of(split, place) for place in b} == {document_of(split, b[0])}
            assert (document_of(split, a[0]) != document_of(split, b[0])) == random_next
            assert random_next or a[-1] < b[0]
            n_masked = min(max(1, round(n * share)), n - 3)
            places, targets = made["places"][i].tolist(), made["targets"][i].tolist()
            assert places[n_masked:] == [0] * (len(places) - n_masked)
            assert targets[n_masked:] == [-100] * (len(targets) - n_masked)
            assert -100 not in targets[:n_masked]
            assert places[:n_masked] == sorted(set(places[:n_masked]))


def test_the_widths_are_those_of_the_official_code():
    for n_ctx, n_places in ((128, 20), (512, 77), (5, 1)):
        made = batches_of(MIXED, n_ctx)(0)
        assert made["inputs"].shape == made["segments"].shape == made["keep"].shape == (8, n_ctx)
        assert made["places"].shape == made["targets"].shape == (8, n_places)
        assert made["next"].shape == (8,)
    assert objectives.IGNORE == masked.IGNORE == -100


# Masks


def masking(split, tokenizer, **recipe):
    """(what was there, what is shown) at every masked place of an epoch of full sequences, and how many tokens all
    sequences have."""
    made = joined(list(masked_evaluation_batches(split, tokenizer, 128, MaskedRecipe(**recipe), 256)))
    used = made["targets"] != -100
    return made["targets"][used].numpy(), made["inputs"].gather(1, made["places"])[used].numpy(), made["keep"].sum()


def test_a_share_of_the_tokens_is_masked_and_of_those_80_10_and_10_per_cent():
    split = text_of(*[[1] * 12_000] * 20)
    there, shown, n_tokens = masking(split, tokenizer_of(split))
    n = len(there)
    assert n_tokens >= 100_000
    assert abs(n / int(n_tokens) - 0.15) < 0.002  # but for rounding: 19 of 128
    masks, kept = (shown == MASK).sum(), (shown == there).sum()
    assert near(masks, n, 0.8)
    assert near(kept, n, 0.1)
    assert near(n - masks - kept, n, 0.1)


@pytest.mark.parametrize(("mask_token", "mask_random"), [(1.0, 0.0), (0.0, 1.0), (0.8, 0.2), (0.0, 0.0)])
def test_the_other_shares_of_table_8_are_kept_to(mask_token, mask_random):
    split = text_of(*[[1] * 20_000] * 5)
    there, shown, _ = masking(split, tokenizer_of(split), mask_token=mask_token, mask_random=mask_random)
    assert near((shown == MASK).sum(), len(there), mask_token)
    assert near((shown == there).sum(), len(there), round(1 - mask_token - mask_random, 9))


def test_random_tokens_are_any_of_the_vocabulary_with_equal_chances():
    """Special tokens and those that the text has not are among them; the one that was there may be drawn too."""
    plain = text_of(*[[1] * 30_000] * 10)
    split = Sentences(plain.tokens % 20 + FIRST, plain.sentence_ends, plain.document_ends, 0, "f")
    vocab_size = 40
    there, shown, _ = masking(split, tokenizer_of(split, vocab_size), mask_token=0.0, mask_random=1.0)
    counts = np.bincount(shown, minlength=vocab_size)
    assert len(counts) == vocab_size
    expected = len(there) / vocab_size
    assert ((counts - expected) ** 2 / expected).sum() < vocab_size + 8 * math.sqrt(2 * vocab_size)
    assert near((shown == there).sum(), len(there), 1 / vocab_size)


def test_all_places_of_a_sequence_are_masked_equally_often_and_independently_of_their_neighbours():
    made = evaluated(text_of(*[[1] * 10_000] * 4), 64, short_share=0.0)
    full = made["keep"].all(dim=1)
    chosen = torch.zeros(int(full.sum()), 64)
    chosen.scatter_(1, made["places"][full], (made["targets"][full] != -100).float())
    text = (made["inputs"][full] >= 0) & (torch.arange(64) > 0) & (torch.arange(64) < 63)
    separators = torch.tensor([len(a) + 1 for a, _, _ in sequences({k: v[full] for k, v in made.items()})])
    text[torch.arange(len(separators)), separators] = False
    assert not chosen[~text].any()
    for place in range(1, 63):
        can = int(text[:, place].sum())
        assert near(float(chosen[:, place].sum()), can, 10 / 61)  # round(64 * 0.15) of the 61
    pairs = (chosen[:, 1:] * chosen[:, :-1]).sum() / (text[:, 1:] & text[:, :-1]).sum()
    assert abs(pairs - 10 / 61 * 9 / 60) < 0.002


# Pairs


def test_a_b_that_follows_adjoins_and_about_half_of_them_do():
    made = evaluated(ONES, 32)
    found = sequences(made)
    assert all(b[0] == a[-1] + 1 for a, b, random_next in found if not random_next)
    n_random = sum(random_next for _, _, random_next in found)
    assert near(n_random, len(found), 0.5)
    one_more = text_of(*[[1] * 40] * 300)  # now and then one sentence is left at the end of a document, and is alone
    shares = [draw_instances(one_more, 29, 0.1, np.random.default_rng(i))[4] for i in range(30)]
    assert 0.505 < np.concatenate(shares).mean() < 0.65


def test_each_token_of_the_text_is_in_one_a_or_one_following_b_as_unused_sentences_go_back():
    for split, n_ctx in ((ONES, 32), (text_of([3, 5, 2] * 30, [4], [1, 1], [6] * 7), 200)):
        found = sequences(evaluated(split, n_ctx))
        assert in_order(found) == list(range(len(split.tokens)))


def test_a_random_b_begins_at_any_sentence_of_any_other_document():
    split = text_of([1] * 10, [1] * 30, [1] * 20)
    starts = {(a, b): 0 for a in range(3) for b in range(3) if a != b}
    within = np.zeros(30)
    for i in range(1200):
        cut = draw_instances(split, 8, 0.1, np.random.default_rng(i))
        for a, _, b, _, random_next in cut.T.tolist():
            if random_next:
                starts[document_of(split, a), document_of(split, b)] += 1
                within[b - 10 : b - 9] += document_of(split, b) == 1
    for a in range(3):
        first, second = (n for pair, n in starts.items() if pair[0] == a)
        assert near(first, first + second, 0.5)
    expected = within.sum() / 30
    assert ((within - expected) ** 2 / expected).sum() < 29 + 8 * math.sqrt(2 * 29)


def test_one_sequence_in_ten_aims_at_a_random_shorter_length():
    totals = []
    for i in range(40):
        cut = draw_instances(ONES, 29, 0.1, np.random.default_rng(i))
        a_start, a_length, _, b_length, random_next = cut
        inside = (random_next == 0) & (a_start % 400 < 400 - 29)  # the end of the document does not shorten these
        totals.append((a_length + b_length)[inside])
    counts = np.bincount(np.concatenate(totals), minlength=30)
    n = counts.sum()
    assert counts[:2].sum() == 0
    assert len(counts) == 30
    assert near(counts[29], n, 0.9 + 0.1 / 28)
    assert all(near(count, n, 0.1 / 28) for count in counts[2:29])
    assert set(draw_instances(ONES, 29, 0.0, np.random.default_rng(0))[3]) != {1}


def official_rules(documents, longest, short_share, rng):
    """One cut as create_pretraining_data.py describes it, sentence by sentence and token by token, but with a target
    length for each sequence and always another document: [(a, b, random)], a and b as lists of places."""
    place = itertools.count()
    documents = [[[next(place) for _ in range(n)] for n in document] for document in documents]
    made = []
    for number, document in enumerate(documents):
        i = 0
        while i < len(document):
            target = rng.randint(2, longest) if rng.random() < short_share else longest
            chunk = [document[i]]
            while sum(map(len, chunk)) < target and i + len(chunk) < len(document):
                chunk.append(document[i + len(chunk)])
            n_a = rng.randint(1, len(chunk) - 1) if len(chunk) > 1 else 1
            a = list(itertools.chain(*chunk[:n_a]))
            is_random = len(chunk) == 1 or rng.random() < 0.5
            b = [] if is_random else list(itertools.chain(*chunk[n_a:]))
            if is_random:
                other = rng.choice([d for k, d in enumerate(documents) if k != number])
                start = rng.randrange(len(other))
                for sentence in other[start:]:
                    b = b + sentence
                    if len(b) >= target - len(a):
                        break
            while len(a) + len(b) > longest:
                longer = a if len(a) > len(b) else b
                longer.pop(0 if rng.random() < 0.5 else -1)
            made.append((a, b, is_random))
            i += n_a if is_random else len(chunk)
    return made


def moments(a_start, a_length, b_start, b_length, is_random):
    """What one cut comes to, in numbers."""
    return [
        len(a_start), sum(is_random), sum(a_length), sum(b_length), sum(x * x for x in a_length),
        sum(x * y for x, y in zip(a_length, b_length, strict=True)), sum(a_start), sum(b_start),
        sum(x for x, r in zip(b_length, is_random, strict=True) if r),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "documents",
    [
        [[5, 2, 7, 1], [3], [2, 2], [9, 1, 1, 1, 6, 3], [4, 4, 4]],
        [[40, 3], [90], [2, 30, 1], [1], [25, 25, 25]],  # sentences longer than a sequence
        [[3]] * 6,
        [[1] * 60, [2] * 30],
    ],
)
def test_cuts_are_distributed_as_by_the_official_rules(documents):
    n, longest, split = 1500, 13, text_of(*documents)
    rng = random.Random(1)
    theirs, ours = [], []
    for i in range(n):
        made = official_rules(documents, longest, 0.2, rng)
        theirs.append(moments(*zip(*[(a[0], len(a), b[0], len(b), r) for a, b, r in made], strict=True)))
        ours.append(moments(*draw_instances(split, longest, 0.2, np.random.default_rng(i)).tolist()))
    x, y = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    errors = np.sqrt((x.var(axis=0) + y.var(axis=0)) / n)
    assert (np.abs(x.mean(axis=0) - y.mean(axis=0)) <= 4.5 * errors + 1e-9).all()
    assert np.allclose(np.sqrt(x.var(axis=0)), np.sqrt(y.var(axis=0)), rtol=0.12, atol=1e-9)


def test_a_pair_that_is_too_long_loses_tokens_of_the_longer_segment_one_by_one():
    for longest, a, b in itertools.product(range(2, 14), range(1, 20), range(1, 20)):
        left = [a, b]
        while sum(left) > longest:
            left[0 if left[0] > left[1] else 1] -= 1
        assert [int(n) for n in shortened(np.array(a), np.array(b), longest)] == left


def test_a_long_sentence_loses_tokens_at_both_ends_alike():
    split = text_of([200], [200])
    cuts = [draw_instances(split, 20, 0.1, np.random.default_rng(i)) for i in range(4000)]
    lost = np.concatenate([cut[0] for cut in cuts]) % 200  # 190 of 200 tokens, each at the front by the toss of a coin
    assert {tuple(cut[[1, 3]].flatten()) for cut in cuts} == {(10, 10, 10, 10)}
    assert abs(lost.mean() - 95) < 4.5 * math.sqrt(190 / 4 / len(lost))
    assert 0.9 < lost.var() / (190 / 4) < 1.1


# Steps, epochs, phases


def test_a_batch_depends_on_its_step_alone():
    made = [batches_of(MIXED)(step) for step in range(40)]
    again = batches_of(MIXED)
    for step in random.Random(0).sample(range(40), 40):
        assert same(again(step), made[step])
    assert not any(same(a, b) for a, b in itertools.combinations(made, 2))


def test_another_seed_or_another_text_gives_other_batches():
    other = Sentences(MIXED.tokens, MIXED.sentence_ends, MIXED.document_ends, 0, "g")
    assert same(batches_of(MIXED, seed=1)(5), batches_of(MIXED, seed=1)(5))
    assert not same(batches_of(MIXED, seed=1)(5), batches_of(MIXED, seed=2)(5))
    assert not same(batches_of(MIXED, seed=1)(5), batches_of(other, seed=1)(5))


@pytest.mark.parametrize("masking", ["static", "dynamic"])
def test_small_batches_are_parts_of_large_ones(masking):
    small, large = (batches_of(MIXED, batch=batch, masking=masking, n_sets=2) for batch in (7, 21))
    for step in (0, 11, 300):
        assert same(joined([small(3 * step + i) for i in range(3)]), large(step))


def test_a_far_step_costs_no_more_cuts_than_a_near_one(monkeypatch):
    calls = []
    monkeypatch.setattr(masked, "draw_instances", lambda *a: calls.append(1) or draw_instances(*a))
    batches = batches_of(MIXED, batch=4, steps=10**6)
    assert not calls  # nothing is cut before it is needed
    batches(100_000)
    assert len(calls) <= 10 + 8
    before = len(calls)
    batches(100_000)
    assert len(calls) == before


def epochs_of(batches, n_epochs):
    """The batch of all sequences of each epoch."""
    n = length_of_epoch(batches)
    made = joined([batches(step) for step in range(-(-n * n_epochs // 8))])
    return [{name: tensor[i * n : (i + 1) * n] for name, tensor in made.items()} for i in range(n_epochs)]


def rows_of(batch):
    return [tuple(row) for row in batch["inputs"].tolist()]


def length_of_epoch(batches):
    batches(0)
    return batches._phases[-1]._n_instances


SMALL = text_of(*[[3, 2, 4, 1, 2, 3, 2]] * 50)


@pytest.mark.parametrize("masking", ["static", "dynamic"])
def test_an_epoch_has_nearly_all_instances_of_its_set_each_once(masking):
    batches = batches_of(SMALL, 16, seed=2, masking=masking)
    n = length_of_epoch(batches)
    sizes = [draw_instances(SMALL, 13, 0.1, np.random.default_rng(i)).shape[1] for i in range(200)]
    assert min(sizes) <= n <= np.median(sizes)  # the smallest of ten
    for rows in epochs_of(batches, 30):  # with this seed, four of these sets fall short at first
        # two instances of a set never begin with the same sentence, and one of 16 loses little at the front
        found = [(a[0], b[0], len(a), len(b)) for a, b, _ in sequences(rows)]
        assert len(set(found)) == n
        following = in_order(sequences(rows))
        assert len(set(following)) == len(following)  # no sentence twice
        assert len(following) > 0.7 * len(SMALL.tokens)


def test_an_epoch_is_as_long_as_the_shortest_of_ten_cuts():
    sizes = np.array([draw_instances(SMALL, 13, 0.1, np.random.default_rng(i)).shape[1] for i in range(2000)])
    epochs = [length_of_epoch(batches_of(SMALL, 16, seed)) for seed in range(60)]
    shortest = sizes.reshape(-1, 10).min(axis=1)
    assert abs(np.mean(epochs) - shortest.mean()) < 4.5 * shortest.std() * math.sqrt(1 / 60 + 1 / 200)


def test_static_sets_come_again_after_n_sets_epochs_in_another_order():
    n_sets = 3
    epochs = [rows_of(epoch) for epoch in epochs_of(batches_of(SMALL, 16, masking="static", n_sets=n_sets), 3 * n_sets)]
    n = len(epochs[0])
    for epoch in range(2 * n_sets):
        first, later = epochs[epoch], epochs[epoch + n_sets]
        assert len(set(first) & set(later)) > 0.8 * n
        assert first != later
        assert len(set(first) & set(epochs[epoch + 1])) < 0.2 * n
    for i in range(n_sets):
        assert n <= len(set().union(*epochs[i::n_sets])) < 1.25 * n  # what one epoch leaves out, another has


def test_dynamic_sets_never_come_again():
    epochs = [rows_of(epoch) for epoch in epochs_of(batches_of(SMALL, 16, masking="dynamic", n_sets=3), 8)]
    for a, b in itertools.combinations(epochs, 2):
        assert len(set(a) & set(b)) < 0.2 * len(a)


def test_sets_with_equal_cuts_have_masks_of_their_own():
    batches = batches_of(text_of([20], [20]), 64, batch=2, mask_share=0.5)  # one sentence each: no other cut there is
    pairs, masks = set(), set()
    for step in range(20):
        made = batches(step)
        pairs |= {(a[0], b[0]) for a, b, _ in sequences(made)}
        masks |= {tuple(places) for places in made["places"].tolist()}
    assert pairs == {(0, 20), (20, 0)}
    assert len(masks) == 40


def test_static_and_dynamic_masking_begin_with_the_same_sets():
    static, dynamic = (batches_of(MIXED, masking=masking, n_sets=4) for masking in ("static", "dynamic"))
    n = length_of_epoch(static)
    assert n == length_of_epoch(dynamic)
    fourth = 4 * n // 8 + 1
    assert all(same(static(step), dynamic(step)) for step in (0, fourth - 2))
    assert not same(static(fourth), dynamic(fourth))


def test_the_first_phase_has_shorter_sequences_until_its_share_of_the_steps_is_over():
    batches = batches_of(MIXED, 64, first_ctx=16, first_share=0.9, steps=25)  # round(22.5) = 22
    widths = [batches(step)["inputs"].shape[1] for step in range(25)]
    assert widths == [16] * 22 + [64] * 3
    assert batches(21)["places"].shape[1] == 3
    assert batches(22)["places"].shape[1] == 10
    half = batches_of(MIXED, 64, first_ctx=16, first_share=0.5, steps=25)  # round(12.5) = 12
    assert all(same(batches(step), half(step)) == (step < 12) for step in range(25))
    assert all(same(batches(22 + step), half(12 + step)) for step in range(3))
    assert {batches_of(MIXED, 64, steps=25)(step)["inputs"].shape[1] for step in (0, 24)} == {64}


def test_phases_of_equal_length_differ():
    batches = batches_of(MIXED, 16, first_ctx=16, first_share=0.5, steps=20)
    assert not same(batches(0), batches(10))


# Evaluation


def test_evaluation_goes_once_through_a_fixed_set_in_the_order_of_the_text():
    whole = evaluated(MIXED, batch=50)
    assert same(whole, evaluated(MIXED, batch=7))
    assert same(whole, evaluated(MIXED, batch=10**6, masking="dynamic", n_sets=1))
    assert same(whole, evaluated(MIXED, n_sequences=10**6))
    begins = [a[0] for a, _, _ in sequences(whole)]
    assert begins == sorted(set(begins))


@pytest.mark.parametrize("asked", [1, 2, 17, 100])
def test_sampled_sequences_are_spread_evenly_over_that_set(asked):
    whole, part = evaluated(MIXED), evaluated(MIXED, n_sequences=asked, batch=9)
    rows = [tuple(row) for row in whole["inputs"].tolist()]
    numbers = [rows.index(tuple(row)) for row in part["inputs"].tolist()]
    assert len(numbers) == len(set(numbers)) == asked
    assert numbers == sorted(numbers)
    gaps = np.diff(numbers)
    assert asked == 1 or (numbers[-1] == len(rows) - 1 and gaps.max() - gaps.min() <= 1)
    assert same(part, {name: tensor[numbers] for name, tensor in whole.items()})


# Refusals


@pytest.mark.parametrize("make", [batches_of, evaluated])
def test_a_text_of_one_document_is_refused(make):
    with pytest.raises(Error, match="one document") as caught:
        make(text_of([5, 5, 5]), 16)
    assert caught.value.code == BAD_INPUT
    assert "blank lines" in str(caught.value)


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(Error, match="no room") as caught:
        batches_of(MIXED, 4)
    assert caught.value.code == USAGE
    with pytest.raises(Error, match="33 is more than n_ctx = 32") as caught:
        batches_of(MIXED, 32, first_ctx=33)
    assert caught.value.code == USAGE
    with pytest.raises(Error, match="no room"):
        batches_of(MIXED, 32, first_ctx=4)


# Sentences from text


VERSES = "the cat sat on the mat\nthe dog sat on the log\n\nthe rat ran\n"


def prepared(folder, *texts, tokenizer="wordpiece-64", **data):
    folder.mkdir(exist_ok=True)
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_bytes(text.encode())
    return prepare_sentences(Data(f"{folder}/", **data), tokenizer)


def lines_of(split, tokenizer):
    """The documents of a split as lists of decoded lines."""
    sentences = np.split(split.tokens, split.sentence_ends[:-1])
    lines = [tokenizer.decode(sentence.tolist()) for sentence in sentences]
    starts = [0, *split.document_ends.tolist()]
    return [lines[a:b] for a, b in itertools.pairwise(starts)]


def test_documents_are_blocks_of_lines_or_whole_files_and_sentences_are_lines(tmp_path):
    text = "\n\n  the cat sat \n\n \t \nthe dog\r\nthe rat ran\r\n\r\nthe mat\n"
    data = prepared(tmp_path / "a", text, "a log\na mat", "on\n\nthe log", "the end\n", val_share=0.3)
    got = lines_of(data.train, data.tokenizer) + lines_of(data.val, data.tokenizer)
    expected = [["the cat sat"], ["the dog", "the rat ran"], ["the mat"], ["a log", "a mat"], ["on"], ["the log"]]
    assert [[line.replace(" ##", "") for line in document] for document in got] == [*expected, ["the end"]]
    assert data.train.n_bytes + data.val.n_bytes == sum(len(line) for d in [*expected, ["the end"]] for line in d)


def test_the_last_whole_documents_with_about_val_share_of_the_characters_are_for_validation(tmp_path):
    text = "\n\n".join(f"line {i:03d}\nand one more" for i in range(100))
    data = prepared(tmp_path / "a", text, val_share=0.13)
    assert (len(data.train.document_ends), len(data.val.document_ends)) == (87, 13)
    assert data.split("val") is data.val
    assert data.split("train") is data.train
    with pytest.raises(Error) as caught:
        data.split("test")
    assert caught.value.code == USAGE
    long_end = prepared(tmp_path / "b", "a b\n\nc d\n\ne f\n\n" + "g h " * 500, val_share=0.01)
    assert len(long_end.val.document_ends) == 2  # two at the least, or no b could be random


def test_the_tokenizer_is_learnt_from_the_training_part_only(tmp_path):
    data = prepared(
        tmp_path / "a", "aa bb\n\nbb aa\n\nab ba\n\nqq zz\n\nzz qq", val_share=0.4, tokenizer="wordpiece-40"
    )
    assert len(data.train.document_ends) == 3
    assert set(data.val.tokens.tolist()) == {data.tokenizer.unk}
    assert not set(data.train.tokens.tolist()) & {data.tokenizer.unk}


def test_sentences_without_a_piece_vanish_and_so_do_documents_without_a_sentence(tmp_path):
    nothing = "\u200b"  # a format character: WordPiece's cleaning removes it
    tokenizer = WordPiece.train(VERSES, 64)
    text = "-\n\nthe cat\n-\nthe mat\n\n-\n-\n\nthe dog\n\nthe rat\n\nthe log\n\n-".replace("-", nothing)
    data = prepared(tmp_path / "a", text, tokenizer=tokenizer, val_share=0.35)
    assert lines_of(data.train, tokenizer) + lines_of(data.val, tokenizer) == [
        ["the cat", "the mat"], ["the dog"], ["the rat"], ["the log"],
    ]  # fmt: skip
    assert data.train.n_bytes + data.val.n_bytes == 5 * 7


def test_the_fingerprint_changes_with_tokens_sentences_documents_and_tokenizer(tmp_path):
    base = "the cat sat\nthe dog\n\nthe mat\n\n"
    rest = "the rat\n\nthe log"
    texts = [
        base,
        base.replace("dog", "rat"),
        base.replace("cat sat\nthe", "cat\nsat the"),
        base.replace("dog\n\n", "dog\n"),
    ]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set(VERSES.split()))]
    tokenizers = [WordPiece.from_vocabulary(vocabulary) for vocabulary in (pieces, [*pieces, "more"])]
    assert all(t.encode("sat the") == t.encode("sat") + t.encode("the") for t in tokenizers)  # equal tokens
    found = [
        prepared(tmp_path / f"{i}-{k}", text + "on the log\n\n" + rest, tokenizer=tokenizer, val_share=0.3).train
        for i, text in enumerate(texts)
        for k, tokenizer in enumerate(tokenizers)
    ]
    assert len({split.fingerprint for split in found}) == len(found)
    again = prepared(tmp_path / "again", texts[0] + "on the log\n\n" + rest, tokenizer=tokenizers[0], val_share=0.3)
    assert again.train.fingerprint == found[0].fingerprint


@pytest.mark.parametrize("texts", [["one block\nof lines"], ["a", "b", "c"], ["", "\n\n"], ["\u200b\n\n" * 9]])
def test_a_corpus_with_less_than_two_documents_in_each_part_is_refused(tmp_path, texts):
    with pytest.raises(Error, match="give more text") as caught:
        prepared(tmp_path / "a", *texts, tokenizer=WordPiece.train(VERSES, 64))
    assert caught.value.code == BAD_INPUT


@pytest.mark.parametrize("name", ["char", "bpe-300"])
def test_a_tokenizer_without_mask_tokens_is_refused(tmp_path, name):
    with pytest.raises(Error, match=r"\[MASK\].*use wordpiece-2048 or bert") as caught:
        prepared(tmp_path / "a", VERSES, VERSES, tokenizer=name)
    assert caught.value.code == USAGE


def test_text_goes_through_to_batches_that_hold_its_lines(tmp_path):
    data = prepared(tmp_path / "a", *[VERSES] * 9, val_share=0.2)
    tokenizer, recipe = data.tokenizer, MaskedRecipe(batch=4, mask_token=0.0, mask_random=0.0)  # nothing is hidden
    made = MaskedBatches(data.train, tokenizer, 64, recipe, 0)(0)
    lines = {"".join(line.split()) for line in VERSES.splitlines()}
    for row in made["inputs"].tolist():
        assert row[0] == tokenizer.cls
        text = tokenizer.decode(row[1:]).replace(" ##", "").replace(" ", "").replace("[PAD]", "")
        a, b, rest = text.split("[SEP]")
        assert rest == ""
        assert all(any(line in part for line in lines) for part in (a, b))


def test_unigram_entropy_is_that_of_the_frequencies():
    def entropy(tokens):
        return unigram_entropy(Sentences(np.array(tokens, dtype=np.uint16), np.array([1]), np.array([1]), 0, ""))

    assert entropy([3, 900, 3, 17, 3, 900, 17, 3]) == pytest.approx(1.5 * math.log(2))  # 1/2, 1/4, 1/4
    assert entropy(list(range(32))) == pytest.approx(math.log(32))
    assert entropy([7, 7]) == 0
