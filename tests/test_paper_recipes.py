"""What the papers minimise and how: schedules, their Adams, label smoothing, BERT's two losses, by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from classiclm import registry
from classiclm.config import validate
from classiclm.errors import Error
from classiclm.models import bert, gpt1, transformer2017
from classiclm.nn.mask import Mask
from classiclm.objectives import IGNORE, MaskedLM, Translation, measure
from classiclm.optim import learning_rate, make_optimizer
from classiclm.recipe import MaskedRecipe, PairRecipe, Recipe

# Schedules


@pytest.mark.parametrize(("d_model", "warmup"), [(512, 4000), (1024, 4000), (256, 800)])
def test_noam_is_equation_3_of_the_paper(d_model, warmup):
    recipe = PairRecipe(schedule="noam", lr=1 / math.sqrt(d_model * warmup), warmup=warmup, steps=100_000)
    for step_num in (1, 2, warmup - 1, warmup, warmup + 1, 3 * warmup, 100_000):
        paper = d_model**-0.5 * min(step_num**-0.5, step_num * warmup**-1.5)
        assert learning_rate(step_num - 1, 0, recipe) == pytest.approx(paper, rel=1e-9)


def test_the_base_model_peaks_at_the_rate_that_the_paper_has():
    recipe = transformer2017.RECIPES["transformer2017-base"]
    assert max(learning_rate(step, 0, recipe) for step in range(8000)) == pytest.approx(6.99e-4, rel=1e-3)


def test_berts_rate_rises_for_10000_steps_and_falls_on_the_line_from_step_0():
    recipe = bert.RECIPES["bert-base"]
    assert learning_rate(4999, 0, recipe) == pytest.approx(0.5e-4, rel=1e-3)
    for step in (10_000, 500_000, 900_000):
        assert learning_rate(step, 0, recipe) == pytest.approx(1e-4 * (1 - step / 1_000_000))
    assert learning_rate(1_000_000, 0, recipe) == 0


def test_gpt1s_rate_warms_up_over_2000_updates_and_ends_at_nothing():
    recipe = gpt1.RECIPES["gpt1-117m"]
    assert learning_rate(2000, 0, recipe) == pytest.approx(2.5e-4)
    assert learning_rate(recipe.steps, 0, recipe) == pytest.approx(0, abs=1e-12)


# Optimizers


def by_hand(name, x, gradients, decay):
    """Two official codes in float64: google-research/bert optimization.py, openai/finetune-transformer-lm opt.py."""
    lr, b1, b2, eps = 0.01, 0.8, 0.9, 1e-6
    m = v = torch.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        if name == "adam-bert":
            x = x - lr * (m / (v.sqrt() + eps) + decay * x)
        else:
            lr_t = lr * math.sqrt(1 - b2**t) / (1 - b1**t)
            x = x - lr_t * m / (v.sqrt() + eps) - lr_t * decay * x
    return x


@pytest.mark.parametrize("name", ["adam-bert", "adam-gpt1"])
def test_the_papers_adams_are_their_official_codes(name):
    recipe = Recipe(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, optimizer=name)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    gradients = {key: [torch.randn_like(p) for _ in range(4)] for key, p in model.named_parameters()}
    optimizer = make_optimizer(model, recipe)
    for t in range(4):
        for key, p in model.named_parameters():
            p.grad = gradients[key][t].clone()
        optimizer.step()
    for key, p in model.named_parameters():
        expected = by_hand(name, start[key], gradients[key], 0.3 if key == "weight" else 0.0)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["adam-bert", "adam-gpt1"])
def test_a_parameter_without_a_gradient_stays(name):
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = make_optimizer(model, Recipe(optimizer=name))
    before = model[1].weight.detach().clone()
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before)
    assert not optimizer.state[model[1].weight]


def test_the_2017_recipe_is_plain_adam():
    recipe = transformer2017.RECIPES["transformer2017-base"]
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    mine = make_optimizer(ours, recipe)
    reference = torch.optim.Adam(theirs.parameters(), lr=recipe.lr, betas=(0.9, 0.98), eps=1e-9)
    for t in range(5):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(t))
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# Objectives

V = 11


def small_translator(dropout=0.0):
    torch.manual_seed(1)
    sizes = {"n_layers": 1, "d_model": 8, "n_heads": 2, "vocab_size": V, "dropout": dropout}
    return transformer2017.build(validate(transformer2017.Config, sizes)).double()


def small_bert(dropout=0.0):
    torch.manual_seed(1)
    sizes = {"n_layers": 1, "d_model": 8, "n_heads": 2, "n_ctx": 9, "vocab_size": V, "dropout": dropout}
    model = bert.build(validate(bert.Config, sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


def pair_batch(rows, seed):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (rows, 1), generator=g)
    targets = torch.randint(V, (rows, 6), generator=g).masked_fill(torch.arange(6) >= lengths, IGNORE)
    keep = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=g)
    source, inputs = torch.randint(V, (rows, 5), generator=g), torch.randint(V, (rows, 6), generator=g)
    return {"source": source, "source_keep": keep, "inputs": inputs, "targets": targets}


def masked_batch(rows, seed):
    g = torch.Generator().manual_seed(seed)
    keep = torch.arange(9) < torch.randint(4, 10, (rows, 1), generator=g)
    targets = torch.randint(V, (rows, 3), generator=g)
    targets[:, 1:] = targets[:, 1:].masked_fill(torch.rand(rows, 2, generator=g) < 0.5, IGNORE)
    return {
        "inputs": torch.randint(V, (rows, 9), generator=g),
        "segments": torch.randint(2, (rows, 9), generator=g),
        "keep": keep,
        "places": torch.randint(4, (rows, 3), generator=g),
        "targets": targets,
        "next": torch.randint(2, (rows,), generator=g),
    }


CASES = {"masked": (MaskedLM(), small_bert, masked_batch), "pairs": (Translation(0.1), small_translator, pair_batch)}


@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, 4), b=st.integers(1, 3), seed=st.integers(0, 999))
@pytest.mark.parametrize("kind", CASES)
def test_k_micro_batches_of_b_have_the_gradient_of_one_batch(kind, k, b, seed):
    objective, build, make = CASES[kind]
    model, batch = build(), make(k * b + 1, seed)
    counts = objective.counts(batch)

    def gradients(part):
        loss = objective(model, part).total(counts)
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)

    whole = gradients(batch)
    parts = [gradients({name: t[i : i + b] for name, t in batch.items()}) for i in range(0, k * b + 1, b)]
    for expected, *added in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(added), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_label_smoothing_gives_each_other_token_an_equal_share(smoothing):
    model, batch = small_translator(), pair_batch(5, 3)
    loss = Translation(smoothing)(model, batch).terms["loss"]

    log_p = model(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"])).log_softmax(-1).detach()
    total, n = 0.0, 0
    for row in range(5):
        for t in range(6):
            target = int(batch["targets"][row, t])
            if target == IGNORE:
                continue
            wanted = [1 - smoothing if v == target else smoothing / (V - 1) for v in range(V)]
            total -= sum(w * float(log_p[row, t, v]) for v, w in enumerate(wanted))
            n += 1
    assert float(loss.sum.detach()) == pytest.approx(total, rel=1e-6)
    assert int(loss.count) == n


def test_berts_loss_is_the_mean_over_masked_tokens_plus_the_mean_over_sequences():
    model, batch = small_bert().eval(), masked_batch(6, 5)

    with torch.no_grad():
        out = model(batch["inputs"], batch["segments"], Mask(keep=batch["keep"]))  # every position
    mlm, nsp = out.mlm.log_softmax(-1).detach(), out.nsp.log_softmax(-1).detach()
    nats = [
        -float(mlm[row, batch["places"][row, i], target])
        for row in range(6)
        for i, target in enumerate(batch["targets"][row].tolist())
        if target != IGNORE
    ]
    pairs = [-float(nsp[row, int(batch["next"][row])]) for row in range(6)]
    measured = measure(model, MaskedLM(), [batch])
    assert measured.terms["mlm"] == pytest.approx(sum(nats) / len(nats), rel=1e-6)
    assert measured.terms["nsp"] == pytest.approx(sum(pairs) / 6, rel=1e-6)
    assert measured.total == pytest.approx(measured.terms["mlm"] + measured.terms["nsp"])
    right = sum(int(out.nsp[row].argmax()) == int(batch["next"][row]) for row in range(6))
    assert measured.terms["nsp_accuracy"] == pytest.approx(right / 6)


def test_padding_changes_nothing_when_it_is_masked():
    for objective, build, make in CASES.values():
        model, batch = build(), make(4, 7)
        other = dict(batch)
        for name, keep in (("source", "source_keep"), ("inputs", "keep")):
            if keep in batch:
                other[name] = batch[name].masked_fill(~batch[keep], V - 1)
        assert measure(model, objective, [other]).total == pytest.approx(
            measure(model, objective, [batch]).total, rel=1e-12
        )


# Recipes


def test_recipes_of_the_papers_hold_the_papers_numbers():
    base = bert.RECIPES["bert-base"]
    assert (base.batch, base.first_ctx, base.first_share, base.mask_share) == (256, 128, 0.9, 0.15)
    assert (base.mask_token, base.mask_random, base.masking, base.n_sets) == (0.8, 0.1, "static", 10)
    big = transformer2017.RECIPES["transformer2017-big"]
    assert (big.steps, big.keep, big.label_smoothing, big.batch) == (300_000, 20, 0.1, 25_000)
    assert gpt1.RECIPES["gpt1-117m"].batch * 512 == 32_768


@pytest.mark.parametrize(
    ("schema", "settings_"),
    [
        (MaskedRecipe, {"mask_token": 0.8, "mask_random": 0.3}),
        (MaskedRecipe, {"mask_share": 1.5}),
        (PairRecipe, {"label_smoothing": 1.0}),
    ],
)
def test_impossible_recipes_are_refused(schema, settings_):
    with pytest.raises(Error) as caught:
        validate(schema, settings_)
    assert caught.value.code == 2


def test_each_family_has_one_kind_of_recipe():
    for module in registry.families().values():
        assert len({recipe.task for recipe in module.RECIPES.values()}) == 1
