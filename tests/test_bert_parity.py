"""BERT against Hugging Face's BertForPreTraining with the same random weights (std 0.2: small errors would hide).

Distances are in units of the standard deviation of their logits, and of the norm of each gradient.
"""

import dataclasses

import pytest
import torch

from classiclm.convert import bert as family
from classiclm.models.bert import BERT, DEVIATIONS, PAPER_PARAMS, PRESETS, RECIPES, Config
from classiclm.nn.attention import set_attention_path
from classiclm.nn.mask import Mask
from classiclm.objectives import IGNORE, MaskedLM
from parity import (
    assert_config_refused,
    assert_equal_gradients,
    assert_equal_logits,
    assert_export_refused,
    assert_misfits_are_named,
    assert_other_forms_are_read,
    assert_round_trips,
    assert_same,
    keep_of,
    load_with_transformers,
    randomise,
)

transformers = pytest.importorskip("transformers")

# (n_layers, d_model, n_heads, d_ff, n_ctx, n_segments, vocab_size, lengths of the sequences): odd on purpose
SIZES = [
    (1, 39, 3, 53, 11, 2, 29, (11, 5, 7)),
    (2, 42, 7, 168, 17, 3, 101, (13, 4)),
    (3, 55, 11, 35, 9, 2, 67, (9,)),
    (5, 50, 5, 201, 31, 5, 257, (30, 6, 30, 17)),
    (4, 65, 1, 99, 23, 2, 33, (7, 6)),
]
SMALL = Config(n_layers=2, d_model=33, n_heads=3, d_ff=23, n_ctx=7, vocab_size=19)


def pair(n_layers, d_model, n_heads, d_ff, n_ctx, n_segments, vocab_size):
    """Our model and theirs with equal weights."""
    torch.manual_seed(n_layers)
    config = transformers.BertConfig(
        vocab_size=vocab_size, hidden_size=d_model, num_hidden_layers=n_layers, num_attention_heads=n_heads,
        intermediate_size=d_ff, max_position_embeddings=n_ctx, type_vocab_size=n_segments, pad_token_id=None,
    )  # fmt: skip
    theirs = randomise(transformers.BertForPreTraining(config))
    ours = BERT(family.our_config(config.to_dict())).eval()
    sizes = {"n_ctx": n_ctx, "n_segments": n_segments, "vocab_size": vocab_size}
    assert ours.config == Config(n_layers, d_model, n_heads, d_ff=None if d_ff == 4 * d_model else d_ff, **sizes)
    ours.load_state_dict(family.from_hf(ours.config, theirs.state_dict()))
    return ours, theirs


def exercise(keep, n_segments, vocab_size):
    """A batch as data/masked.py makes them: 3 places a row, of which the last is to be ignored in odd rows."""
    batch = {
        "inputs": torch.randint(vocab_size, keep.shape),  # padding is any token: only the mask tells it
        "segments": torch.randint(n_segments, keep.shape),
        "keep": keep,
        "places": torch.multinomial(keep.float(), 3),  # distinct, (B, 3)
        "targets": torch.randint(vocab_size, (len(keep), 3)),
        "next": torch.arange(len(keep)) % 2,
    }
    batch["targets"][1::2, 2] = IGNORE
    return batch


def ask_theirs(model, batch):
    """The same exercise in their words: labels at all positions."""
    labels = torch.full_like(batch["inputs"], IGNORE).scatter(1, batch["places"], batch["targets"])
    words = {"input_ids": "inputs", "token_type_ids": "segments", "next_sentence_label": "next"}
    arguments = {theirs: batch[ours] for theirs, ours in words.items()}
    return model(attention_mask=batch["keep"].long(), labels=labels, **arguments)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_both_heads_and_the_gradients_of_the_training_loss_equal_those_of_transformers(size, side, path):
    *sizes, lengths = size
    ours, theirs = pair(*sizes)
    set_attention_path(ours, path)
    keep = keep_of(lengths, max(lengths), side)
    batch = exercise(keep, ours.config.n_segments, sizes[-1])
    out = ask_theirs(theirs, batch)
    everywhere, nsp = ours(batch["inputs"], batch["segments"], Mask(keep=keep))
    assert_equal_logits(everywhere, out.prediction_logits)  # also at padding: it sees what is kept
    assert ((nsp - out.seq_relationship_logits).abs().max() / out.prediction_logits.std()).item() <= 1e-5
    asked, _ = ours(batch["inputs"], batch["segments"], Mask(keep=keep), batch["places"])
    places = batch["places"][..., None].expand(-1, -1, sizes[-1])
    assert_equal_logits(asked, out.prediction_logits.gather(1, places))
    loss = MaskedLM()(ours, batch).total(MaskedLM().counts(batch))
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    loss.backward()
    out.loss.backward()
    assert_equal_gradients(family, ours, theirs)


@torch.no_grad()
def test_without_segments_and_mask_all_is_the_first_segment_and_seen():
    ours, theirs = pair(*SIZES[1][:-1])
    tokens = torch.randint(101, (3, 17))
    out = theirs(tokens)
    assert_equal_logits(ours(tokens).mlm, out.prediction_logits)
    assert_equal_logits(ours(tokens).nsp * 9, out.seq_relationship_logits * 9)  # few and small numbers: magnified


@torch.no_grad()
def test_the_states_and_the_pooled_vector_equal_theirs():
    ours, theirs = pair(*SIZES[0][:-1])
    tokens, segments = torch.randint(29, (2, 11)), torch.randint(2, (2, 11))
    out = theirs.bert(tokens, token_type_ids=segments)
    states = ours.encode(tokens, segments)
    torch.testing.assert_close(states, out.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.pool(states), out.pooler_output, rtol=1e-5, atol=1e-5)


def test_the_map_round_trips_and_transformers_reads_it(tmp_path):
    model = randomise(BERT(SMALL))
    assert_round_trips(family, model, tmp_path, transformers.AutoModelForPreTraining)
    theirs = load_with_transformers(family, model, tmp_path, transformers.AutoModelForPreTraining)
    tokens = torch.randint(19, (2, 7))
    assert_equal_logits(model(tokens).mlm, theirs(tokens).prediction_logits)


def test_files_may_lack_the_prefix_and_hold_buffers_and_tied_copies():
    buffers = ("embeddings.position_ids", "bert.embeddings.token_type_ids")
    tied = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }
    assert_other_forms_are_read(family, BERT(SMALL), "bert.", buffers, tied)


def test_the_names_that_tensorflow_gave_to_norms_are_read():
    model = randomise(BERT(SMALL))
    tensors = family.to_hf(SMALL, model.state_dict())
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert len(old.keys() - tensors.keys()) == 2 * (1 + 2 * SMALL.n_layers + 1)
    assert_same(family.from_hf(SMALL, old), model.state_dict())


def test_tensors_that_do_not_fit_are_named():
    assert_misfits_are_named(family, BERT(SMALL))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu_new"),
        ("layer_norm_eps", 1e-5),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("model_type", "roberta"),
        ("num_hidden_layers", -1),
        ("vocab_size", None),
        ("intermediate_size", None),
        ("hidden_dropout_prob", "0.1"),
    ],
)
def test_configs_that_this_model_cannot_follow_are_refused_by_key(key, value):
    assert_config_refused(family, family.hf_config(SMALL), key, value)


def test_absent_keys_have_the_formats_defaults_and_heads_must_divide_the_width():
    assert family.our_config({"model_type": "bert"}) == PRESETS["bert-base"]
    with pytest.raises(Exception, match=r"config\.json: n_heads = 7"):
        family.our_config({**family.hf_config(SMALL), "num_attention_heads": 7})


def test_configs_that_the_format_cannot_express_are_refused_by_field():
    assert_export_refused(family, SMALL, "d_head", d_head=7)
    assert family.hf_config(dataclasses.replace(SMALL, d_head=11)) == family.hf_config(SMALL)


def test_every_preset_has_a_recipe_and_the_deviations_are_whole():
    assert set(RECIPES) == set(PRESETS) >= set(PAPER_PARAMS)
    for deviation in DEVIATIONS:
        assert all((deviation.what, deviation.why, deviation.effect))
        assert deviation.follows in ("paper", "official code", "neither")
