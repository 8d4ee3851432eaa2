"""GGUF files, read back by the library's own reader; weights against those that transformers has in its own layout."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch

from classiclm.commands import export
from classiclm.convert import gguf
from classiclm.data.tokenizers import ByteBPE, CharTokenizer, from_json
from classiclm.errors import Error
from classiclm.models import gpt2, gpt3

library = pytest.importorskip("gguf")

TEXT = "The cat sat on the mat, and the dog's bone lay in the garden. " * 40
BPE = ByteBPE.train(TEXT, 275)
SMALL = {"n_layers": 3, "d_model": 24, "n_heads": 3, "n_ctx": 40}
CONFIGS = {
    "gpt2": gpt2.Config(**SMALL, d_ff=50, vocab_size=BPE.vocab_size),
    "gpt3": gpt3.Config(**SMALL, vocab_size=BPE.vocab_size, band=None),
}


def model_of(family, config):
    torch.manual_seed(0)
    model = {"gpt2": gpt2, "gpt3": gpt3}[family].build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


@pytest.fixture
def written(tmp_path):
    """written("gpt2") -> (our weights, the reader of the file)."""

    def make(family, tokenizer=BPE, **changes):
        config = dataclasses.replace(CONFIGS[family], vocab_size=tokenizer.vocab_size, **changes)
        weights = model_of(family, config).state_dict()
        files = gguf.contents(family, config, weights, tokenizer)
        assert list(files) == ["model.gguf"]
        (tmp_path / "model.gguf").write_bytes(files["model.gguf"])
        return weights, library.GGUFReader(tmp_path / "model.gguf")

    return make


def value(reader, key):
    return reader.get_field(key).contents()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_tensor_is_there_with_equal_bits_in_the_layout_of_nn_linear(family, written):
    weights, reader = written(family)
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    expected = {
        "token_embd.weight": weights["tok_emb.weight"],
        "position_embd.weight": weights["pos_emb.weight"],
        "output_norm.weight": weights["ln_f.weight"],
        "output_norm.bias": weights["ln_f.bias"],
    }
    names = {"attn_norm": "ln1", "attn_output": "attn.o", "ffn_norm": "ln2", "ffn_up": "mlp.up", "ffn_down": "mlp.down"}
    for i in range(3):
        for part in ("weight", "bias"):
            expected |= {f"blk.{i}.{a}.{part}": weights[f"blocks.{i}.{b}.{part}"] for a, b in names.items()}
            joined = [weights[f"blocks.{i}.attn.{slot}.{part}"] for slot in "qkv"]
            expected[f"blk.{i}.attn_qkv.{part}"] = torch.cat(joined)  # rows: all of q, then k, then v
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert tensors[name].dtype == np.float32
        assert np.array_equal(tensors[name], tensor.numpy()), name


def test_the_sizes_and_the_tokenizer_are_in_the_file(written):
    _, reader = written("gpt2")
    assert value(reader, "general.architecture") == "gpt2"
    numbers = {"context_length": 40, "embedding_length": 24, "feed_forward_length": 50, "block_count": 3}
    numbers |= {"attention.head_count": 3}
    assert {key: value(reader, f"gpt2.{key}") for key in numbers} == numbers
    assert value(reader, "gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    tokens, merges = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.merges")
    tree = json.loads(BPE.to_json())
    assert {token: i for i, token in enumerate(tokens)} == tree["model"]["vocab"]
    assert merges == [f"{a} {b}" for a, b in tree["model"]["merges"]]
    types = value(reader, "tokenizer.ggml.token_type")
    assert [i for i, kind in enumerate(types) if kind == library.TokenType.CONTROL] == [BPE.end_of_text]
    assert value(reader, "tokenizer.ggml.eos_token_id") == value(reader, "tokenizer.ggml.bos_token_id") == 0
    assert value(reader, "tokenizer.ggml.model") == "gpt2"
    assert value(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert not value(reader, "tokenizer.ggml.add_bos_token")


def test_a_model_without_biases_gets_biases_of_0(written):
    _, reader = written("gpt2", bias=False)
    biases = [tensor.data for tensor in reader.tensors if tensor.name.endswith(".bias")]
    assert len(biases) == 3 * 6 + 1
    assert not any(bias.any() for bias in biases)


def test_the_published_tokenizer_fits(written):
    try:
        tokenizer = ByteBPE.published_gpt2()
    except Error:
        pytest.skip("needs CLASSICLM_DATA")
    _, reader = written("gpt2", tokenizer)
    tokens = reader.get_field("tokenizer.ggml.tokens")
    assert len(tokens.data) == 50257
    assert bytes(tokens.parts[tokens.data[50256]]) == b"<|endoftext|>"
    assert value(reader, "tokenizer.ggml.eos_token_id") == 50256


def refusal(family, config, tokenizer, weights=None):
    with pytest.raises(Error) as caught:
        gguf.contents(family, config, weights or {}, tokenizer)
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value)


def test_what_gguf_cannot_express_is_a_usage_error():
    char = CharTokenizer.train(TEXT)
    code, line = refusal("gpt2", CONFIGS["gpt2"], char)
    assert code == 2
    assert "--tokenizer bpe-512" in line
    code, line = refusal("gpt2", CONFIGS["gpt2"], ByteBPE.train(TEXT, 257))
    assert (code, "merges" in line) == (2, True)
    endless = from_json(BPE.to_json().replace("<|endoftext|>", "<|start|>"), "endless")
    code, line = refusal("gpt2", CONFIGS["gpt2"], endless)
    assert (code, "end-of-text token" in line) == (2, True)
    code, line = refusal("gpt3", gpt3.Config(**SMALL, vocab_size=BPE.vocab_size, band=8), BPE)
    assert (code, "--model.band null" in line) == (2, True)


@pytest.fixture
def run(tmp_path):
    """run("gpt2") -> the folder of a run."""
    from test_convert import make_run

    def make(family, config, tokenizer=BPE):
        return str(make_run(tmp_path / family, family, config, tokenizer))

    return make


def test_the_command_writes_the_file_and_checks_it(run, tmp_path, capsys, monkeypatch):
    folder = run("gpt2", CONFIGS["gpt2"])
    flags = ["--to", "gguf", "--check", "--out"]
    assert export.main([folder, *flags, str(tmp_path / "a")], "classiclm export") == 0
    assert "DIFFERS" not in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["MANIFEST.json", "model.gguf"]
    assert export.main([folder, *flags, str(tmp_path / "b")], "classiclm export") == 0
    assert (tmp_path / "a" / "model.gguf").read_bytes() == (tmp_path / "b" / "model.gguf").read_bytes()
    true = gguf.tensors
    first = "blk.0.attn_qkv.weight"
    calls = []

    def wrong_at_first(config, weights):
        calls.append(1)
        arrays = true(config, weights)
        return arrays if len(calls) > 1 else arrays | {first: arrays[first] + 1e-6}

    monkeypatch.setattr(gguf, "tensors", wrong_at_first)
    assert export.main([folder, *flags, str(tmp_path / "c")], "classiclm export") == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_other_families_and_a_missing_library_are_errors_before_anything_is_written(run, tmp_path, monkeypatch):
    from test_convert import RUNS

    for family in ("bert", "transformer2017", "gpt1"):
        folder = run(family, *RUNS[family])
        with pytest.raises(Error, match="gpt2, gpt3") as caught:
            export.main([folder, "--to", "gguf", "--out", str(tmp_path / "x")], "classiclm export")
        assert caught.value.code == 2
    folder = run("gpt2", CONFIGS["gpt2"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(Error, match=r"pip install 'classiclm\[export\]'") as caught:
        export.main([folder, "--to", "gguf", "--out", str(tmp_path / "x")], "classiclm export")
    assert caught.value.code == 4
    assert not (tmp_path / "x").exists()
