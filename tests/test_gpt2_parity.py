"""GPT-2 against Hugging Face's GPT2LMHeadModel with the same random weights.

The weights are large (std 0.2, so logits of std 1 and more): near the usual start, small errors hide.
"""

import dataclasses
import json

import pytest
import torch

from classiclm.convert import gpt2 as family
from classiclm.convert import gpt3 as gpt3_family
from classiclm.models import gpt3
from classiclm.models.gpt2 import DEVIATIONS, GPT2, PAPER_PARAMS, PRESETS, RECIPES, Config
from classiclm.nn.attention import set_attention_path
from classiclm.nn.mask import Mask
from classiclm.objectives import IGNORE, CausalLM
from parity import (
    assert_config_refused,
    assert_equal_gradients,
    assert_equal_logits,
    assert_export_refused,
    assert_misfits_are_named,
    assert_other_forms_are_read,
    assert_refused,
    assert_round_trips,
    assert_same,
    keep_of,
    load_with_transformers,
    randomise,
)

transformers = pytest.importorskip("transformers")

# (n_layers, d_model, n_heads, n_ctx, vocab_size, batch, time): odd on purpose
SIZES = [
    (1, 39, 3, 11, 29, 3, 11),
    (2, 42, 7, 17, 101, 2, 13),
    (3, 55, 11, 9, 67, 1, 9),
    (5, 50, 5, 31, 257, 4, 30),
    (4, 64, 1, 23, 33, 2, 7),
]
SMALL = Config(n_layers=2, d_model=33, n_heads=3, d_ff=23, n_ctx=7, vocab_size=19)
DENSE = gpt3.Config(n_layers=3, d_model=33, n_heads=3, n_ctx=7, vocab_size=19, band=None)
MODELS = {"gpt2": (family, GPT2(SMALL)), "gpt3": (gpt3_family, gpt3.GPT3(DENSE))}


def pair(n_layers, d_model, n_heads, n_ctx, vocab_size):
    """Our model and theirs with equal weights."""
    torch.manual_seed(n_layers)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=n_ctx, n_embd=d_model, n_layer=n_layers, n_head=n_heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = randomise(transformers.GPT2LMHeadModel(config))
    ours = GPT2(family.our_config(config.to_dict())).eval()
    assert ours.config == Config(n_layers, d_model, n_heads, n_ctx=n_ctx, vocab_size=vocab_size)
    ours.load_state_dict(family.from_hf(ours.config, theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_and_gradients_equal_those_of_transformers(size, path):
    *sizes, batch, time = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    tokens = torch.randint(sizes[-1], (batch, time))
    a, b = ours(tokens), theirs(tokens).logits
    assert_equal_logits(a, b)
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    assert_equal_gradients(family, ours, theirs)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padding_on_the_left_and_the_cache_give_their_logits_and_loss(size, path):
    *sizes, batch, time = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    keep = keep_of([time, 3, time - 2, 5][:batch], time, "left")
    tokens = torch.randint(sizes[-1], keep.shape)  # padding is any token: only the mask tells it
    positions = (keep.cumsum(dim=1) - 1).clamp(min=0)
    targets = tokens[:, 1:].masked_fill(~keep[:, :-1], IGNORE)
    labels = torch.cat([torch.full_like(tokens[:, :1], IGNORE), targets], dim=1)  # they shift them back
    out = theirs(tokens, attention_mask=keep.long(), position_ids=positions, labels=labels)

    def padded(tokens):
        n = tokens.shape[1]
        return ours(tokens, mask=Mask(causal=True, keep=keep[:, :n]), positions=positions[:, :n])

    assert_equal_logits(padded(tokens)[keep], out.logits[keep])
    examples = {"inputs": tokens[:, :-1], "targets": targets}
    loss = CausalLM()(padded, examples).total(CausalLM().counts(examples))
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    cache, parts = ours.new_cache(), []
    with torch.no_grad():
        for t in range(time):
            mask = Mask(causal=True, keep=keep[:, : t + 1])
            parts.append(ours(tokens[:, t : t + 1], mask, cache, positions[:, t : t + 1]))
    assert_equal_logits(torch.cat(parts, dim=1)[keep], out.logits[keep])


def test_greedy_text_equals_that_of_transformers():
    ours, theirs = pair(3, 32, 4, 40, 61)
    prompt = torch.randint(61, (2, 5))
    expected = theirs.generate(prompt, max_new_tokens=35, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(ours.generate(prompt, max_new_tokens=35, temperature=0), expected)


@pytest.mark.parametrize("model", MODELS)
def test_the_maps_round_trip_and_transformers_reads_them(model, tmp_path):
    map_of, model = MODELS[model]
    randomise(model)
    assert_round_trips(map_of, model, tmp_path, transformers.AutoModelForCausalLM)
    theirs = load_with_transformers(map_of, model, tmp_path, transformers.AutoModelForCausalLM)
    tokens = torch.randint(19, (2, 7))
    assert_equal_logits(model(tokens), theirs(tokens).logits)


def test_a_model_without_biases_gets_zeros_and_comes_back_without(tmp_path):
    config = dataclasses.replace(SMALL, bias=False)
    model = randomise(GPT2(config))
    theirs = load_with_transformers(family, model, tmp_path, transformers.AutoModelForCausalLM)
    tokens = torch.randint(19, (2, 7))
    assert_equal_logits(model(tokens), theirs(tokens).logits)
    tensors = family.to_hf(config, model.state_dict())
    assert_same(family.from_hf(config, tensors), model.state_dict())
    filled = family.from_hf(SMALL, tensors)
    assert not any(filled[name].any() for name in filled.keys() - model.state_dict().keys())
    tensors["transformer.h.1.mlp.c_fc.bias"][3] = 0.1
    assert_refused("blocks.1.mlp.up.bias", lambda: family.from_hf(config, tensors))


def test_files_may_lack_the_prefix_and_hold_buffers_and_the_tied_copy():
    buffers = ("h.0.attn.bias", "transformer.h.1.attn.masked_bias")
    tied = {"lm_head.weight": "transformer.wte.weight"}
    assert_other_forms_are_read(family, GPT2(SMALL), "transformer.", buffers, tied)


def test_tensors_that_do_not_fit_are_named():
    assert_misfits_are_named(family, GPT2(SMALL))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("model_type", "openai-gpt"),
        ("n_layer", None),
        ("n_inner", 0),
    ],
)
@pytest.mark.parametrize("map_of", [family, gpt3_family])
def test_configs_that_these_models_cannot_follow_are_refused_by_key(map_of, key, value):
    assert_config_refused(map_of, family.hf_config(SMALL), key, value)


def test_absent_keys_have_the_formats_defaults():
    assert family.our_config({}) == dataclasses.replace(PRESETS["gpt2-124m"], dropout=0.1)


def test_configs_that_the_format_cannot_express_are_refused_by_field():
    assert_export_refused(family, SMALL, "d_head", d_head=7)
    assert_export_refused(gpt3_family, DENSE, "d_head", d_head=7)
    assert_export_refused(gpt3_family, DENSE, "band", band=5)


# openai/gpt-2's README, nanoGPT's count, and papers' headlines.
TRUE_COUNTS = {
    "gpt2-124m": (124_439_808, "117M"),
    "gpt2-355m": (354_823_168, "345M"),
    "gpt2-774m": (774_030_080, "762M"),
    "gpt2-1558m": (1_557_611_200, "1542M"),
}


def test_models_json_has_the_true_counts_beside_the_papers(cli):
    code, out, _ = cli("models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    for name, (params, paper) in TRUE_COUNTS.items():
        assert (rows[name]["params"], rows[name]["paper_params"]) == (params, paper)
        assert rows[name]["family"] == "gpt2"
    assert rows["gpt2-shakespeare"]["params"] == 10_745_088  # nanoGPT prints 10.65M without positions


@pytest.mark.parametrize(("name", "headline"), [(name, paper) for name, (_, paper) in TRUE_COUNTS.items()])
def test_the_papers_counts_come_from_gpt1s_vocabulary(name, headline):
    """Erratum: with 40,478 tokens in place of 50,257 the count is the headline."""
    config = PRESETS[name]
    with torch.device("meta"):
        model = GPT2(Config(config.n_layers, config.d_model, config.n_heads, vocab_size=40_478))
    assert f"{round(model.count_parameters() / 1e6)}M" == headline


def test_every_preset_has_a_recipe_and_the_deviations_are_whole():
    assert set(RECIPES) == set(PRESETS) >= set(PAPER_PARAMS)
    for deviation in DEVIATIONS:
        assert all((deviation.what, deviation.why, deviation.effect))
        assert deviation.follows in ("paper", "official code", "neither")


def test_from_preset_takes_the_name_with_or_without_the_family():
    a = GPT2.from_preset("gpt2-shakespeare-cpu")
    b = GPT2.from_preset("shakespeare-cpu", n_layers=2)
    assert (len(a.blocks), len(b.blocks)) == (4, 2)
    with pytest.raises(Exception, match="did you mean 'gpt2-124m'"):
        GPT2.from_preset("gpt2-125m")
