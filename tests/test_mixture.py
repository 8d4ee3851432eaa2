"""A mixture's shares are exact, its order is arithmetic, and each text in it goes through epochs of its own."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.batches import Windows
from classiclm.data.mixture import SLOTS, Mixture, share_out
from classiclm.data.splits import Split
from classiclm.errors import USAGE, Error
from classiclm.recipe import Recipe


class Numbered:
    """A stream whose sequence says which stream it is of, and its number."""

    padding = 0.0

    def __init__(self, name, n_windows=7, padding=0.0):
        self.name, self.n_windows, self.padding = name, n_windows, padding

    def __call__(self, numbers):
        rows = torch.from_numpy(np.stack([np.full_like(numbers, self.name), numbers], axis=1))
        return {"inputs": rows, "targets": rows + 1}


def mixture_of(weights, key=("f", 0)):
    return Mixture([Numbered(i) for i in range(len(weights))], weights, key)


def shares_by_largest_remainder(weights, n):
    """In exact fractions: everyone the whole part of the share, the rest to the largest remainders."""
    total = sum(map(Fraction, weights))
    shares = [n * Fraction(weight) / total for weight in weights]
    slots = [int(share) for share in shares]
    by_remainder = sorted(range(len(weights)), key=lambda i: (int(shares[i]) - shares[i], i))
    for i in by_remainder[: n - sum(slots)]:
        slots[i] += 1
    return slots


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9))
def test_slots_are_shared_out_by_largest_remainders(weights):
    assert share_out(weights, SLOTS).tolist() == shares_by_largest_remainder(weights, SLOTS)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=12), st.integers(12, 50))
def test_every_weight_gets_a_slot_and_all_slots_are_given(weights, n):
    slots = share_out(weights, n)
    assert slots.sum() == n
    assert slots.min() >= 1


def test_very_large_weights_and_very_small_ones_do_not_overflow():
    assert share_out([1e308, 1e308, 1e-308], 9).tolist() == [4, 4, 1]


@pytest.mark.parametrize("weights", [[1, 0], [1, -0.1], [float("nan")], [1, float("inf")], [], [1] * 11])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(Error, match="weights") as caught:
        share_out(weights, 10)
    assert caught.value.code == USAGE


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1, 1, 1], [3], [1, 1e-9]])
def test_the_shares_of_every_repetition_are_exact(weights):
    who, _ = mixture_of(weights).where(np.arange(3 * SLOTS))
    expected = share_out(weights, SLOTS)
    for repetition in np.split(who, 3):
        assert np.array_equal(np.bincount(repetition, minlength=len(weights)), expected)


def test_shares_hold_within_a_repetition_too_as_far_as_chance_goes():
    who, _ = mixture_of([0.5, 0.3, 0.2]).where(np.arange(SLOTS))
    for part in np.split(who, 10):
        assert np.abs(np.bincount(part, minlength=3) / 1000 - [0.5, 0.3, 0.2]).max() < 4 * (0.25 / 1000) ** 0.5


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1, 1e-9], [2.0]])
def test_a_streams_sequences_come_one_after_the_other_none_left_out(weights):
    who, places = mixture_of(weights).where(np.arange(2 * SLOTS + 77))
    for stream in range(len(weights)):
        mine = places[who == stream]
        assert np.array_equal(mine, np.arange(len(mine)))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**12), st.integers(1, 40), st.integers(0, 99))
def test_where_a_sequence_comes_from_depends_on_its_number_alone(first, n, seed):
    numbers = first + np.arange(n)
    together = mixture_of([3, 2, 1], ("f", seed)).where(numbers)
    alone = [mixture_of([3, 2, 1], ("f", seed)).where(numbers[i : i + 1]) for i in (0, n - 1)]
    assert [together[0][i] for i in (0, n - 1)] == [who[0] for who, _ in alone]
    assert [together[1][i] for i in (0, n - 1)] == [place[0] for _, place in alone]


def test_repetitions_seeds_and_texts_have_orders_of_their_own():
    first, second = np.split(mixture_of([1, 1]).where(np.arange(2 * SLOTS))[0], 2)
    others = [mixture_of([1, 1], key).where(np.arange(SLOTS))[0] for key in (("f", 1), ("g", 0))]
    for other in (second, *others):
        assert 0.45 < (first == other).mean() < 0.55


def test_a_batch_has_the_sequences_in_the_order_of_their_numbers():
    mixture = mixture_of([3, 2, 1])
    numbers = np.array([SLOTS + 5, 0, 1, 2, 3, SLOTS - 1, 2 * SLOTS])
    who, places = mixture.where(numbers)
    made = mixture(numbers)
    assert made["inputs"].tolist() == np.stack([who, places], axis=1).tolist()
    assert torch.equal(made["targets"], made["inputs"] + 1)


def test_the_padding_is_that_of_the_streams_in_their_shares():
    mixture = Mixture([Numbered(0, padding=0.1), Numbered(1, padding=0.3)], [3, 1], ("f", 0))
    assert mixture.padding == pytest.approx(0.15)
    assert mixture.n_windows == 14


def test_a_mixture_of_one_range_visits_it_all():
    split = Split(np.arange(101), 101, 101, "f", None, (("a", 0, 101, 0.3),))
    windows = Windows(split, 10, Recipe(batch=9), 0)
    made = windows(0)["inputs"][:, 0].sort().values
    assert windows.n_windows == 9
    assert (made.diff() == 10).all()
