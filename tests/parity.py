"""What the tests against transformers share: large random weights, distances in units of the spread, weight maps.

A `family` is a module of classiclm.convert. The oracle of a map is transformers itself: it must load what `to_hf` and
`hf_config` give, save it again to equal files, and compute the same logits.
"""

import dataclasses
import json
import re

import pytest
import safetensors.torch
import torch

from classiclm.errors import BAD_INPUT, USAGE, Error

LOGITS, GRADIENTS = 1e-5, 1e-4  # of the logits' standard deviation; of a gradient's norm


def randomise(model, std=0.2):
    """Weights so large that no part of the model hides behind another; gains (all one-dimensional weights) near 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(1.0 if gain else 0.0, std)
    return model.eval()


def assert_equal_logits(ours, theirs):
    spread = theirs.std()
    assert spread >= 1
    assert ((ours - theirs).abs().max() / spread).item() <= LOGITS


def assert_equal_gradients(family, ours, theirs, floor=0.01):
    """Both models have run backwards from the same loss.

    Some gradients are 0 but for rounding (a key's bias shifts all scores alike): one that is smaller than `floor` times
    the median gradient is held against that.
    """
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected = family.from_hf(ours.config, gradients)
    typical = torch.stack([gradient.norm() for gradient in expected.values()]).median()
    for name, parameter in ours.named_parameters():
        scale = max(expected[name].norm(), floor * typical)
        assert ((parameter.grad - expected[name]).norm() / scale).item() <= GRADIENTS, name


def keep_of(lengths, time, side):
    """(B, T) booleans: row i has lengths[i] tokens, and padding on the named side."""
    column = torch.arange(time)[None, :]
    lengths = torch.tensor(lengths)[:, None]
    return column < lengths if side == "right" else column >= time - lengths


def load_with_transformers(family, model, folder, hf_class, **ids):
    """What transformers makes of our config and weights; it must find every tensor it wants and no other."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**family.hf_config(model.config), **ids}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = family.to_hf(model.config, model.state_dict())
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    theirs, info = hf_class.from_pretrained(folder, output_loading_info=True)
    assert type(theirs).__name__ == family.ARCHITECTURE
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs.eval()


def assert_round_trips(family, model, folder, hf_class, **ids):
    """Ours -> theirs -> ours, bit by bit, and theirs -> a file that transformers writes -> ours."""
    config, weights = model.config, model.state_dict()
    assert family.our_config(family.hf_config(config)) == config
    tensors = family.to_hf(config, weights)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert_same(family.from_hf(config, tensors), weights)
    theirs = load_with_transformers(family, model, folder / "ours", hf_class, **ids)
    theirs.save_pretrained(folder / "theirs")
    saved = safetensors.torch.load_file(folder / "theirs" / "model.safetensors")
    assert_same(saved, tensors)
    hf = json.loads((folder / "theirs" / "config.json").read_text())
    assert family.our_config(hf) == config
    assert hf["model_type"] == family.MODEL_TYPE
    assert hf["architectures"] == [family.ARCHITECTURE]


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in b:
        assert torch.equal(a[name], b[name]), name


def assert_other_forms_are_read(family, model, prefix, buffers, tied):
    """Files saved without the head's prefix, with buffers, or with a copy of what is tied, hold the same model."""
    tensors = family.to_hf(model.config, model.state_dict())
    bare = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    assert len(bare.keys() - tensors.keys()) > 1
    for form in (bare, tensors):
        more = {name: torch.ones(1, dtype=torch.uint8) for name in buffers}
        more |= {copy: tensors[original] for copy, original in tied.items()}
        assert_same(family.from_hf(model.config, {**form, **more}), model.state_dict())
    for copy, original in tied.items():
        other = {**tensors, copy: tensors[original] + 1}
        assert_refused(copy, lambda other=other: family.from_hf(model.config, other))


def assert_misfits_are_named(family, model):
    """Every tensor that is missing, too large, no number, there twice, or unknown is named in an Error."""
    config, tensors = model.config, family.to_hf(model.config, model.state_dict())
    for name, tensor in tensors.items():
        if name == "final_logits_bias":  # Marian's own files may leave it out
            continue
        rest = {other: t for other, t in tensors.items() if other != name}
        larger = torch.cat([tensor, tensor[:1]])
        for changed in (rest, {**rest, name: larger}, {**rest, name: tensor.long()}):
            assert_refused(name, lambda changed=changed: family.from_hf(config, changed))
    inside = next(name for name in tensors if name.startswith(family.TENSORS.prefix))
    twice = {**tensors, inside.removeprefix(family.TENSORS.prefix): tensors[inside]}
    assert_refused("with and without the prefix", lambda: family.from_hf(config, twice))
    beyond = next(name for name in tensors if ".0." in name).replace(".0.", f".{config.n_layers}.")
    for unknown in ("adapter.weight", beyond):
        extra = {**tensors, unknown: torch.zeros(1)}
        assert_refused(unknown, lambda extra=extra: family.from_hf(config, extra))


def assert_refused(name, function, code=BAD_INPUT):
    with pytest.raises(Error, match=re.escape(name)) as caught:
        function()
    assert caught.value.code == code


def assert_config_refused(family, hf, key, value):
    """A config.json with another value of `key` is refused by that name."""
    assert_refused(f"config.json: {key}: ", lambda: family.our_config({**hf, key: value}))


def assert_export_refused(family, config, field, **changes):
    """A Config that the format has no words for is refused by the name of its field."""
    changed = dataclasses.replace(config, **changes)
    assert_refused(f"model.{field}: ", lambda: family.hf_config(changed), USAGE)
