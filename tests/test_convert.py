"""Weights out and in again: exported folders are read by transformers alone, and its own folders are imported.

Weights are large (std 0.3, logits of std 1 and more): near the usual start, small errors hide.
"""

import dataclasses
import importlib
import json
import sys

import pytest
import safetensors.torch
import torch

import classiclm
from classiclm.commands import export, import_
from classiclm.convert import check, folders
from classiclm.data.tokenizers import GPT1BPE, ByteBPE, CharTokenizer, WordPiece
from classiclm.errors import Error
from classiclm.models import bert, gpt1, gpt2, gpt3, ladder, transformer2017
from classiclm.train import checkpoint

transformers = pytest.importorskip("transformers")

TEXT = "The cat sat on the mat, and the dog's bone lay in the garden. " * 40
SENTENCE = "The cat's bone sat in the garden."
BPE, CHAR = ByteBPE.train(TEXT, 300), CharTokenizer.train(TEXT)
GPT1_BPE, PIECES = GPT1BPE.train(TEXT, 90), WordPiece.train(TEXT, 80)
SMALL = {"n_layers": 3, "d_model": 24, "n_heads": 3, "n_ctx": 40}
RUNS = {
    "gpt1": (gpt1.Config(**SMALL, vocab_size=GPT1_BPE.vocab_size), GPT1_BPE),
    "gpt2": (gpt2.Config(**SMALL, vocab_size=BPE.vocab_size), BPE),
    "gpt2 of characters": (gpt2.Config(**SMALL, d_ff=50, vocab_size=CHAR.vocab_size), CHAR),
    "gpt3": (gpt3.Config(**SMALL, vocab_size=BPE.vocab_size, band=None), BPE),
    "bert": (bert.Config(**SMALL, d_ff=50, vocab_size=PIECES.vocab_size), PIECES),
    "transformer2017": (transformer2017.Config(**SMALL, vocab_size=BPE.vocab_size, ln_eps=1e-5), BPE),
}
of_all_families = pytest.mark.parametrize("name", RUNS)


def make_run(folder, family, config, tokenizer, seed=0):
    """A run of one step with large random weights."""
    torch.manual_seed(seed)
    model = importlib.import_module(f"classiclm.models.{family}").build(config)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "ln" in parameter_name and "weight" in parameter_name else 0.0, 0.3)
    info = {"family": family, "preset": "small", "config": dataclasses.asdict(config)}
    files = {"model.json": json.dumps(info), "tokenizer.json": tokenizer.to_json()}
    checkpoint.save(folder, model, torch.optim.AdamW(model.parameters()), checkpoint.State(step=1), files)
    return folder


@pytest.fixture
def run(tmp_path):
    """run("gpt2") -> the folder of a run of that row of RUNS."""

    def make(name, **changes):
        config, tokenizer = RUNS[name]
        return make_run(tmp_path / "run", name.split()[0], dataclasses.replace(config, **changes), tokenizer)

    return make


@pytest.fixture
def call(capsys):
    """call(export, ...) -> (exit code, stdout, stderr or the error's line)."""

    def do(command, *arguments):
        capsys.readouterr()
        try:
            code = command.main([str(argument) for argument in arguments], "classiclm")
        except Error as e:
            code, line = e.code, str(e)
            assert "\n" not in line
            assert ". Fix: " in line
            return code, capsys.readouterr().out, line
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return do


@pytest.fixture
def exported(run, call, tmp_path):
    """exported("gpt2") -> (our model, our tokenizer, the folder)."""

    def make(name, **changes):
        folder = run(name, **changes)
        code, out, err = call(export, folder, "--to", "hf", "--out", tmp_path / "hf" / "a")
        assert (code, out) == (0, ""), err
        return *classiclm.load(folder), tmp_path / "hf" / "a"

    return make


def apart(a, b):
    """The largest difference, in standard deviations."""
    return ((a - b).abs().max() / b.std()).item()


# Out


@pytest.mark.parametrize("name", ["gpt1", "gpt2", "gpt2 of characters", "gpt3"])
def test_an_exported_gpt_gives_the_same_logits_and_greedy_text_in_transformers(name, exported):
    model, tokenizer, folder = exported(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.tensor([tokenizer.encode(SENTENCE)[:20]])
    logits = theirs(tokens).logits
    assert logits.std() >= 1
    assert apart(model(tokens), logits) <= 1e-5
    settings = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    written = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
    assert torch.equal(written, model.generate(tokens, max_new_tokens=15, temperature=0))
    assert theirs.config.eos_token_id == tokenizer.end_of_text


def test_an_exported_bert_gives_the_same_logits_of_both_heads_in_transformers(exported):
    model, tokenizer, folder = exported("bert")
    theirs = transformers.AutoModelForPreTraining.from_pretrained(folder).eval()
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    pair = fast("the cat sat", "in the garden.", return_tensors="pt")
    a, b = tokenizer.encode("the cat sat"), tokenizer.encode("in the garden.")
    assert pair["input_ids"].tolist()[0] == [tokenizer.cls, *a, tokenizer.sep, *b, tokenizer.sep]
    ours, logits = model(pair["input_ids"], pair["token_type_ids"]), theirs(**pair)
    assert logits.prediction_logits.std() >= 1
    assert apart(ours.mlm, logits.prediction_logits) <= 1e-5
    assert (ours.nsp - logits.seq_relationship_logits).abs().max() <= 1e-4
    assert theirs.config.pad_token_id == tokenizer.pad


@pytest.mark.parametrize(("ln_eps", "bar"), [(1e-5, 1e-5), (1e-6, 1e-3)])
def test_an_exported_transformer_translates_alike_in_transformers(ln_eps, bar, exported):
    model, tokenizer, folder = exported("transformer2017", ln_eps=ln_eps)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    source = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCE, return_tensors="pt")
    end = tokenizer.end_of_text
    assert source["input_ids"].tolist() == [[*tokenizer.encode(SENTENCE), end]]
    written = theirs.generate(**source, max_new_tokens=12, do_sample=False)
    logits = theirs(**source, decoder_input_ids=written).logits
    assert logits.std() >= 1
    assert apart(model(source["input_ids"], written), logits) <= bar
    target = torch.tensor([[end]])
    for _ in range(12):
        target = torch.cat([target, model(source["input_ids"], target)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, target[:, : written.shape[1]])


@of_all_families
def test_the_exported_tokenizer_gives_the_same_ids_and_text_in_transformers(name, exported):
    _, tokenizer, folder = exported(name)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [SENTENCE, "the the  garden", "mat.", "" if "characters" in name else "Zoë 😀\n\n'tis <b>  "]
    for text in texts:
        ids = tokenizer.encode(text)
        assert fast(text, add_special_tokens=False)["input_ids"] == ids
        assert fast.decode(ids) == tokenizer.decode(ids)
    assert len(fast) == tokenizer.vocab_size
    assert fast.model_max_length == SMALL["n_ctx"]


def test_weights_are_plain_safetensors_without_tied_copies_and_equal_runs_give_equal_bytes(exported, call, tmp_path):
    _, _, folder = exported("gpt2")
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in set(file.keys())
    assert str(tmp_path) not in "".join(path.read_text(errors="replace") for path in folder.iterdir())
    assert call(export, tmp_path / "run", "--to", "hf", "--out", tmp_path / "b")[0] == 0
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "b").iterdir())


@of_all_families
def test_the_check_passes_for_a_true_export(name, run, call, tmp_path):
    code, out, _ = call(export, run(name), "--to", "hf", "--out", tmp_path / "a", "--check")
    assert code == 0
    assert out.count("ok") >= 4
    assert "DIFFERS" not in out


@pytest.mark.parametrize("name", ["gpt2", "bert", "transformer2017"])
@pytest.mark.parametrize("spoilt", ["weight", "tokenizer"])
def test_the_check_finds_a_false_export(name, spoilt, run, call, tmp_path, monkeypatch):
    contents = folders.contents

    def wrong(family, config, weights, tokenizer):
        if spoilt == "weight":
            first = next(key for key in weights if key.endswith("0.attn.q.weight"))
            weights = {**weights, first: weights[first] * 1.01}
        files = contents(family, config, weights, tokenizer)
        if spoilt == "tokenizer":
            files["tokenizer.json"] = contents("gpt2", *other)["tokenizer.json"]
        return files

    config, _ = RUNS["gpt2"]
    other = (config, gpt2.build(config).state_dict(), ByteBPE.train("abc" * 50, 258))
    monkeypatch.setattr(folders, "contents", wrong)
    code, out, _ = call(export, run(name), "--to", "hf", "--out", tmp_path / "a", "--check")
    assert code == 1
    assert "DIFFERS" in out


def test_the_check_counts_tensors_that_transformers_finds_missing_or_unknown(exported):
    model, tokenizer, folder = exported("gpt2")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["transformer.h.0.extra"] = tensors.pop("transformer.h.0.mlp.c_fc.bias")
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    first = check.compare(folder, "gpt2", model, tokenizer)[0]
    assert (first.what, first.value, first.ok) == ("tensors that do not fit", 2.0, False)


def test_what_the_format_has_no_place_for_is_a_usage_error_and_nothing_is_written(run, call, tmp_path):
    banded = run("gpt3", band=8)
    rung = make_run(tmp_path / "rung", "ladder", ladder.PRESETS["ladder-1"], CHAR)
    for folder, words in ((banded, "--model.band null"), (rung, "export a run of one of these: bert, gpt1, gpt2")):
        code, _, err = call(export, folder, "--to", "hf", "--out", tmp_path / "out")
        assert code == 2
        assert words in err
    assert not (tmp_path / "out").exists()


def test_flags_that_are_missing_or_wrong_and_folders_that_are_in_use_are_usage_errors(run, call, tmp_path):
    folder, taken = run("gpt2"), tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for arguments in (
        [folder, "--to", "hf"],
        [folder, "--out", tmp_path / "x"],
        ["--to", "hf", "--out", tmp_path / "x"],
        [folder, "--to", "onnx", "--out", tmp_path / "x"],
        [folder, "--to", "hf", "--out", tmp_path / "x", "--checkpoint", "newest"],
        [folder, "--to", "hf", "--out", taken],
    ):
        assert call(export, *arguments)[0] == 2, arguments
    assert call(export, tmp_path / "nowhere", "--to", "hf", "--out", tmp_path / "x")[0] == 3
    assert call(export, folder, "--to", "hf", "--out", tmp_path / "x", "--checkpoint", "7")[0] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["run", "taken"] or not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    assert call(export, folder, "--to", "hf", "--out", tmp_path / "empty", "--checkpoint", "1")[0] == 0


def test_a_missing_library_is_said_before_anything_is_written(run, call, tmp_path, monkeypatch):
    folder = run("gpt2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = call(export, folder, "--to", "hf", "--out", tmp_path / "a", "--check")
    assert code == 4
    assert "pip install 'classiclm[export]'" in err
    assert not (tmp_path / "a").exists()
    assert call(export, folder, "--to", "hf", "--out", tmp_path / "a")[0] == 0  # writing needs no library


# Out and in again


@of_all_families
def test_an_export_that_is_imported_again_has_equal_bits(name, exported, call, tmp_path):
    model, tokenizer, folder = exported(name)
    code, out, err = call(import_, folder, "--out", tmp_path / "back")
    assert (code, out) == (0, ""), err
    again, vocabulary = classiclm.load(tmp_path / "back")
    assert vocabulary.fingerprint == tokenizer.fingerprint
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    sizes = dataclasses.asdict(model.config) | {"band": None}
    assert dataclasses.asdict(again.config).items() <= sizes.items()
    assert call(export, tmp_path / "back", "--to", "hf", "--out", tmp_path / "twice")[0] == 0
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in (tmp_path / "twice").iterdir())


def test_a_model_without_biases_comes_back_with_biases_of_0_and_the_same_logits(exported, call, tmp_path):
    model, tokenizer, folder = exported("gpt2 of characters", bias=False)
    assert call(import_, folder, "--out", tmp_path / "back")[0] == 0
    again, _ = classiclm.load(tmp_path / "back")
    tokens = torch.tensor([tokenizer.encode(SENTENCE)])
    assert apart(again(tokens), model(tokens)) <= 1e-6
    assert not again.blocks[0].attn.q.bias.any()


def test_other_commands_work_on_what_was_imported(exported, call, cli, tmp_path, text_file):
    _, _, folder = exported("gpt2")
    assert call(import_, folder, "--out", tmp_path / "back")[0] == 0
    code, out, err = cli("generate", tmp_path / "back", "--prompt", "The cat", "--max_new_tokens", "5", "--greedy")
    assert code == 0, err
    assert out.startswith("The cat")
    code, out, err = cli("evaluate", tmp_path / "back", "--data", text_file, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["model"] == "imported"


def test_the_preset_of_the_same_sizes_is_found_whatever_the_dropout():
    config = dataclasses.replace(gpt2.PRESETS["gpt2-355m"], dropout=0.1)
    assert import_.preset_of(folders.Foreign("gpt2", config, {}, ())) == "gpt2-355m"
    other = dataclasses.replace(config, n_ctx=77)
    assert import_.preset_of(folders.Foreign("gpt2", other, {}, ())) == "imported"
