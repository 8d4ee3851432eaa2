"""The Transformer of 2017 against Hugging Face's MarianMTModel and torch's own layers with the same random weights.

Marian's post-LN form is the paper's model, but for the order of the residual dimensions. Weights have a std of 0.2:
small errors would hide. Distances are in units of the standard deviation of their logits, and of each gradient's norm.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn

from classiclm.convert import transformer2017 as family
from classiclm.models.transformer2017 import DEVIATIONS, PAPER_PARAMS, PRESETS, RECIPES, Config, Transformer2017
from classiclm.nn.attention import set_attention_path
from classiclm.nn.blocks import PostLNBlock, PostLNDecoderBlock
from classiclm.nn.embedding import sinusoids
from classiclm.nn.mask import Mask
from classiclm.nn.mlp import MLP
from classiclm.objectives import IGNORE, Translation
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

# (n_layers, d_model, n_heads, d_ff, n_ctx, vocab_size, lengths of the sources, of the targets): odd on purpose
SIZES = [
    (1, 39, 3, 53, 13, 29, (11, 4, 7), (9, 13, 1)),
    (2, 42, 7, 168, 17, 101, (13, 1), (3, 17)),
    (3, 55, 11, 35, 9, 67, (9,), (5,)),
    (5, 50, 5, 201, 31, 257, (30, 2, 30, 17), (11, 31, 2, 7)),
    (4, 65, 1, 99, 23, 33, (7, 6), (19, 20)),
]
SMALL = Config(n_layers=2, d_model=33, n_heads=3, d_ff=23, n_ctx=7, vocab_size=19, ln_eps=1e-5)
IDS = {"decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def pair(n_layers, d_model, n_heads, d_ff, n_ctx, vocab_size):
    """Our model and theirs with equal weights."""
    torch.manual_seed(n_layers)
    config = transformers.MarianConfig(
        vocab_size=vocab_size, d_model=d_model, encoder_layers=n_layers, decoder_layers=n_layers,
        encoder_attention_heads=n_heads, decoder_attention_heads=n_heads, encoder_ffn_dim=d_ff, decoder_ffn_dim=d_ff,
        max_position_embeddings=n_ctx, activation_function="relu", scale_embedding=True, normalize_before=False,
        pad_token_id=None, decoder_start_token_id=0,
    )  # fmt: skip
    theirs = randomise(transformers.MarianMTModel(config))
    # The table of sinusoids counts as a parameter of theirs, though a frozen one: make it again.
    for side in (theirs.model.encoder, theirs.model.decoder):
        side.embed_positions.weight.data = side.embed_positions.create_weight()
    ours = Transformer2017(family.our_config(config.to_dict())).eval()
    sizes = {"d_ff": None if d_ff == 4 * d_model else d_ff, "n_ctx": n_ctx, "vocab_size": vocab_size}
    assert ours.config == Config(n_layers, d_model, n_heads, ln_eps=1e-5, **sizes)
    ours.load_state_dict(family.from_hf(ours.config, theirs.state_dict()))
    return ours, theirs


def sentence_pairs(vocab_size, source_lengths, target_lengths, side):
    """A batch as the trainer sees it; padding is any token, only the masks tell it."""
    source_keep = keep_of(source_lengths, max(source_lengths), side)
    target_keep = keep_of(target_lengths, max(target_lengths), "right")
    targets = torch.randint(vocab_size, target_keep.shape).masked_fill(~target_keep, IGNORE)
    return {
        "source": torch.randint(vocab_size, source_keep.shape),
        "source_keep": source_keep,
        "inputs": torch.randint(vocab_size, target_keep.shape),
        "targets": targets,
    }


def pairs_off_the_kink(ours, *arguments):
    """The first batch for which no unit's input comes within 5e-6 of 0, where rounding decides on ReLU's derivative."""
    inputs = []
    hooks = [m.up.register_forward_hook(lambda m, a, out: inputs.append(out.abs().min())) for m in mlps(ours)]
    while not inputs or min(inputs) < 5e-6:
        inputs.clear()
        batch = sentence_pairs(*arguments)
        with torch.no_grad():
            ours(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"]))
    for hook in hooks:
        hook.remove()
    return batch


def mlps(model):
    return [module for module in model.modules() if isinstance(module, MLP)]


def ask_theirs(model, batch, **settings):
    mask = batch["source_keep"].long()
    return model(batch["source"], attention_mask=mask, decoder_input_ids=batch["inputs"], **settings)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_and_the_gradients_of_the_training_loss_equal_those_of_transformers(size, side, path):
    *sizes, sources, targets = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    batch = pairs_off_the_kink(ours, sizes[-1], sources, targets, side)
    out = ask_theirs(theirs, batch, labels=batch["targets"])
    assert_equal_logits(ours(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"])), out.logits)
    objective = Translation()
    loss = objective(ours, batch).total(objective.counts(batch))
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    loss.backward()
    out.loss.backward()
    # In a deep random decoder all positions grow alike, so its last attentions have little gradient but rounding.
    assert_equal_gradients(family, ours, theirs, floor=0.2)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_in_float64_those_gradients_that_are_nearly_0_are_theirs_too(size, path):
    *sizes, sources, targets = size
    ours, theirs = (model.double() for model in pair(*sizes))
    set_attention_path(ours, path)
    batch = pairs_off_the_kink(ours, sizes[-1], sources, targets, "left")
    nats = nn.CrossEntropyLoss(ignore_index=IGNORE)
    for model, logits in (
        (ours, ours(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"]))),
        (theirs, ask_theirs(theirs, batch).logits),
    ):
        assert logits.dtype == torch.float64
        nats(logits.flatten(0, 1), batch["targets"].flatten()).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert_equal_gradients(family, ours, theirs, floor=1e-6)


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_without_a_mask_all_of_the_source_is_seen(size):
    *sizes, sources, targets = size
    ours, theirs = pair(*sizes)
    source, target = (torch.randint(sizes[-1], (3, max(lengths))) for lengths in (sources, targets))
    assert_equal_logits(ours(source, target), theirs(source, decoder_input_ids=target).logits)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_writing_token_by_token_with_both_caches_equals_theirs_with_theirs(size, side, path):
    *sizes, sources, targets = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    batch = sentence_pairs(sizes[-1], sources, targets, side)
    at_once = ask_theirs(theirs, batch).logits
    mask = Mask(keep=batch["source_keep"])
    memory = ours.encode(batch["source"], mask)
    cache = ours.new_cache(max(targets), max(sources))
    encoded = theirs.get_encoder()(batch["source"], attention_mask=batch["source_keep"].long())
    past = None
    for t in range(max(targets)):
        token = batch["inputs"][:, t : t + 1]
        logits = ours.decode(token, memory, mask, cache)
        out = theirs(
            encoder_outputs=encoded, attention_mask=batch["source_keep"].long(), decoder_input_ids=token,
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        past = out.past_key_values
        spread = at_once.std()
        assert ((logits - out.logits).abs().max() / spread).item() <= 1e-5
        assert ((logits[:, 0] - at_once[:, t]).abs().max() / spread).item() <= 1e-5
    assert cache.length == max(targets)
    assert cache.memory.length == max(sources)


@torch.no_grad()
def test_several_tokens_at_a_time_through_the_caches_equal_all_at_once():
    ours, theirs = pair(*SIZES[3][:-2])
    batch = sentence_pairs(257, *SIZES[3][-2:], "left")
    mask = Mask(keep=batch["source_keep"])
    memory, cache = ours.encode(batch["source"], mask), ours.new_cache(31, 30)
    parts = [ours.decode(batch["inputs"][:, a:b], memory, mask, cache) for a, b in ((0, 5), (5, 6), (6, 31))]
    assert_equal_logits(torch.cat(parts, dim=1), ask_theirs(theirs, batch).logits)


def attention_pairs(ours, theirs):
    """Their attention with q, k and v in one matrix, as modules with our names."""
    for i, name in enumerate("qkv"):
        for part in ("weight", "bias"):
            yield getattr(getattr(ours, name), part), getattr(theirs, f"in_proj_{part}").chunk(3)[i]
    yield from zip(ours.o.parameters(), theirs.out_proj.parameters(), strict=True)


def copy_layer(ours, theirs):
    """Give our block the weights of torch's layer."""
    pairs = [*attention_pairs(ours.attn, theirs.self_attn)]
    if isinstance(ours, PostLNDecoderBlock):
        pairs += attention_pairs(ours.cross, theirs.multihead_attn)
    norms = [name for name in ("1", "2", "3") if hasattr(ours, f"ln{name}")]
    modules = [(ours.mlp.up, theirs.linear1), (ours.mlp.down, theirs.linear2)]
    modules += [(getattr(ours, f"ln{n}"), getattr(theirs, f"norm{n}")) for n in norms]
    for a, b in modules:
        pairs += zip(a.parameters(), b.parameters(), strict=True)
    assert len(pairs) == len(list(ours.parameters()))
    with torch.no_grad():
        for a, b in pairs:
            a.copy_(b)


def torch_layer(kind, d_model, n_heads, d_ff, act):
    torch.manual_seed(d_model)
    layer = kind(d_model, n_heads, d_ff, 0.0, act, layer_norm_eps=1e-6, batch_first=True, norm_first=False)
    return randomise(layer).train()  # torch's fast path for evaluation has its own arithmetic


LAYERS = [(15, 3, 37), (44, 11, 16), (21, 1, 84)]


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize(("d_model", "n_heads", "d_ff"), LAYERS)
def test_an_encoder_block_equals_torchs_encoder_layer(d_model, n_heads, d_ff, act, path):
    theirs = torch_layer(nn.TransformerEncoderLayer, d_model, n_heads, d_ff, act)
    ours = PostLNBlock(d_model, n_heads, d_ff=d_ff, act=act, ln_eps=1e-6)
    copy_layer(ours, theirs)
    set_attention_path(ours, path)
    x = torch.randn(3, 9, d_model, requires_grad=True)
    keep = keep_of((9, 1, 5), 9, "left")
    a, b = ours(x, mask=Mask(keep=keep)), theirs(x, src_key_padding_mask=~keep)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(b)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (a, b)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize(("d_model", "n_heads", "d_ff"), LAYERS)
def test_a_decoder_block_equals_torchs_decoder_layer(d_model, n_heads, d_ff, path):
    theirs = torch_layer(nn.TransformerDecoderLayer, d_model, n_heads, d_ff, "relu")
    ours = PostLNDecoderBlock(d_model, n_heads, d_ff=d_ff, act="relu", ln_eps=1e-6)
    copy_layer(ours, theirs)
    set_attention_path(ours, path)
    x = torch.randn(3, 7, d_model, requires_grad=True)
    memory = torch.randn(3, 9, d_model, requires_grad=True)
    keep = keep_of((9, 1, 5), 9, "right")
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    a = ours(x, memory, Mask(causal=True), Mask(keep=keep))
    b = theirs(x, memory, tgt_mask=future, memory_key_padding_mask=~keep)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(b)
    ours_to, theirs_to = (torch.autograd.grad(y, (x, memory), upstream) for y in (a, b))
    torch.testing.assert_close(ours_to, theirs_to, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("start", "length", "d_model"), [(0, 300, 16), (0, 7, 7), (251, 9, 512), (3, 1, 1)])
def test_sinusoids_are_the_formula_of_section_3_5(start, length, d_model):
    table = sinusoids(start, length, d_model, torch.device("cpu"))
    assert table.shape == (length, d_model)
    for row in range(length):
        for dimension in range(d_model):
            angle = (start + row) / 10_000 ** (2 * (dimension // 2) / d_model)
            expected = math.cos(angle) if dimension % 2 else math.sin(angle)
            assert abs(table[row, dimension].item() - expected) <= 2e-5


def test_the_map_round_trips_and_transformers_reads_it(tmp_path):
    model = randomise(Transformer2017(SMALL))
    assert_round_trips(family, model, tmp_path, transformers.AutoModelForSeq2SeqLM, **IDS)
    theirs = load_with_transformers(family, model, tmp_path, transformers.AutoModelForSeq2SeqLM, **IDS)
    source, target = torch.randint(19, (2, 7)), torch.randint(19, (2, 5))
    assert_equal_logits(model(source, target), theirs(source, decoder_input_ids=target).logits)


def test_files_may_lack_the_prefix_and_hold_buffers_and_tied_copies():
    buffers = ("encoder.embed_positions.weight", "model.decoder.embed_positions.weight")
    copies = ("lm_head.weight", "model.encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tied = dict.fromkeys(copies, "model.shared.weight")
    assert_other_forms_are_read(family, Transformer2017(SMALL), "model.", buffers, tied)


def test_tensors_that_do_not_fit_are_named():
    model = Transformer2017(dataclasses.replace(SMALL, n_layers=1))
    assert_misfits_are_named(family, model)
    tensors = family.to_hf(model.config, model.state_dict())
    del tensors["final_logits_bias"]
    assert_same(family.from_hf(model.config, tensors), model.state_dict())  # as Marian's own loader has it
    tensors["final_logits_bias"] = torch.ones(1, 19)
    assert_refused("final_logits_bias", lambda: family.from_hf(model.config, tensors))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "swish"),
        ("scale_embedding", False),
        ("normalize_before", True),
        ("normalize_embedding", True),
        ("add_final_layer_norm", True),
        ("static_position_embeddings", False),
        ("share_encoder_decoder_embeddings", False),
        ("tie_word_embeddings", False),
        ("model_type", "bart"),
        ("decoder_layers", 3),
        ("decoder_attention_heads", 1),
        ("decoder_ffn_dim", 24),
        ("decoder_vocab_size", 20),
        ("max_position_embeddings", 0),
    ],
)
def test_configs_that_this_model_cannot_follow_are_refused_by_key(key, value):
    assert_config_refused(family, family.hf_config(SMALL), key, value)


def test_absent_keys_have_the_formats_defaults():
    given = {"activation_function": "relu", "scale_embedding": True}
    assert family.our_config(given) == Config(12, 1024, 16, n_ctx=1024, vocab_size=58101, ln_eps=1e-5)
    assert family.our_config({**given, "vocab_size": 99, "decoder_vocab_size": None}).vocab_size == 99
    for key in given:
        rest = {k: v for k, v in given.items() if k != key}
        assert_refused(f"config.json: {key}: ", lambda rest=rest: family.our_config(rest))


def test_configs_that_the_format_cannot_express_are_refused_by_field():
    assert_export_refused(family, SMALL, "d_head", d_head=7)
    assert_export_refused(family, SMALL, "d_value", d_value=7)
    assert_export_refused(family, SMALL, "positions", positions="learned")
    assert_export_refused(family, SMALL, "ln_eps", ln_eps=1e-3)
    for fine in ({"d_head": 11}, {"d_value": 11}, {"ln_eps": 1e-6}):
        assert family.hf_config(dataclasses.replace(SMALL, **fine)) == family.hf_config(SMALL)


def test_every_preset_has_a_recipe_and_the_deviations_are_whole():
    assert set(RECIPES) == set(PRESETS) >= set(PAPER_PARAMS)
    for deviation in DEVIATIONS:
        assert all((deviation.what, deviation.why, deviation.effect))
        assert deviation.follows in ("paper", "official code", "neither")
