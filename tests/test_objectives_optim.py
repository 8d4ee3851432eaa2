"""Losses as sums with counts, so that cutting a batch changes nothing; the schedule; who decays."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from classiclm import registry
from classiclm.config import validate
from classiclm.errors import Error
from classiclm.models import gpt2, ladder
from classiclm.objectives import IGNORE, CausalLM, Loss, Term, mean_loss
from classiclm.optim import block_matrices, learning_rate, make_optimizer, parameter_groups
from classiclm.recipe import Recipe

V = 7


class Tiny(nn.Module):
    """Two layers, tokens -> logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 5)
        self.out = nn.Linear(5, V)
        self.dropout = nn.Dropout(0.5)

    def forward(self, tokens):
        return self.out(self.dropout(torch.tanh(self.embedding(tokens))))


class TwoTerms:
    """All targets, and with weight 0.3 once more those at even places: two terms, each with its own count."""

    def counts(self, batch):
        known = batch["targets"] != IGNORE
        return {"all": known.sum(), "even": known[:, ::2].sum()}

    def __call__(self, model, batch):
        logits, counts = model(batch["inputs"]), self.counts(batch)
        nats = F.cross_entropy(logits.transpose(1, 2), batch["targets"], ignore_index=IGNORE, reduction="none")
        return Loss({"all": Term(nats.sum(), counts["all"]), "even": Term(nats[:, ::2].sum(), counts["even"], 0.3)})


def ragged(rows, n_ctx, seed):
    """A batch in which every row has another number of targets, one row none, and at least one place has one."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(V, (rows, n_ctx), generator=generator)
    targets = torch.randint(V, (rows, n_ctx), generator=generator)
    lengths = torch.randint(n_ctx + 1, (rows, 1), generator=generator)
    lengths[-1], lengths[0] = 0, max(1, int(lengths[0]))
    return {"inputs": inputs, "targets": targets.masked_fill(torch.arange(n_ctx) >= lengths, IGNORE)}


def model_of(seed):
    torch.manual_seed(seed)
    return Tiny().double().eval()


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def cut(batch, size):
    return [
        {name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, len(batch["inputs"]), size)
    ]


@settings(deadline=None, max_examples=60)
@given(k=st.integers(1, 5), b=st.integers(1, 4), n_ctx=st.integers(1, 6), seed=st.integers(0, 999))
@pytest.mark.parametrize("objective", [CausalLM(), TwoTerms()])
def test_k_micro_batches_of_b_have_the_gradient_of_one_batch(objective, k, b, n_ctx, seed):
    model, batch = model_of(seed), ragged(k * b + 1, n_ctx, seed)
    counts = objective.counts(batch)
    whole = gradients(model, objective(model, batch).total(counts))
    parts = [gradients(model, objective(model, micro).total(counts)) for micro in cut(batch, b)]
    for expected, *added in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(added), expected, rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 6), n_ctx=st.integers(1, 6), seed=st.integers(0, 999))
def test_the_causal_loss_is_torchs_mean_over_the_targets_that_count(rows, n_ctx, seed):
    model, batch = model_of(seed), ragged(rows, n_ctx, seed)
    loss = CausalLM()(model, batch)
    expected = F.cross_entropy(model(batch["inputs"]).flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE)
    assert loss.total(CausalLM().counts(batch)).item() == pytest.approx(expected.item(), rel=1e-5)
    known = batch["targets"][batch["targets"] != IGNORE]
    assert int(loss.terms["loss"].count) == len(known)


def test_a_uniform_model_costs_log_v_for_each_target():
    def uniform(tokens):
        return torch.zeros(*tokens.shape, V)

    batch = ragged(4, 5, seed=1)
    term = CausalLM()(uniform, batch).terms["loss"]
    assert term.sum.item() == pytest.approx(math.log(V) * int((batch["targets"] >= 0).sum()), rel=1e-6)


def test_a_target_that_is_ignored_has_no_gradient():
    model, batch = model_of(0), ragged(3, 4, seed=2)
    logits = model(batch["inputs"]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(CausalLM()(lambda _: logits, batch).terms["loss"].sum, logits)
    ignored = batch["targets"] == IGNORE
    assert ignored.any()
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored].abs().sum(dim=-1) > 0).all()


def test_terms_are_weighted_means_of_their_own_counts():
    terms = {"a": Term(torch.tensor(6.0), torch.tensor(1)), "b": Term(torch.tensor(10.0), torch.tensor(1), 0.5)}
    assert Loss(terms).total({"a": torch.tensor(3), "b": torch.tensor(5)}).item() == 6 / 3 + 0.5 * 10 / 5


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 9), seed=st.integers(0, 999))
@pytest.mark.parametrize("objective", [CausalLM(), TwoTerms()])
def test_the_mean_loss_does_not_depend_on_how_the_batches_are_cut(objective, size, seed):
    model, batch = model_of(seed), ragged(9, 5, seed)
    whole = objective(model, batch).total(objective.counts(batch)).item()
    assert mean_loss(model, objective, cut(batch, size)) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_mean_loss_is_taken_without_dropout_and_leaves_the_mode_alone(training):
    model, batch = model_of(3), ragged(4, 5, seed=3)
    expected = mean_loss(model, CausalLM(), [batch])
    model.train(training)
    assert mean_loss(model, CausalLM(), [batch]) == expected
    assert model.training is model.dropout.training is training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError):
        mean_loss(model, CausalLM(), [{"inputs": batch["inputs"]}])
    assert model.training is training


# The schedule

RECIPES = st.builds(
    Recipe,
    lr=st.floats(1e-5, 1.0),
    lr_floor=st.floats(0, 0.99),
    warmup=st.integers(0, 50),
    steps=st.integers(51, 300),
)


def expected_rate(step, r):
    """nanoGPT's get_lr, written with its own names."""
    min_lr, warmup_iters, lr_decay_iters = r.lr * r.lr_floor, r.warmup, r.steps
    if step < warmup_iters:
        return r.lr * (step + 1) / (warmup_iters + 1)
    if step > lr_decay_iters:
        return min_lr
    decay_ratio = (step - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (r.lr - min_lr)


@settings(deadline=None, max_examples=100)
@given(RECIPES)
def test_the_learning_rate_rises_linearly_then_falls_along_half_a_cosine(recipe):
    rates = [learning_rate(step, 0, recipe) for step in range(recipe.steps + 20)]
    assert rates == pytest.approx([expected_rate(step, recipe) for step in range(len(rates))], rel=1e-9, abs=1e-12)
    up, down = rates[: recipe.warmup + 1], rates[recipe.warmup :]
    assert up == sorted(up)
    assert down == sorted(down, reverse=True)
    assert 0 < rates[0] <= recipe.lr
    assert rates[recipe.warmup] == max(rates) == pytest.approx(recipe.lr)
    assert rates[recipe.steps] == pytest.approx(recipe.lr * recipe.lr_floor, abs=1e-12)


def test_the_last_update_is_as_good_as_at_the_floor():
    recipe = Recipe(lr=1.0, lr_floor=0.1, warmup=100, steps=5000)
    assert learning_rate(recipe.steps - 1, 0, recipe) == pytest.approx(0.1, abs=1e-6)
    assert learning_rate(0, 0, recipe) == pytest.approx(1 / 101)
    middle = learning_rate((recipe.warmup + recipe.steps) // 2, 0, recipe)
    assert middle == pytest.approx((1 + 0.1) / 2)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 1), (1, 1), (5, 5), (10, 5)])
def test_a_run_as_short_as_its_warm_up_still_has_a_rate(warmup, steps):
    recipe = Recipe(lr=0.5, warmup=warmup, steps=steps)
    assert all(0 < learning_rate(step, 0, recipe) <= 0.5 for step in range(steps + 1))


# Parameter groups


def tiny_gpt2(bias):
    module = registry.preset("gpt2-124m").module
    sizes = {"n_layers": 2, "d_model": 8, "n_heads": 2, "n_ctx": 4, "vocab_size": 11, "bias": bias}
    return module.build(validate(module.Config, sizes))


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_decay_and_vectors_do_not_and_every_parameter_is_in_one_group(bias):
    model = tiny_gpt2(bias)
    decaying, still = parameter_groups(model.named_parameters(), 0.1)
    assert (decaying["weight_decay"], still["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decaying["params"]} == {2}
    assert {p.ndim for p in still["params"]} == {1}
    ids = [id(p) for group in (decaying, still) for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_a_group_that_would_be_empty_is_left_out():
    named = [("gain", nn.Parameter(torch.ones(3)))]
    assert parameter_groups(named, 0.1) == [{"params": [named[0][1]], "weight_decay": 0.0}]
    assert parameter_groups([], 0.1) == []


def test_one_update_is_adamw_by_hand():
    """Loshchilov and Hutter 2019, algorithm 2, for two steps."""
    recipe = Recipe(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3)
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    start = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, recipe)
    gradient = {name: [torch.randn_like(p).double() for _ in range(2)] for name, p in model.named_parameters()}
    for t in range(2):
        for name, p in model.named_parameters():
            p.grad = gradient[name][t].float()
        optimizer.step()
    for name, parameter in model.named_parameters():
        x, m, v = start[name], 0.0, 0.0
        decay = 0.3 if name == "weight" else 0.0
        for t, g in enumerate(gradient[name], 1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
            x = x - 0.01 * (m / (1 - 0.8**t) / ((v / (1 - 0.9**t)).sqrt() + 1e-6) + decay * x)
        torch.testing.assert_close(parameter.detach().double(), x, rtol=1e-5, atol=1e-6)


# Muon


def muon_and_model(seed=0, **changes):
    """A small GPT-2 with larger weights than fresh ones, and its optimizer."""
    torch.manual_seed(seed)
    model = gpt2.GPT2(gpt2.Config(n_layers=2, d_model=16, n_heads=2, n_ctx=8, vocab_size=11))
    return model, make_optimizer(model, Recipe(**{"optimizer": "muon", "lr": 0.01, **changes}))


def learn(model, optimizer, steps, first=0):
    """Updates on the sequences of a rule, each token 3 more than the one before it; the last loss."""
    for step in range(first, first + steps):
        tokens = (torch.randint(11, (8, 1), generator=torch.Generator().manual_seed(step)) + 3 * torch.arange(9)) % 11
        batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
        loss = CausalLM()(model, batch).total(CausalLM().counts(batch))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return loss.item()


def test_muon_moves_the_matrices_of_blocks_and_adamw_all_else():
    model, optimizer = muon_and_model()
    learn(model, optimizer, 1)
    with_momentum = {name for name, p in model.named_parameters() if set(optimizer.state[p]) == {"momentum_buffer"}}
    with_moments = {name for name, p in model.named_parameters() if "exp_avg_sq" in optimizer.state[p]}
    assert with_momentum == {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    assert with_moments == {name for name, _ in model.named_parameters()} - with_momentum
    assert len(with_momentum) == 12
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {(p.ndim, decays[id(p)]) for p in model.parameters()} == {(2, 0.1), (1, 0.0)}


def test_a_first_muon_update_is_the_gradient_with_singular_values_near_one():
    """Against the SVD, and as large as AdamW's: 0.2 in the root mean square (Liu et al. 2025, section 2.2)."""
    model, optimizer = muon_and_model(lr=0.5, weight_decay=0.25)
    before = [p.detach().clone() for p in block_matrices(model)]
    learn(model, optimizer, 1)
    for start, parameter in zip(before, block_matrices(model), strict=True):
        update = (start * (1 - 0.5 * 0.25) - parameter.detach()) / 0.5
        u, sizes, vh = torch.linalg.svd(parameter.grad)
        large = int((sizes > 2e-2 * sizes[0]).sum())  # five iterations do not raise the smallest, and bf16 blurs them
        turned = (u.T @ update @ vh.T)[:large, :large] / (0.2 * math.sqrt(max(update.shape)))
        assert large > 8
        assert ((turned.diagonal() > 0.6) & (turned.diagonal() < 1.2)).all()
        assert (turned - turned.diagonal().diag()).abs().max() < 0.1
        assert 0.15 < update.square().mean().sqrt() < 0.2


def test_what_adamw_moves_is_moved_as_adamw_alone_moves_it():
    model, optimizer = muon_and_model(beta1=0.8, beta2=0.9, eps=1e-6)
    plain, theirs = muon_and_model(optimizer="adamw", beta1=0.8, beta2=0.9, eps=1e-6)
    learn(model, optimizer, 1)
    learn(plain, theirs, 1)
    matrices = {id(p) for p in block_matrices(model)}
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, other) == (id(mine) not in matrices)


def test_muon_learns_a_rule_at_least_as_fast_as_adamw():
    """Each at the best of three rates."""

    def best(name):
        return min(learn(*muon_and_model(optimizer=name, lr=lr), steps=20) for lr in (0.003, 0.01, 0.03))

    assert best("muon") <= best("adamw") < 0.5 * math.log(11)


def test_the_rate_that_the_trainer_sets_is_the_rate_of_all_groups():
    model, optimizer = muon_and_model()
    start = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    learn(model, optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


@pytest.mark.parametrize("way", ["state_dict", "by parameter"])
def test_muon_goes_on_from_its_state_to_the_same_bits(way):
    whole, optimizer = muon_and_model()
    learn(whole, optimizer, 6)
    first, optimizer = muon_and_model()
    learn(first, optimizer, 3)
    second, other = muon_and_model(seed=1)
    second.load_state_dict(first.state_dict())
    if way == "state_dict":
        other.load_state_dict(optimizer.state_dict())
    else:  # as a checkpoint does
        for old, new in zip(first.parameters(), second.parameters(), strict=True):
            other.state[new] = {name: tensor.clone() for name, tensor in optimizer.state[old].items()}
    learn(second, other, 3, first=3)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
    forgetful, fresh = muon_and_model(seed=1)
    forgetful.load_state_dict(first.state_dict())
    learn(forgetful, fresh, 3, first=3)
    assert not any(torch.equal(a, b) for a, b in zip(whole.parameters(), forgetful.parameters(), strict=True))


def test_a_loss_scale_that_overflows_skips_both_parts():
    model, optimizer = muon_and_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    learn(model, optimizer, 1)
    start = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.ones(()))
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))
    assert scaler.get_scale() == 4.0


def test_muon_without_a_block_is_an_error():
    with pytest.raises(Error) as error:
        make_optimizer(ladder.build(ladder.config_of(1)), Recipe(optimizer="muon"))
    assert error.value.code == 2
