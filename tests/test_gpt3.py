"""GPT-3: the table's counts, banded layers against GPT-Neo and against loops, the batch ramp and rates by tokens."""

import dataclasses
import json
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.batches import BatchSizes
from classiclm.models import gpt2
from classiclm.models.gpt3 import GPT3, PAPER_PARAMS, PRESETS, RECIPES, Config
from classiclm.nn.attention import set_attention_path
from classiclm.optim import learning_rate
from classiclm.recipe import Recipe, TokenRecipe

# Counts of tied, biased models with 2,048 positions and 50,257 tokens; Table D.1 prints them in millions.
TRUE_COUNTS = {
    "gpt3-small": 125_226_240,
    "gpt3-medium": 355_871_744,
    "gpt3-large": 760_300_032,
    "gpt3-xl": 1_315_723_264,
    "gpt3-2.7b": 2_651_553_280,
    "gpt3-6.7b": 6_658_404_352,
    "gpt3-13b": 12_853_386_240,
    "gpt3-175b": 174_604_259_328,
}
# Table 2.1: layers, d_model, heads, d_head, batch in millions of tokens, learning rate; XL and 13B set right.
TABLE = {
    "gpt3-small": (12, 768, 12, 64, 0.5, 6.0e-4),
    "gpt3-medium": (24, 1024, 16, 64, 0.5, 3.0e-4),
    "gpt3-large": (24, 1536, 16, 96, 0.5, 2.5e-4),
    "gpt3-xl": (24, 2048, 16, 128, 1, 2.0e-4),
    "gpt3-2.7b": (32, 2560, 32, 80, 1, 1.6e-4),
    "gpt3-6.7b": (32, 4096, 32, 128, 2, 1.2e-4),
    "gpt3-13b": (40, 5120, 40, 128, 2, 1.0e-4),
    "gpt3-175b": (96, 12288, 96, 128, 3.2, 0.6e-4),
}
SMALL = Config(n_layers=4, d_model=24, n_heads=3, n_ctx=20, vocab_size=31, band=5)


def with_large_weights(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def test_models_json_has_the_eight_sizes_quickly_and_without_allocating(cli):
    began = time.monotonic()
    code, out, _ = cli("models", "--json")
    assert time.monotonic() - began < 10
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert {name: rows[name]["params"] for name in TRUE_COUNTS} == TRUE_COUNTS
    for name, count in TRUE_COUNTS.items():
        millions = float(PAPER_PARAMS[name].removesuffix("M").replace(",", ""))
        assert count / 1e6 == pytest.approx(millions, rel=0.005)  # Table D.1
        assert rows[name]["n_ctx"] == 2048


@pytest.mark.parametrize("name", TABLE)
def test_the_presets_are_table_2_1(name):
    config, recipe = PRESETS[name], RECIPES[name]
    layers, d_model, heads, d_head, batch, lr = TABLE[name]
    assert (config.n_layers, config.d_model, config.n_heads, config.d_model // config.n_heads, recipe.lr) == (
        layers, d_model, heads, d_head, lr,
    )  # fmt: skip
    assert recipe.batch * 2048 / 1e6 == pytest.approx(batch, rel=0.05)
    tokens = BatchSizes(recipe, 2048).before(recipe.steps) * 2048
    assert 0 <= tokens - 300e9 < recipe.batch * 2048  # 300 G tokens, to the step


def test_layers_alternate_and_may_all_be_dense():
    from classiclm.nn.mask import Mask

    model, causal = GPT3(SMALL), Mask(causal=True)
    assert [model.layer_mask(i, causal).window for i in range(4)] == [None, 5, None, 5]
    dense = GPT3(dataclasses.replace(SMALL, band=None))
    assert [dense.layer_mask(i, causal).window for i in range(4)] == [None] * 4


@pytest.mark.parametrize("path", ["written", "fused"])
def test_banded_layers_equal_gpt_neos(path):
    """GPT-Neo alternates global and local layers; its attention is unscaled and has no biases before the output."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.GPTNeoConfig(
        vocab_size=41, max_position_embeddings=24, hidden_size=32, num_layers=4, num_heads=4, window_size=5,
        attention_types=[[["global", "local"], 2]], intermediate_size=128, activation_function="gelu_new",
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPTNeoForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and "weight" in name else 0.0, 0.2)
    ours = GPT3(Config(4, 32, 4, n_ctx=24, vocab_size=41, band=5)).eval()
    ours.load_state_dict(from_neo(theirs.transformer.state_dict(), n_layers=4, d_head=8))
    set_attention_path(ours, path)
    tokens = torch.randint(41, (3, 23))
    a, b = ours(tokens), theirs(tokens).logits
    assert b.std() >= 1
    assert ((a - b).abs().max() / b.std()).item() <= 1e-5
    dense = ours(tokens[:, :5])  # within the band there is no difference to a dense model
    torch.testing.assert_close(dense, GPT3.forward(ours, tokens)[:, :5], rtol=1e-4, atol=1e-4)


def from_neo(t, n_layers, d_head):
    ours = {"tok_emb.weight": t["wte.weight"], "pos_emb.weight": t["wpe.weight"]}
    ours |= {f"ln_f.{part}": t[f"ln_f.{part}"] for part in ("weight", "bias")}
    for i in range(n_layers):
        for ours_name, name in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj")):
            weight = t[f"h.{i}.attn.attention.{name}.weight"]
            ours[f"blocks.{i}.attn.{ours_name}.weight"] = weight * math.sqrt(d_head) if ours_name == "q" else weight
            ours[f"blocks.{i}.attn.{ours_name}.bias"] = torch.zeros(len(weight))
        for part in ("weight", "bias"):
            names = {"attn.o": "attn.attention.out_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
            ours |= {f"blocks.{i}.{a}.{part}": t[f"h.{i}.{b}.{part}"] for a, b in names.items()}
            ours |= {f"blocks.{i}.ln{n}.{part}": t[f"h.{i}.ln_{n}.{part}"] for n in (1, 2)}
    return ours


def test_a_band_as_wide_as_the_context_is_dense_and_dense_gpt3_is_gpt2():
    wide = with_large_weights(GPT3(dataclasses.replace(SMALL, band=20)))
    dense = GPT3(dataclasses.replace(SMALL, band=None)).eval()
    same = gpt2.GPT2(gpt2.Config(4, 24, 3, n_ctx=20, vocab_size=31)).eval()
    tokens = torch.randint(31, (2, 20))
    for other in (dense, same):
        other.load_state_dict(wide.state_dict())
        torch.testing.assert_close(wide(tokens), other(tokens), rtol=1e-4, atol=1e-4)
    narrow = GPT3(SMALL).eval()
    narrow.load_state_dict(wide.state_dict())
    assert not torch.allclose(narrow(tokens), wide(tokens), atol=1e-2)


@given(st.integers(1, 8), st.integers(2, 20))
@settings(max_examples=25, deadline=None)
def test_one_banded_layer_sees_neither_ahead_nor_beyond_its_band(band, length):
    """By what changes when one token changes; layer 1 alone would see `band`, so layer 0 is cut out."""
    model = with_large_weights(GPT3(dataclasses.replace(SMALL, n_layers=2, band=band)), seed=band)
    with torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.zero_()  # adds nothing to the residual stream
    tokens = torch.randint(31, (1, length))
    place = length // 3
    changed = tokens.clone()
    changed[0, place] = (changed[0, place] + 1) % 31
    moved = (model(tokens) - model(changed)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.tolist() == [place <= t < place + band for t in range(length)]


@pytest.mark.parametrize("path", ["written", "fused"])
def test_cached_reading_equals_reading_at_once(path):
    model = with_large_weights(GPT3(SMALL))
    set_attention_path(model, path)
    tokens, cache = torch.randint(31, (2, 20)), model.new_cache()
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 13), (13, 14), (14, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-4)


RAMP = TokenRecipe(batch=64, ramp_from=4, ramp_tokens=10_000, warmup_tokens=2_000, decay_tokens=50_000, lr=1.0)


def test_the_batch_grows_from_its_first_size_to_its_full_one():
    sizes = BatchSizes(RAMP, n_ctx=8)
    taken = [sizes.before(step + 1) - sizes.before(step) for step in range(200)]
    assert taken[0] == 4
    assert taken == sorted(taken)
    assert all(size % 4 == 0 for size in taken)
    assert taken[-1] == 64
    full = taken.index(64)
    assert sizes.before(full) * 8 >= 10_000 > sizes.before(full - 1) * 8  # full as soon as the ramp is over
    half = next(step for step in range(200) if sizes.before(step) * 8 >= 5_000)
    assert abs(taken[half] - 34) <= 4  # half-way between 4 and 64


@given(st.integers(0, 3000))
@settings(deadline=None)
def test_steps_for_is_the_inverse_of_before(sequences):
    sizes = BatchSizes(RAMP, n_ctx=8)
    steps = sizes.steps_for(sequences)
    assert sizes.before(steps) >= sequences
    assert steps == 0 or sizes.before(steps - 1) < sequences


def test_without_a_ramp_every_batch_is_full():
    sizes = BatchSizes(Recipe(batch=7), n_ctx=8)
    assert [sizes.before(step) for step in range(4)] == [0, 7, 14, 21]


def test_the_rate_by_tokens_warms_up_falls_to_a_tenth_and_stays():
    """GPT-3, appendix B, in small."""
    assert learning_rate(0, 500, RAMP) == pytest.approx(0.25)
    assert learning_rate(9, 2_000, RAMP) == pytest.approx(1.0)
    assert learning_rate(9, 26_000, RAMP) == pytest.approx(0.55)  # half-way down to 0.1
    assert learning_rate(9, 50_000, RAMP) == pytest.approx(0.1)
    assert learning_rate(9, 10**9, RAMP) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "bad",
    [
        {"warmup_tokens": 5},
        {"decay_tokens": 5},
        {"warmup_tokens": 9, "decay_tokens": 9},
        {"ramp_tokens": 9, "ramp_from": 65},
    ],
)
def test_recipes_that_contradict_themselves_are_refused(bad):
    with pytest.raises(ValueError, match=r"tokens|ramp_from"):
        TokenRecipe(**{"batch": 64, **bad})


def test_a_ramped_run_is_exact_when_it_is_resumed(cli, tmp_path, text_file):
    flags = "--model.n_layers 2 --model.d_model 16 --model.n_heads 2 --model.n_ctx 16 --model.band 4 --tokenizer char"
    ramp = "--batch 8 --ramp_from 2 --ramp_tokens 1500 --warmup_tokens 300 --decay_tokens 2500 --eval_windows 2"
    command = ["train", "gpt3-tiny", "--data", text_file, "--device", "cpu", *flags.split(), *ramp.split()]
    code, _, err = cli(*command, "--steps", 30, "--out", tmp_path / "whole")
    assert code == 0, err
    assert cli(*command, "--steps", 11, "--out", tmp_path / "parts")[0] == 0
    assert cli(*command, "--steps", 30, "--out", tmp_path / "parts")[0] == 0
    weights = [tmp_path / name / "checkpoints/step-00000030/model.safetensors" for name in ("whole", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    per_step = [row["tokens"] / 16 for row in rows[:1]]
    assert per_step == [2]
    assert rows[-1]["tokens"] > 1500


def test_the_lines_that_the_readme_promises():
    """Make "small" (125 M), a forward pass on random tokens, generate with temperature 0.8 and top-k 40."""
    import classiclm

    model = classiclm.GPT3.from_preset("small")
    tokens = torch.randint(50257, (1, 16))
    assert model.count_parameters() == TRUE_COUNTS["gpt3-small"]
    assert model(tokens).shape == (1, 16, 50257)
    assert model.generate(tokens, max_new_tokens=4, temperature=0.8, top_k=40).shape == (1, 20)
