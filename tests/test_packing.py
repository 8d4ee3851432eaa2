"""Packing: best-fit decreasing as in a textbook, and each prediction inside a document exactly once an epoch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.batches import Windows
from classiclm.data.packing import PADDING, PackedStream, best_fit, cut_pieces
from classiclm.data.splits import Split
from classiclm.errors import BAD_INPUT, Error
from classiclm.nn.mask import IGNORE
from classiclm.recipe import Recipe


def rooms_by_the_textbook(lengths, capacity):
    """What is left in each window if each piece, the longest first, goes where the least room is left."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        room = min(fits, default=capacity)
        if fits:
            rooms.remove(room)
        rooms.append(room - length)
    return sorted(rooms)


@st.composite
def pieces(draw):
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=120)), capacity


@settings(deadline=None, max_examples=400)
@given(pieces())
def test_pieces_go_where_best_fit_decreasing_puts_them(case):
    lengths, capacity = case
    windows = best_fit(np.array(lengths), capacity)
    filled = np.bincount(windows, weights=lengths).astype(int)
    assert sorted((capacity - filled).tolist()) == rooms_by_the_textbook(lengths, capacity)


def test_a_case_by_hand():
    # 7 opens a window, 5 another, one 3 fits beside the 7, the second beside the 5; 2 fills that one up.
    windows = best_fit(np.array([2, 3, 7, 3, 5]), 10).tolist()
    assert windows[1] == windows[2]
    assert windows[0] == windows[3] == windows[4]
    assert windows[1] != windows[4]


def test_many_pieces_of_web_like_lengths_leave_next_to_nothing_empty_and_the_result_is_always_the_same():
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 200_000).clip(1, 512).astype(np.int64)
    windows = best_fit(lengths, 512)
    filled = np.bincount(windows, weights=lengths)
    assert filled.max() == 512
    assert len(filled) <= 1.0001 * lengths.sum() / 512
    assert np.array_equal(windows, best_fit(lengths.copy(), 512))


def test_a_capacity_beyond_16_bits_is_no_other_case():
    assert sorted(np.bincount(best_fit(np.array([70_000, 99_999, 30_000, 1]), 100_000))) == [2, 2]


def test_documents_are_cut_into_pieces_of_n_ctx_predictions():
    # 1 token predicts nothing, 5 tokens are 4 predictions, 10 are 9 = 4 + 4 + 1, 4 are 3.
    starts, lengths = cut_pieces(np.array([0, 1, 6, 16, 20]), 4)
    assert starts.tolist() == [1, 6, 10, 14, 16]
    assert lengths.tolist() == [4, 4, 4, 1, 3]


def packed(lengths, n_ctx, seed=0, first=0, end=None):
    """A packed stream whose token at each place is the place."""
    tokens, ends = np.arange(sum(lengths)), np.cumsum(lengths)
    return PackedStream(tokens, first, len(tokens) if end is None else end, n_ctx, ("f", seed), ends)


DOCUMENTS = st.lists(st.integers(1, 30), min_size=2, max_size=25).filter(lambda lengths: max(lengths) > 1)


@settings(deadline=None, max_examples=200)
@given(lengths=DOCUMENTS, n_ctx=st.integers(1, 16), epoch=st.integers(0, 3))
def test_an_epoch_has_each_prediction_inside_a_document_once_and_padding_is_counted(lengths, n_ctx, epoch):
    stream = packed(lengths, n_ctx)
    made = stream(epoch * stream.n_windows + np.arange(stream.n_windows))
    assert {tensor.shape for tensor in made.values()} == {(stream.n_windows, n_ctx)}
    assert {tensor.dtype for tensor in made.values()} == {torch.int64}
    real = made["targets"] != IGNORE
    firsts = {0, *np.cumsum(lengths).tolist()}
    assert sorted(made["targets"][real].tolist()) == [p for p in range(sum(lengths)) if p not in firsts]
    assert torch.equal(made["inputs"][real] + 1, made["targets"][real])
    assert stream.padding == pytest.approx((~real).float().mean().item())


@settings(deadline=None, max_examples=100)
@given(lengths=DOCUMENTS, n_ctx=st.integers(1, 16))
def test_rows_say_which_document_each_place_belongs_to_and_padding_is_at_their_end(lengths, n_ctx):
    stream = packed(lengths, n_ctx)
    made = stream(np.arange(stream.n_windows))
    document = np.repeat(np.arange(len(lengths)), lengths)
    begins = np.cumsum(lengths) - lengths
    for inputs, targets, documents, positions in zip(*(made[name].tolist() for name in made), strict=True):
        n = sum(target != IGNORE for target in targets)
        assert documents[n:] == [PADDING] * (n_ctx - n)
        assert inputs[n:] == positions[n:] == [0] * (n_ctx - n)
        for t in range(n):
            goes_on = t > 0 and inputs[t] == inputs[t - 1] + 1 and document[inputs[t]] == document[inputs[t - 1]]
            assert positions[t] == (positions[t - 1] + 1 if goes_on else 0)
            assert documents[t] == (0 if t == 0 else documents[t - 1] + (not goes_on))
            # a piece begins where its document does, or a whole number of windows later
            assert goes_on or (inputs[t] - begins[document[inputs[t]]]) % n_ctx == 0


def test_the_packing_is_the_same_in_every_epoch_and_its_order_is_not():
    stream = packed([5, 9, 3, 12, 7, 2, 30, 11, 6, 8] * 9, 10)
    epochs = [stream(epoch * stream.n_windows + np.arange(stream.n_windows))["inputs"].tolist() for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert (
        packed([5, 9, 3] * 9, 10, seed=1)(np.arange(5))["inputs"].tolist()
        != packed([5, 9, 3] * 9, 10)(np.arange(5))["inputs"].tolist()
    )


def test_only_the_range_is_packed_also_where_it_begins_or_ends_inside_a_document():
    stream = packed([10, 10, 10], 8, first=5, end=23)
    made = stream(np.arange(stream.n_windows))
    targets = made["targets"][made["targets"] != IGNORE]
    assert sorted(targets.tolist()) == [*range(6, 10), *range(11, 20), *range(21, 23)]


def test_texts_without_a_prediction_are_refused():
    with pytest.raises(Error, match="two tokens") as caught:
        packed([1, 1, 1], 4)
    assert caught.value.code == BAD_INPUT


def test_the_share_of_padding_is_reported_by_the_batches():
    split = Split(np.arange(12), 12, 12, "f", np.array([6, 12]))
    windows = Windows(split, 8, Recipe(batch=2), 0, "packed")
    assert windows.padding == pytest.approx(3 / 8)  # two windows of 5 predictions
    assert Windows(split, 8, Recipe(batch=2), 0).padding == 0
