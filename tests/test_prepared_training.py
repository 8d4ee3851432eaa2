"""From six corpora in their own formats to a trained model: prepare, fsck, train, evaluate on one folder."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("pyarrow")
pytest.importorskip("zstandard")
pytest.importorskip("ftfy")

from classiclm.cli import main
from classiclm.data.corpora import Data
from classiclm.data.splits import prepare_text
from classiclm.data.tokenizers import load_tokenizer
from samples import make_samples

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TINY = ["--model.n_layers", 2, "--model.d_model", 32, "--model.n_heads", 2, "--model.n_ctx", 32, "--batch", 8]
WEIGHTS = [1, 2, 17, 35, 20, 25]


def prepared(folder, out, *flags):
    samples = make_samples(folder)
    sources = [f"{name}={path}" for name, path in samples.items()]
    code = main(["prepare", *map(str, sources), "--out", str(out), "--workers", "1", *map(str, flags)])
    assert code == 0
    return out


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """All six corpora as a weighted mixture."""
    folder = tmp_path_factory.mktemp("six")
    flags = ["--tokenizer", "bpe-400", "--val_share", 0.1, "--weights", *WEIGHTS]
    return prepared(folder / "samples", folder / "mixture", *flags)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    return prepared(folder / "samples", folder / "data", "--tokenizer", "wordpiece-400", "--val_share", 0.2)


def test_every_source_has_its_shards_and_a_manifest_that_adds_up(six):
    meta = json.loads((six / "meta.json").read_bytes())
    assert [source["name"] for source in meta["sources"]] == list(make_samples(six.parent / "again"))
    for source in meta["sources"]:
        steps = source["steps"]
        assert [step["name"] for step in steps[-2:]] == ["exact", "near"]
        assert steps[-2]["removed"] == {"exact duplicate": 1}
        assert steps[-1]["removed"] == {"near-duplicate": 1}
        for step, following in itertools.pairwise(steps):
            assert step["documents_in"] - sum(step["removed"].values()) == step["documents_out"]
            assert step["documents_out"] == following["documents_in"]
        counts = source["splits"]
        assert counts["train"]["documents"] + counts["val"]["documents"] == steps[-1]["documents_out"]
        mine = [shard for shard in meta["shards"] if shard["source"] == source["name"]]
        for split in ("train", "val"):
            tokens = sum(len(np.fromfile(six / s["file"], np.uint16)) for s in mine if s["split"] == split)
            assert counts[split]["tokens"] == tokens > 0


def test_the_research_runs_recipe_trains_on_it_and_resumes(six, cli, tmp_path):
    run = ["train", "--config", RECIPES / "mixture-124m.yaml", "--data", six, *TINY, "--out", tmp_path / "run"]
    code, _, said = cli(*run, "--steps", 10)
    assert code == 0, said
    assert "8 x 32 = 256 tokens a step" in said
    assert cli(*run, "--steps", 20)[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 20
    assert rows[-1]["val_loss"] < rows[0]["loss"]
    assert cli("fsck", tmp_path / "run")[0] == 0
    code, out, _ = cli("evaluate", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)[0]["loss"] == pytest.approx(rows[-1]["val_loss"], abs=0.02)  # bf16 and fp32


def test_the_recipe_is_the_papers_size_unless_told_otherwise(six, cli):
    code, text, _ = cli("train", "--config", RECIPES / "mixture-124m.yaml", "--data", six, "--print_config")
    assert code == 0
    for line in ("batch: 512", "micro_batch: 8", "steps: 20000", "lr: 0.0006", "n_ctx: 512", "n_layers: 12"):
        assert f"{line}\n" in text.replace("  ", "")
    settings = yaml.safe_load(text)
    assert settings["batch"] * settings["model"]["n_ctx"] == 262_144


@pytest.mark.parametrize("documents", ["joined", "masked", "packed"])
def test_windows_may_keep_documents_apart(six, cli, tmp_path, documents):
    run = ["train", "gpt2-shakespeare-cpu", "--data", six, *TINY, "--steps", 30, "--lr", 0.01, "--warmup", 5]
    assert cli(*run, "--data.documents", documents, "--out", tmp_path / "run")[0] == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["val_loss"] < 5.5 < rows[0]["loss"]
    code, out, _ = cli("evaluate", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)[0]["bits_per_byte"] == pytest.approx(rows[-1]["bits_per_byte"], rel=0.01)


def test_a_source_of_twice_the_weight_is_seen_twice_as_often(six):
    from classiclm.data.batches import Windows
    from classiclm.recipe import Recipe

    data = prepare_text(Data(str(six), weights=(1.0, 1.0, 1.0, 1.0, 2.0, 2.0)), "char")
    windows = Windows(data.train, 64, Recipe(batch=10_000), seed=1)
    ranges = {name: (first, end) for name, first, end, _ in data.train.ranges}
    tokens = np.asarray(data.train.tokens)
    of = {}
    for name, (first, end) in ranges.items():
        view = np.lib.stride_tricks.sliding_window_view(tokens[first:end], 64)
        of |= {row.tobytes(): name for row in view}
    seen = [of[row.numpy().astype(np.uint16).tobytes()] for row in windows(0)["inputs"]]
    assert {name: seen.count(name) for name in ("cnn", "edu")} == {"cnn": 1250, "edu": 2500}


def test_bert_learns_from_shards_of_sentences(sentences, cli, tmp_path):
    meta = json.loads((sentences / "meta.json").read_bytes())
    assert meta["sequences"] == "sentences"
    assert meta["splits"]["train"]["sequences"] > meta["splits"]["train"]["documents"]
    run = ["train", "bert-shakespeare", "--data", sentences, "--out", tmp_path / "run", "--steps", 3, "--batch", 4]
    sizes = ["--model.n_layers", 1, "--model.d_model", 32, "--model.n_heads", 2]
    code, _, said = cli(*run, *sizes)
    assert code == 0, said
    assert cli("evaluate", tmp_path / "run", "--json")[0] == 0


def test_data_cut_for_one_kind_of_model_is_refused_by_the_other(six, sentences, cli, tmp_path):
    code, _, said = cli("train", "bert-shakespeare", "--data", six, "--out", tmp_path / "a")
    assert code == 2
    assert "was cut into documents" in said
    code, _, said = cli("train", "gpt2-shakespeare-cpu", "--data", sentences, "--out", tmp_path / "b")
    assert code == 2
    assert "was cut into sentences" in said


def test_another_tokenizer_than_the_datasets_is_refused(six, cli, tmp_path):
    run = ["train", "gpt2-shakespeare-cpu", "--data", six, "--out", tmp_path / "run", "--steps", 1, *TINY]
    code, _, said = cli(*run, "--tokenizer", "bpe-512")
    assert code == 2
    assert "--tokenizer" in said
    assert len(said.splitlines()) == 1
    assert cli(*run, "--tokenizer", six)[0] == 0  # its own, by its folder
    assert load_tokenizer(str(tmp_path / "run")).to_json() == (six / "tokenizer.json").read_text()
    assert f"tokenizer: {six}\n" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "swap"])
def test_a_damaged_shard_is_named_before_a_step_is_made(six, cli, tmp_path, damage):
    data = tmp_path / "data"
    shutil.copytree(six, data)
    path, other = data / "train-00001.bin", data / "train-00002.bin"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "cut":
        path.write_bytes(content[:-2])
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    code, _, said = cli("train", "gpt2-shakespeare-cpu", "--data", data, "--out", tmp_path / "run", *TINY)
    assert code == 3
    assert "train-00001.bin" in said
    assert not (tmp_path / "run").exists()
    code, out, _ = cli("fsck", data)
    assert code == 3
    assert "train-00001.bin" in out


@pytest.mark.parametrize("form", ["nanogpt", "llmc"])
def test_the_tokens_go_out_in_other_projects_forms(six, cli, tmp_path, form):
    data = tmp_path / "data"
    shutil.copytree(six, data)
    sources = yaml.safe_load((data / "config.yaml").read_text())["sources"]
    flags = ["--tokenizer", "bpe-400", "--val_share", 0.1, "--weights", *WEIGHTS]
    assert cli("prepare", *sources, "--out", data, *flags, "--export", form)[0] == 0
    whole = np.concatenate([np.fromfile(path, np.uint16) for path in sorted(data.glob("train-*.bin"))])
    if form == "nanogpt":
        assert np.array_equal(np.memmap(data / form / "train.bin", np.uint16, mode="r"), whole)
    else:
        parts = [np.fromfile(path, np.uint16)[512:] for path in sorted((data / form).glob("train_*.bin"))]
        assert np.array_equal(np.concatenate(parts), whole)


def test_preparing_imports_neither_torch_nor_what_it_does_not_need(six, tmp_path):
    import subprocess
    import sys

    path = tmp_path / "texts.txt"
    path.write_text("one text here\n\nand another there\n\nand a third\n")
    command = ["prepare", str(path), "--documents", "block", "--tokenizer", "bpe-260", "--out", str(tmp_path / "out")]
    unwanted = {"torch", "datasets", "pyarrow", "datatrove", "ftfy"}
    program = f"""
import sys
from classiclm.cli import main
if __name__ == "__main__":
    print(main({command!r}), sorted({unwanted!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
