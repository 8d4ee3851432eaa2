"""Commands as a person uses them: demo, help, tables, a ladder begun twice; and a paper added as one file."""

import dataclasses
import json

import pytest
import torch

import classiclm.models
from classiclm import registry
from classiclm.commands.runs import make_trainer
from classiclm.data import plays
from classiclm.data.corpora import Data
from classiclm.models import ladder
from classiclm.models.gpt2 import Config
from classiclm.recipe import Recipe
from classiclm.train import checkpoint
from classiclm.train.settings import TrainConfig


@pytest.fixture
def short_ladder(monkeypatch):
    for name, recipe in ladder.RECIPES.items():
        monkeypatch.setitem(ladder.RECIPES, name, dataclasses.replace(recipe, steps=10, batch=2))


@pytest.fixture
def own_plays(monkeypatch):
    """The grammar's corpus, shorter."""
    monkeypatch.setattr("classiclm.data.corpora.PLAYS_CHARACTERS", 20_000)


def test_the_demo_without_any_data_takes_the_grammar_and_ends_with_table_sample_and_report(
    cli, tmp_path, monkeypatch, short_ladder, own_plays
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLASSICLM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, err = cli("demo")
    assert code == 0, err
    rows = json.loads((tmp_path / "runs/demo-plays/ladder.json").read_text())
    assert [row["rung"] for row in rows] == list(range(1, 13))
    assert "rung 12 writes:" in out
    assert "report: runs/demo-plays/report.html" in out
    assert (tmp_path / "runs/demo-plays/report.html").stat().st_size > 20_000
    assert "no Shakespeare on this machine" in err


def test_a_ladder_of_another_budget_is_not_mixed_into_a_finished_one(cli, tmp_path, short_ladder, own_plays):
    start = ("ladder", "--data", "plays", "--out", tmp_path, "--rungs", "1", "--device", "cpu")
    assert cli(*start, "--budget", "quick")[0] == 0
    before = (tmp_path / "ladder.json").read_bytes()
    code, _, err = cli(*start, "--budget", "standard")
    assert code == 2
    assert "budget of 2 steps, not 10" in err
    assert (tmp_path / "ladder.json").read_bytes() == before


@pytest.mark.parametrize("columns", [80, 200])
def test_tables_keep_every_number_whole_on_any_terminal(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    out = cli("models")[1]
    assert "174,604,259,328" in out
    assert "…" not in out


def test_what_is_printed_is_data_and_not_markup(cli, tmp_path, short_ladder, own_plays):
    out_folder = tmp_path / "[bold]x[" / ":dove:"
    code, out, err = cli("ladder", "--data", "plays", "--out", out_folder, "--rungs", "1", "--device", "cpu")
    assert code == 0, err
    assert str(out_folder / "report.html") in out.replace("\n", "")
    assert str(out_folder) in cli("evaluate", out_folder / "rung-01", "--device", "cpu")[1].replace("\n", "")


def test_help_for_a_preset_shows_its_own_values(capsys):
    from classiclm.cli import main

    with pytest.raises(SystemExit):
        main(["train", "gpt2-shakespeare-cpu", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "blocks [4]" in words
    assert "sequences in one optimizer step [12]" in words
    assert "optimizer steps [2000]" in words


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(plays.generate(5_000, seed=1))
    recipe = dataclasses.asdict(Recipe(batch=2, steps=12, warmup=2))
    model = Config(n_layers=1, d_model=8, n_heads=2, n_ctx=8)
    data = Data(str(tmp_path / "text.txt"))
    return TrainConfig(**recipe, preset="gpt2-shakespeare-cpu", data=data, device="cpu", save_every=4, model=model)


def test_a_damaged_newer_checkpoint_does_not_push_out_a_good_one(config, tmp_path):
    """It must not count among those that are kept, or the next save would be deleted for it."""
    run = tmp_path / "run"
    make_trainer(run, config).fit()
    newest = checkpoint.folder_of(run, 12)
    (newest / "model.safetensors").write_bytes(b"torn")
    (checkpoint.folder_of(run, 8) / "MANIFEST.json").unlink()
    trainer = make_trainer(run, dataclasses.replace(config, keep=1))
    trainer.state = checkpoint.State(step=9, data=trainer.task.fingerprint)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    trainer._save()
    assert checkpoint.newest_valid(run)[0] == checkpoint.folder_of(run, 9)


def test_a_damaged_newest_checkpoint_is_told_when_a_run_is_only_read(config, tmp_path, cli):
    run = tmp_path / "run"
    make_trainer(run, config).fit()
    (checkpoint.folder_of(run, 12) / "model.safetensors").write_bytes(b"torn")
    code, _, err = cli("generate", run, "--max_new_tokens", 3, "--device", "cpu")
    assert code == 0
    assert "step-00000012 has a damaged model.safetensors" in err


def test_a_run_made_shorter_than_it_is_ends_well_and_keeps_its_record(config, tmp_path, cli):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    sizes = ["--model.n_layers", 1, "--model.d_model", 8, "--model.n_heads", 2, "--model.n_ctx", 8]
    start = ("train", "gpt2-shakespeare-cpu", "--data", text, "--out", run, "--batch", 2, "--device", "cpu", *sizes)
    assert cli(*start, "--steps", 8)[0] == 0
    record = (run / "config.yaml").read_bytes()
    code, _, err = cli(*start, "--steps", 3)
    assert code == 0
    assert "is finished: step 8" in err
    assert (run / "config.yaml").read_bytes() == record
    code, _, err = cli(*start, "--steps", 9)
    assert code == 0
    assert "was planned for 8 steps" in err


NEW_PAPER = '''
"""A paper that nobody wrote: the next token from a table."""
from classiclm.recipe import Recipe
from classiclm.models.ladder import Bigram, Config

PRESETS = {"dummy-small": Config(rung=1)}
PAPER_PARAMS = {"dummy-small": "4k"}
RECIPES = {"dummy-small": Recipe(tokenizer="char", batch=2, steps=3, warmup=1)}
DEVIATIONS = ()
build = Bigram
'''


def test_a_new_paper_is_one_file_and_no_edit_elsewhere(cli, tmp_path, monkeypatch, config):
    (tmp_path / "dummy2030.py").write_text(NEW_PAPER)
    monkeypatch.setattr(classiclm.models, "__path__", [*classiclm.models.__path__, str(tmp_path)])
    registry.families.cache_clear()
    try:
        rows = {row["name"]: row for row in json.loads(cli("models", "--json")[1])}
        assert rows["dummy-small"]["family"] == "dummy2030"
        run = tmp_path / "run"
        code, _, err = cli("train", "dummy-small", "--data", tmp_path / "text.txt", "--out", run, "--device", "cpu")
        assert code == 0, err
        assert cli("generate", run, "--max_new_tokens", 4, "--device", "cpu")[0] == 0
        assert cli("evaluate", run, "--device", "cpu")[0] == 0
    finally:
        registry.families.cache_clear()
