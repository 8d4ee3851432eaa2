"""Batches are pure functions of the step: permutations, epochs, shifted targets, and evaluation that misses nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.batches import Windows, derive, evaluation_batches, shuffled
from classiclm.data.splits import Split
from classiclm.errors import BAD_INPUT, Error
from classiclm.recipe import Recipe


def windows_of(split, n_ctx, batch, seed):
    return Windows(split, n_ctx, Recipe(batch=batch), seed)


def split_of(n, fingerprint="f"):
    """A split whose token at each place is the place, so that a window says where it was cut."""
    return Split(np.arange(n, dtype=np.int32), n - 1, n - 1, fingerprint)


def starts(windows, steps):
    """Where the samples of these steps were cut, in order."""
    return np.concatenate([windows(step)["inputs"][:, 0].numpy() for step in steps])


# Shuffling


@settings(deadline=None, max_examples=300)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**63 - 1))
def test_shuffled_is_a_permutation(n, key):
    order = shuffled(np.arange(n), n, key)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@settings(deadline=None, max_examples=100)
@given(n=st.integers(1, 10**12), key=st.integers(0, 2**63 - 1), data=st.data())
def test_a_part_of_a_shuffle_is_that_part_of_the_whole(n, key, data):
    """Positions are looked up one by one, also where the whole would not fit in memory."""
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    there = shuffled(places, n, key)
    assert np.array_equal(there, [shuffled(np.array([place]), n, key)[0] for place in places])
    assert (there >= 0).all()
    assert (there < n).all()
    assert len(set(there)) == len(set(places))


def test_different_keys_give_different_orders():
    orders = {tuple(shuffled(np.arange(100), 100, key)) for key in range(500)}
    assert len(orders) == 500


@pytest.mark.parametrize("n", [5, 16, 37, 256])
def test_every_place_gets_every_value_about_equally_often(n):
    """Pearson's chi-squared over the table place x value; its mean is (n-1)^2 if the orders are uniform."""
    trials = 2000
    table = np.zeros((n, n))
    for trial in range(trials):
        table[np.arange(n), shuffled(np.arange(n), n, derive("trial", trial))] += 1
    expected = trials / n
    chi2 = ((table - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi2 < freedom + 8 * np.sqrt(2 * freedom) + 30


def test_neighbours_do_not_stay_neighbours():
    n, near = 1000, 0
    for trial in range(50):
        order = shuffled(np.arange(n), n, derive(trial))
        near += (np.abs(np.diff(order)) == 1).sum()
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 5 / np.sqrt(n)
    assert near < 50 * 2 * 2  # 2 expected in each, if the order is random


def test_derived_numbers_are_the_same_on_every_machine():
    # printf abc | sha256sum: ba7816bf8f01cfea...; 63 bits of it
    assert derive("abc") == 0xBA7816BF8F01CFEA >> 1
    assert derive("a", "b", 1) != derive("ab", 1)
    assert len({derive(a, b) for a in range(30) for b in range(30)}) == 900


# Training windows

SIZES = {
    "n_ctx": st.integers(1, 9),
    "extra": st.integers(0, 60),
    "batch": st.integers(1, 12),
    "seed": st.integers(0, 9),
}


@settings(deadline=None, max_examples=200)
@given(**SIZES)
def test_targets_are_the_inputs_one_later_and_lie_inside_the_text(n_ctx, extra, batch, seed):
    n = n_ctx + 1 + extra
    windows = windows_of(split_of(n), n_ctx, batch, seed)
    for step in (0, 1, 7, 10**6):
        made = windows(step)
        assert made["inputs"].shape == made["targets"].shape == (batch, n_ctx)
        assert made["inputs"].dtype == made["targets"].dtype == torch.int64
        assert torch.equal(made["targets"], made["inputs"] + 1)
        assert torch.equal(made["inputs"], made["inputs"][:, :1] + torch.arange(n_ctx))
        assert made["inputs"].min() >= 0
        assert made["targets"].max() <= n - 1


@settings(deadline=None, max_examples=200)
@given(**SIZES)
def test_each_epoch_visits_each_of_its_windows_once_across_the_edges_of_batches(n_ctx, extra, batch, seed):
    windows = windows_of(split_of(n_ctx + 1 + extra), n_ctx, batch, seed)
    per_epoch, epochs = windows.n_windows, 4
    seen = starts(windows, range(-(-epochs * per_epoch // batch)))
    for epoch in range(epochs):
        here = np.sort(seen[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert np.array_equal(np.diff(here), np.full(per_epoch - 1, n_ctx))  # adjoining: none twice, none left out
        assert here[-1] + n_ctx <= n_ctx + extra  # the last target is inside the text
    assert per_epoch >= (extra + 1) // n_ctx  # all that fit behind any offset


def test_a_batch_depends_on_its_step_alone():
    windows = windows_of(split_of(500), 8, 5, seed=3)
    forwards = [windows(step)["inputs"] for step in range(60)]
    again = windows_of(split_of(500), 8, 5, seed=3)
    for step in reversed(range(60)):
        assert torch.equal(again(step)["inputs"], forwards[step])
        assert torch.equal(windows(step)["inputs"], forwards[step])


def test_the_order_and_the_offset_change_from_epoch_to_epoch():
    windows = windows_of(split_of(1000), 10, windows_per_epoch := 99, 1)
    assert windows.n_windows == windows_per_epoch
    epochs = [starts(windows, [epoch]) for epoch in range(6)]
    assert len({tuple(epoch - epoch.min()) for epoch in epochs}) == 6
    assert len({epoch.min() for epoch in epochs}) > 1


@pytest.mark.parametrize("n", [101, 105, 109])
def test_in_the_long_run_every_token_but_the_first_is_a_target(n):
    windows = windows_of(split_of(n), 10, 1, seed=0)
    met = {int(t) for step in range(300 * windows.n_windows) for t in windows(step)["targets"].flatten()}
    assert met == set(range(1, n))


@pytest.mark.parametrize("other", [("f", 4), ("g", 3)])
def test_another_seed_or_another_text_gives_another_order(other):
    fingerprint, seed = other
    a = starts(windows_of(split_of(2000), 8, 50, 3), range(4))
    b = starts(windows_of(split_of(2000, fingerprint), 8, 50, seed), range(4))
    assert not np.array_equal(a, b)


@settings(deadline=None, max_examples=100)
@given(a=st.integers(1, 20), b=st.integers(1, 20))
def test_the_order_of_the_samples_does_not_depend_on_the_batch_size(a, b):
    n = 200
    first = starts(windows_of(split_of(300), 7, a, 1), range(-(-n // a)))[:n]
    second = starts(windows_of(split_of(300), 7, b, 1), range(-(-n // b)))[:n]
    assert np.array_equal(first, second)


def test_a_text_that_just_fills_a_window_is_enough_and_one_less_is_not():
    for n_ctx in (1, 2, 16):
        made = windows_of(split_of(n_ctx + 1), n_ctx, 3, 0)(5)
        assert made["inputs"].tolist() == [list(range(n_ctx))] * 3
        with pytest.raises(Error) as caught:
            windows_of(split_of(n_ctx), n_ctx, 3, 0)
        assert caught.value.code == BAD_INPUT
        assert f"{n_ctx} tokens" in str(caught.value)
        assert "--model.n_ctx" in str(caught.value)


# Evaluation


@settings(deadline=None, max_examples=300)
@given(n=st.integers(2, 200), n_ctx=st.integers(1, 40), batch=st.integers(1, 9))
def test_evaluation_predicts_each_token_but_the_first_once(n, n_ctx, batch):
    targets = []
    for made in evaluation_batches(split_of(n), n_ctx, batch):
        assert torch.equal(made["targets"], made["inputs"] + 1)
        assert made["inputs"].shape[0] <= batch
        assert made["inputs"].shape[1] <= n_ctx
        targets += made["targets"].flatten().tolist()
    assert targets == list(range(1, n))


@settings(deadline=None, max_examples=200)
@given(n=st.integers(2, 300), n_ctx=st.integers(1, 20), batch=st.integers(1, 9), asked=st.integers(1, 40))
def test_sampled_windows_are_full_different_evenly_spread_and_always_the_same(n, n_ctx, batch, asked):
    there = (n - 1) // n_ctx
    made = list(evaluation_batches(split_of(n), n_ctx, batch, asked))
    again = list(evaluation_batches(split_of(n), n_ctx, batch, asked))
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in zip(made, again, strict=True))
    if asked >= there:  # all of it, the short rest too
        assert sum(b["targets"].numel() for b in made) == n - 1
        return
    cut = [int(start) for b in made for start in b["inputs"][:, 0]]
    assert len(cut) == len(set(cut)) == asked
    assert cut == sorted(cut)
    assert all(start % n_ctx == 0 for start in cut)
    assert {b["inputs"].shape[1] for b in made} == {n_ctx}
    assert asked == 1 or cut[-1] == (there - 1) * n_ctx
    gaps = np.diff(cut) // n_ctx
    assert asked == 1 or gaps.max() - gaps.min() <= 1
