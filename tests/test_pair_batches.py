"""Batches of sentence pairs: functions of the step, their shapes and padding, and their parts."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.pairs import PairBatches, Pairs, micro_batches, pair_evaluation_batches
from classiclm.errors import BAD_INPUT, Error
from classiclm.models.transformer2017 import Config, Transformer2017
from classiclm.nn.mask import IGNORE, Mask
from classiclm.recipe import PairRecipe

END = 0
LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=60)


def pairs_of(lengths, fingerprint="f"):
    """Pairs of the given lengths with the end token. Every token but the end is another number: 1, 2, 3, ..."""
    starts = [np.cumsum([0, *side]) for side in zip(*lengths, strict=True)]
    arrays = []
    for first, place in zip((1, 1 + int(starts[0][-1])), starts, strict=True):
        tokens = np.arange(first, first + place[-1])
        tokens[place[1:] - 1] = END
        arrays.append(tokens)
    return Pairs(*arrays, *starts, tuple(("a", "b") for _ in lengths), 0, 0, 0, fingerprint)


def sides_of(pairs):
    """The pairs as lists, for looking them up."""
    cut = [
        np.split(tokens, starts[1:-1])
        for tokens, starts in [(pairs.source, pairs.source_starts), (pairs.target, pairs.target_starts)]
    ]
    return [(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(*cut, strict=True)]


def pairs_in(batch):
    """The pairs of a batch, read off its source and its targets."""
    return [
        (tuple(source[keep].tolist()), tuple(target[target != IGNORE].tolist()))
        for source, keep, target in zip(batch["source"], batch["source_keep"], batch["targets"], strict=True)
    ]


def batches_of(pairs, n_ctx=12, tokens=40, seed=0):
    return PairBatches(pairs, END, n_ctx, PairRecipe(batch=tokens), seed)


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60), n_ctx=st.integers(4, 12), seed=st.integers(0, 5))
def test_every_epoch_has_each_pair_that_fits_once(lengths, tokens, n_ctx, seed):
    pairs = pairs_of(lengths)
    fit = sorted(pair for pair in sides_of(pairs) if max(map(len, pair)) <= n_ctx)
    if not fit:
        with pytest.raises(Error) as caught:
            batches_of(pairs, n_ctx)
        assert caught.value.code == BAD_INPUT
        assert f"--model.n_ctx; {min(max(pair) for pair in lengths)} is enough" in str(caught.value)
        return
    batches = batches_of(pairs, n_ctx, tokens, seed)
    assert batches.n_left_out == len(lengths) - len(fit)
    for epoch in range(3):
        made = [batches(epoch * batches.n_batches + i) for i in range(batches.n_batches)]
        assert sorted(pair for batch in made for pair in pairs_in(batch)) == fit
        for batch in made:
            rows = len(batch["source"])
            assert rows == 1 or max(batch["source"].numel(), batch["inputs"].numel()) <= tokens


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_inputs_are_the_targets_one_later_behind_the_end_token_and_padding_is_masked(lengths, tokens):
    for batch in pair_evaluation_batches(pairs_of(lengths), END, tokens):
        kinds = {name: tensor.dtype for name, tensor in batch.items()}
        assert kinds == {
            "source": torch.int64,
            "source_keep": torch.bool,
            "inputs": torch.int64,
            "targets": torch.int64,
        }
        assert batch["source"].shape == batch["source_keep"].shape
        assert batch["inputs"].shape == batch["targets"].shape
        assert (batch["inputs"][:, 0] == END).all()
        behind = batch["targets"] == IGNORE
        expected = batch["targets"].masked_fill(behind, END)[:, :-1]
        assert torch.equal(batch["inputs"][:, 1:], expected)
        assert (batch["source"][~batch["source_keep"]] == END).all()
        assert not behind.all(0).any()  # no column is padding in every row
        assert batch["source_keep"].any(0).all()
        for side in (behind, ~batch["source_keep"]):
            assert torch.equal(side, side.long().cumsum(1) > 0)  # padding is at the end of the row


def test_a_batch_depends_on_its_step_alone():
    rng = np.random.default_rng(0)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 12, (200, 2)).tolist()])
    batches = batches_of(pairs)
    forwards = [batches(step) for step in range(3 * batches.n_batches)]
    again = batches_of(pairs)
    for step in reversed(range(3 * batches.n_batches)):
        for made in (again(step), batches(step)):
            assert all(torch.equal(made[name], forwards[step][name]) for name in made)


@pytest.mark.parametrize("other", [{"seed": 1}, {"fingerprint": "g"}])
def test_another_seed_or_other_data_gives_another_order(other):
    lengths = [(5, 5)] * 100
    a = batches_of(pairs_of(lengths))
    b = batches_of(pairs_of(lengths, other.get("fingerprint", "f")), seed=other.get("seed", 0))
    assert pairs_in(a(0)) != pairs_in(b(0))


def test_in_every_epoch_batches_come_in_another_order_and_equal_pairs_meet_others():
    rng = np.random.default_rng(1)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 9, (300, 2)).tolist()])
    batches = batches_of(pairs)
    epochs = [[batches(epoch * batches.n_batches + i) for i in range(batches.n_batches)] for epoch in range(5)]
    widths = [[batch["source"].shape[1] for batch in epoch] for epoch in epochs]
    assert len({tuple(row) for row in widths}) == 5
    assert all(row != sorted(row) for row in widths)
    met = [{frozenset(pairs_in(batch)) for batch in epoch} for epoch in epochs]
    assert all(len(a & b) < batches.n_batches / 2 for i, a in enumerate(met) for b in met[:i])
    sizes = [sorted(len(batch["source"]) for batch in epoch) for epoch in epochs]
    assert all(row == sizes[0] for row in sizes)  # cut at the same places


def test_pairs_in_a_batch_are_about_equally_long():
    rng = np.random.default_rng(2)
    lengths = [(int(n), int(n)) for n in rng.integers(1, 101, 3000)]
    batches = batches_of(pairs_of(lengths), n_ctx=100, tokens=2000)
    made = [batches(i) for i in range(batches.n_batches)]
    padding = sum(int((batch["targets"] == IGNORE).sum()) for batch in made)
    assert padding < 0.05 * sum(batch["targets"].numel() for batch in made)
    assert batches.n_batches < 1.1 * sum(n for n, _ in lengths) / 2000


def test_a_pair_that_is_longer_than_a_batch_is_one_by_itself():
    batches = batches_of(pairs_of([(3, 3), (11, 2), (2, 12), (3, 3)]), tokens=6)
    made = sorted(len(pairs_in(batches(i))) for i in range(batches.n_batches))
    assert made == [1, 1, 2]


# Evaluation


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60), n_ctx=st.sampled_from([None, 6, 12]))
def test_evaluation_has_all_pairs_once_by_length(lengths, tokens, n_ctx):
    pairs = pairs_of(lengths)
    fit = sorted(pair for pair in sides_of(pairs) if max(map(len, pair)) <= (n_ctx or 12))
    if not fit:
        with pytest.raises(Error):
            pairs.within(n_ctx)
        return
    kept = pairs.within(n_ctx)
    made = list(pair_evaluation_batches(kept, END, tokens))
    seen = [pair for batch in made for pair in pairs_in(batch)]
    assert sorted(seen) == fit
    assert (len(kept), kept.n_target_tokens) == (len(fit), sum(len(target) for _, target in fit))
    keys = [max(map(len, pair)) for pair in seen]
    assert keys == sorted(keys)
    for batch in made:
        assert len(batch["source"]) == 1 or max(batch["source"].numel(), batch["inputs"].numel()) <= tokens


@pytest.mark.parametrize("tokens", [1, 40, 1000])
def test_some_pairs_of_the_evaluation_are_spread_evenly_and_the_same_whatever_the_batch(tokens):
    rng = np.random.default_rng(4)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 12, (200, 2)).tolist()])

    def seen(tokens, n_pairs=None):
        return [pair for batch in pair_evaluation_batches(pairs, END, tokens, n_pairs) for pair in pairs_in(batch)]

    whole, some = seen(1000), seen(tokens, 7)
    assert sorted(some) == sorted(whole[i] for i in np.linspace(0, 199, 7).astype(int))
    assert sorted(seen(tokens, 500)) == sorted(whole)


# Parts of a batch


def nats(model, batch):
    """The sum of -log p over the targets."""
    logits = model(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"]))
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")


def small_translator():
    torch.manual_seed(0)
    model = Transformer2017(Config(2, 24, 3, vocab_size=700, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("tokens", [1, 13, 30, 64, 1000])
def test_the_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(tokens):
    model = small_translator()
    rng = np.random.default_rng(5)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 12, (40, 2)).tolist()])
    batch = batches_of(pairs, tokens=150)(3)
    assert len(batch["source"]) > 10
    parts = list(micro_batches(batch, tokens))
    assert (len(parts) == 1) == (tokens == 1000)
    whole = nats(model, batch)
    whole.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sums = [nats(model, part) for part in parts]
    torch.stack(sums).sum().backward()
    assert float(torch.stack(sums).sum().detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4 * float(gradient.abs().max() + 1))


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_pairs_one_by_one_without_any_padding():
    model = small_translator()
    pairs = pairs_of([(3, 9), (9, 3), (1, 1), (5, 7)])
    (batch,) = pair_evaluation_batches(pairs, END, 1000)
    alone = 0.0
    for source, target in sides_of(pairs):
        log_p = model(torch.tensor([source]), torch.tensor([[END, *target[:-1]]]))[0].log_softmax(-1)
        alone -= float(log_p[range(len(target)), list(target)].sum())
    assert float(nats(model, batch)) == pytest.approx(alone, rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_parts_hold_the_same_pairs_in_no_more_tokens_and_no_useless_columns(lengths, tokens):
    for batch in pair_evaluation_batches(pairs_of(lengths), END, 100):
        parts = list(micro_batches(batch, tokens))
        assert sorted(pair for part in parts for pair in pairs_in(part)) == sorted(pairs_in(batch))
        for part in parts:
            rows, widths = len(part["source"]), [part[name].shape[1] for name in ("source", "inputs")]
            assert set(part) == set(batch)
            assert rows == 1 or rows * max(widths) <= tokens
            longest = [max(map(len, side)) for side in zip(*pairs_in(part), strict=True)]
            assert widths == longest
