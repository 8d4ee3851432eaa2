"""Sampling: filters against brute force, the cache against the path without it, seeds, and the window past n_ctx."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.generate.sample import (
    Sampling,
    draw,
    generate,
    generate_texts,
    keep_top_k,
    keep_top_p,
    stream,
    window_start,
)
from classiclm.models import gpt3
from classiclm.models.gpt2 import GPT2, Config


def small_model(n_ctx=16, seed=0):
    """Large random weights, so that texts vary."""
    torch.manual_seed(seed)
    model = GPT2(Config(n_layers=2, d_model=24, n_heads=3, n_ctx=n_ctx, vocab_size=31)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("n_ctx", [1, 2, 5, 16])
@pytest.mark.parametrize("settings_", [{"temperature": 0}, {"temperature": 1.0, "top_k": 7, "top_p": 0.9, "seed": 3}])
def test_with_and_without_a_cache_the_tokens_are_the_same_also_past_n_ctx(n_ctx, settings_):
    model = small_model(n_ctx)
    prompt = torch.randint(31, (3, 2))
    a = generate(model, prompt, 60, use_cache=True, **settings_)
    b = generate(model, prompt, 60, use_cache=False, **settings_)
    assert a.shape == (3, 62)
    assert torch.equal(a, b)
    assert a.unique().numel() > 5


def test_past_n_ctx_each_token_follows_from_the_second_half_of_the_window():
    """The rule of the design, written as a loop over windows that are kept as lists."""
    model = small_model(n_ctx=6)
    text, window = [4, 9], [4, 9]
    for _ in range(30):
        if len(window) > 6:
            window = window[3:]
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        text.append(token)
        window.append(token)
    assert generate(model, torch.tensor([[4, 9]]), 30, temperature=0)[0].tolist() == text


@given(st.integers(1, 40), st.integers(1, 400))
def test_a_window_holds_at_least_half_of_n_ctx_and_never_more_than_all(n_ctx, length):
    seen = length - window_start(length, n_ctx)
    assert seen <= n_ctx
    assert seen >= min(length, n_ctx // 2 + 1)
    assert window_start(length + 1, n_ctx) >= window_start(length, n_ctx)
    assert window_start(length, None) == 0


def test_equal_seeds_write_equal_texts_and_others_do_not():
    model, prompt = small_model(), torch.tensor([[1, 2, 3]])
    a, b, c = (generate(model, prompt, 40, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_sampling_leaves_the_global_random_state_and_the_mode_alone():
    model = small_model().train()
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    generate(model, torch.tensor([[1]]), 5)
    assert torch.equal(torch.rand(3), expected)
    assert model.training


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(1, 15))
def test_top_k_keeps_the_k_largest(values, k):
    kept = keep_top_k(torch.tensor([values]), k)[0].isfinite()
    threshold = sorted(torch.tensor(values).tolist(), reverse=True)[min(k, len(values)) - 1]
    assert kept.tolist() == [v >= threshold for v in torch.tensor(values).tolist()]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=10, unique=True), st.floats(0.01, 1.0))
@settings(deadline=None)
def test_top_p_keeps_the_smallest_set_that_reaches_p(weights, p):
    total = sum(weights)
    logits = torch.tensor([[math.log(w / total) for w in weights]], dtype=torch.float64)
    kept = keep_top_p(logits, p)[0].isfinite().tolist()
    reached, expected = 0.0, set()
    for index in sorted(range(len(weights)), key=lambda i: -weights[i]):
        if reached >= p - 1e-9:
            break
        expected.add(index)
        reached += weights[index] / total
    got = {i for i, k in enumerate(kept) if k}
    near_tie = any(abs(sum(sorted(weights, reverse=True)[:n]) / total - p) < 1e-6 for n in range(len(weights) + 1))
    assert got == expected or near_tie


def test_draws_follow_the_tempered_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(40_000, 3)
    generator = [torch.Generator().manual_seed(0)] * 40_000
    drawn = draw(logits, Sampling(temperature=0.5), generator)
    expected = (torch.tensor([0.0, 1.0, 2.0]) / 0.5).softmax(0)
    assert torch.allclose(torch.bincount(drawn) / 40_000, expected, atol=0.01)
    assert draw(logits, Sampling(temperature=0), generator).unique().tolist() == [2]
    assert draw(logits, Sampling(temperature=5.0, top_k=1), generator).unique().tolist() == [2]
    assert draw(logits, Sampling(temperature=5.0, top_p=0.01), generator).unique().tolist() == [2]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        generate(small_model(), torch.tensor([[1]]), 3, **bad)


def banded_model():
    torch.manual_seed(9)
    model = gpt3.GPT3(gpt3.Config(3, 24, 3, n_ctx=16, vocab_size=31, band=4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=40), min_size=1, max_size=5), st.integers(0, 9))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("make", [small_model, banded_model])
def test_a_ragged_batch_writes_what_its_texts_would_one_by_one(make, prompts, seed):
    """Greedy and seeded, with a cache and without, prompts longer than n_ctx among them."""
    model = make()
    for how in ({"temperature": 0}, {"temperature": 1.0, "top_k": 9, "top_p": 0.9}):
        together = generate_texts(model, prompts, 25, seed=seed, **how)
        assert together == generate_texts(model, prompts, 25, seed=seed, use_cache=False, **how)
        for i, prompt in enumerate(prompts):
            assert generate_texts(model, [prompt], 25, seed=seed + i, **how) == [together[i]]


def test_equal_prompts_in_a_batch_draw_different_texts():
    a, b = generate_texts(small_model(), [[1, 2], [1, 2]], 30, temperature=1.0)
    assert a != b


def test_a_text_ends_behind_its_own_stop_id():
    model, prompts = small_model(), [[1], [2, 3]]
    whole = generate_texts(model, prompts, 40, temperature=1.0)
    stop = whole[0][12]
    for text, full in zip(generate_texts(model, prompts, 40, temperature=1.0, stop_ids={stop}), whole, strict=True):
        new = full[2:] if full[:2] == [2, 3] else full[1:]
        length = new.index(stop) + 1 if stop in new else 40
        assert text == full[: len(full) - 40 + length]


def test_log_probabilities_are_the_models_own():
    model, text = small_model(), [3, 5]
    for step in stream(model, [text], 8, Sampling(0.7, top_k=3), seed=1):
        expected = model(torch.tensor([text]))[0, -1].log_softmax(0)[step.tokens[0]]
        assert step.log_probabilities[0] == pytest.approx(expected.item(), abs=1e-4)
        text = [*text, step.tokens[0]]


@pytest.mark.parametrize("bad", [-1, 31, 2**31, 2**63, 1.0, True])
def test_ids_that_are_no_tokens_are_refused_before_they_reach_the_model(bad):
    with pytest.raises(ValueError, match="from 0 to 30"):
        generate_texts(small_model(), [[1, bad]], 3)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        small_model().generate(torch.zeros(1, 0, dtype=torch.long))


def test_the_model_has_generate_with_the_settings_of_the_papers():
    model, prompt = small_model(), torch.randint(31, (2, 4))
    assert model.generate(prompt, max_new_tokens=50, temperature=0.8, top_k=40).shape == (2, 54)
