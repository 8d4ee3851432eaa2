"""GPT-1 against Hugging Face's OpenAIGPTLMHeadModel with the same random weights (std 0.2: small errors would hide).

Distances are in units of the standard deviation of their logits, and of the norm of each gradient.
"""

import pytest
import torch

from classiclm.convert import gpt1 as family
from classiclm.models.gpt1 import DEVIATIONS, GPT1, PAPER_PARAMS, PRESETS, RECIPES, Config
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
    assert_round_trips,
    keep_of,
    load_with_transformers,
    randomise,
)

transformers = pytest.importorskip("transformers")

# (n_layers, d_model, n_heads, n_ctx, vocab_size, lengths of the sequences): odd on purpose
SIZES = [
    (1, 39, 3, 11, 29, (11, 4, 7)),
    (2, 42, 7, 17, 101, (13, 1)),
    (3, 55, 11, 9, 67, (9,)),
    (5, 50, 5, 31, 257, (30, 2, 30, 17)),
    (4, 65, 1, 23, 33, (7, 6)),
]
SMALL = Config(n_layers=2, d_model=33, n_heads=3, n_ctx=7, vocab_size=19)


def pair(n_layers, d_model, n_heads, n_ctx, vocab_size):
    """Our model and theirs with equal weights."""
    torch.manual_seed(n_layers)
    config = transformers.OpenAIGPTConfig(
        vocab_size=vocab_size, n_positions=n_ctx, n_embd=d_model, n_layer=n_layers, n_head=n_heads
    )
    theirs = randomise(transformers.OpenAIGPTLMHeadModel(config))
    ours = GPT1(family.our_config(config.to_dict())).eval()
    assert ours.config == Config(n_layers, d_model, n_heads, n_ctx=n_ctx, vocab_size=vocab_size)
    ours.load_state_dict(family.from_hf(ours.config, theirs.state_dict()))
    return ours, theirs


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_and_gradients_of_a_whole_batch_equal_those_of_transformers(size, path):
    *sizes, lengths = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    tokens = torch.randint(sizes[-1], (len(lengths), max(lengths)))
    a, b = ours(tokens), theirs(tokens).logits
    assert_equal_logits(a, b)
    upstream = torch.randn_like(b)
    a.backward(upstream)
    b.backward(upstream)
    assert_equal_gradients(family, ours, theirs)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_padding_changes_nothing_and_the_training_loss_has_their_gradients(size, side, path):
    *sizes, lengths = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    keep = keep_of(lengths, max(lengths), side)
    tokens = torch.randint(sizes[-1], keep.shape)  # padding is any token: only the mask tells it
    positions = (keep.cumsum(dim=1) - 1).clamp(min=0)
    targets = torch.full_like(tokens, IGNORE)
    both = keep[:, 1:] & keep[:, :-1]
    targets[:, :-1][both] = tokens[:, 1:][both]
    labels = torch.cat([torch.full_like(tokens[:, :1], IGNORE), targets[:, :-1]], dim=1)  # they shift them back

    def padded(tokens):
        return ours(tokens, mask=Mask(causal=True, keep=keep), positions=positions)

    out = theirs(tokens, attention_mask=keep.long(), position_ids=positions, labels=labels)
    assert_equal_logits(padded(tokens)[keep], out.logits[keep])
    batch = {"inputs": tokens, "targets": targets}
    loss = CausalLM()(padded, batch).total(CausalLM().counts(batch))
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    loss.backward()
    out.loss.backward()
    assert_equal_gradients(family, ours, theirs)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_reading_token_by_token_with_a_cache_equals_their_reading_at_once(size, path):
    *sizes, lengths = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    time = max(lengths)
    keep = keep_of(lengths, time, "left")
    tokens = torch.randint(sizes[-1], keep.shape)
    positions = (keep.cumsum(dim=1) - 1).clamp(min=0)
    cache = ours.new_cache()
    ends = [1, min(4, time), *range(5, time + 1)]
    parts = [
        ours(tokens[:, a:b], Mask(causal=True, keep=keep[:, :b]), cache, positions[:, a:b])
        for a, b in zip([0, *ends], ends, strict=False)
    ]
    expected = theirs(tokens, attention_mask=keep.long(), position_ids=positions).logits
    assert cache.length == time
    assert_equal_logits(torch.cat(parts, dim=1)[keep], expected[keep])


def test_the_map_round_trips_and_transformers_reads_it(tmp_path):
    model = randomise(GPT1(SMALL))
    assert_round_trips(family, model, tmp_path, transformers.AutoModelForCausalLM)
    theirs = load_with_transformers(family, model, tmp_path, transformers.AutoModelForCausalLM)
    tokens = torch.randint(19, (2, 7))
    assert_equal_logits(model(tokens), theirs(tokens).logits)


def test_files_may_lack_the_prefix_and_hold_buffers_and_the_tied_copy():
    buffers = ("h.0.attn.bias", "transformer.h.1.attn.bias", "position_ids")
    tied = {"lm_head.weight": "transformer.tokens_embed.weight"}
    assert_other_forms_are_read(family, GPT1(SMALL), "transformer.", buffers, tied)


def test_tensors_that_do_not_fit_are_named():
    assert_misfits_are_named(family, GPT1(SMALL))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("afn", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("tie_word_embeddings", False),
        ("model_type", "gpt2"),
        ("n_layer", 0),
        ("n_embd", "15"),
        ("n_head", True),
        ("n_positions", 7.0),
        ("resid_pdrop", 1.0),
    ],
)
def test_configs_that_this_model_cannot_follow_are_refused_by_key(key, value):
    assert_config_refused(family, family.hf_config(SMALL), key, value)


def test_absent_keys_have_the_formats_defaults_and_heads_must_divide_the_width():
    assert family.our_config({"model_type": "openai-gpt"}) == PRESETS["gpt1-117m"]
    with pytest.raises(Exception, match=r"config\.json: n_heads = 7"):
        family.our_config({**family.hf_config(SMALL), "n_head": 7})


def test_configs_that_the_format_cannot_express_are_refused_by_field():
    assert_export_refused(family, SMALL, "d_ff", d_ff=61)
    assert_export_refused(family, SMALL, "d_head", d_head=7)
    assert family.hf_config(Config(d_head=64, d_ff=3072)) == family.hf_config(Config())


def test_every_preset_has_a_recipe_and_the_deviations_are_whole():
    assert set(RECIPES) == set(PRESETS) >= set(PAPER_PARAMS)
    for deviation in DEVIATIONS:
        assert all((deviation.what, deviation.why, deviation.effect))
        assert deviation.follows in ("paper", "official code", "neither")
