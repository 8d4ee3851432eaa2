"""The trainer: honest rows, refusals, signals and kills. Exact resume from every step is in test_resume.py."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from classiclm.commands.runs import make_trainer
from classiclm.config import to_yaml
from classiclm.data.batches import evaluation_batches
from classiclm.data.corpora import Data
from classiclm.data.splits import prepare_text
from classiclm.errors import Error
from classiclm.files import sha256_of_file
from classiclm.models.gpt2 import Config
from classiclm.objectives import CausalLM, mean_loss
from classiclm.optim import learning_rate
from classiclm.recipe import Recipe
from classiclm.registry import load, open_run
from classiclm.train import checkpoint
from classiclm.train.settings import TrainConfig

MODEL = Config(n_layers=2, d_model=16, n_heads=2, n_ctx=12, dropout=0.1)
TIMES = ("seconds", "tokens_per_s")


@pytest.fixture
def config(text_file):
    """A run of 30 steps over several epochs of a small file, with dropout and accumulation."""
    recipe = dataclasses.asdict(Recipe(batch=6, steps=30, lr=1e-2, warmup=5))
    data = Data(str(text_file))
    every = {"log_every": 3, "eval_every": 10, "save_every": 7}
    return TrainConfig(
        **recipe,
        **every,
        preset="gpt2-shakespeare-cpu",
        data=data,
        device="cpu",
        micro_batch=2,
        eval_windows=5,
        model=MODEL,
    )


def weights_of(run):
    return sha256_of_file(checkpoint.newest_valid(run)[0] / "model.safetensors")


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


class Killed(BaseException):
    """Stands for a SIGKILL inside this process."""


def fit_and_die_after(trainer, step):
    real = trainer._train_step

    def train_step():
        if trainer.state.step == step:
            raise Killed
        return real()

    trainer._train_step = train_step
    with pytest.raises(Killed):
        trainer.fit()


def test_logging_validating_and_saving_more_often_changes_no_weight(config, tmp_path):
    make_trainer(tmp_path / "seldom", config).fit()
    often = dataclasses.replace(config, log_every=1, eval_every=2, save_every=1, eval_windows="all")
    make_trainer(tmp_path / "often", often).fit()
    assert weights_of(tmp_path / "seldom") == weights_of(tmp_path / "often")


def test_micro_batches_have_the_gradient_of_the_whole_batch(config, tmp_path):
    config = dataclasses.replace(config, precision="fp32", model=dataclasses.replace(MODEL, dropout=0.0))
    norms = {}
    for size in (1, 2, 3, 6):
        make_trainer(tmp_path / str(size), dataclasses.replace(config, micro_batch=size)).fit()
        norms[size] = [row["grad_norm"] for row in rows_of(tmp_path / str(size))]
    for size in (1, 2, 3):
        assert norms[size] == pytest.approx(norms[6], rel=1e-3)


def test_the_rows_say_what_happened(config, tmp_path):
    make_trainer(tmp_path, config).fit()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 6, 9, 10, 12, 15, 18, 20, 21, 24, 27, 30]
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 30]
    assert all(row["tokens"] == row["step"] * 6 * 12 for row in rows)
    assert all(row["lr"] == learning_rate(row["step"] - 1, row["tokens"], config) for row in rows)
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


def test_the_last_rows_validation_loss_is_that_of_the_whole_split(config, tmp_path):
    make_trainer(tmp_path, dataclasses.replace(config, precision="fp32")).fit()
    model, tokenizer = load(tmp_path)
    data = prepare_text(config.data, tokenizer)
    expected = mean_loss(model, CausalLM(), evaluation_batches(data.val, 12, 1))
    last = rows_of(tmp_path)[-1]
    assert last["val_loss"] == pytest.approx(expected, rel=1e-6)
    bytes_predicted = data.val.n_bytes
    expected_bits = expected * (len(data.val.tokens) - 1) / bytes_predicted / math.log(2)
    assert last["bits_per_byte"] == pytest.approx(expected_bits, rel=1e-6)


def test_a_finished_run_says_so_and_may_be_made_longer(config, tmp_path, capsys):
    make_trainer(tmp_path, config).fit()
    before = weights_of(tmp_path)
    assert make_trainer(tmp_path, config).fit().step == 30
    assert "is finished: step 30" in capsys.readouterr().err
    assert weights_of(tmp_path) == before
    assert make_trainer(tmp_path, dataclasses.replace(config, steps=36)).fit().step == 36
    assert "from step 30" in capsys.readouterr().err
    assert rows_of(tmp_path)[-1]["step"] == 36


def test_the_saved_config_is_the_whole_config(config, tmp_path):
    trainer = make_trainer(tmp_path, config)
    trainer.fit()
    assert (tmp_path / "config.yaml").read_text() == to_yaml(trainer.config)
    assert trainer.config.precision in ("fp32", "bf16")  # what auto chose, not "auto"
    assert trainer.config.model.vocab_size == len(set(Path(config.data.name).read_text()))


@pytest.mark.parametrize(
    "change", [{"lr": 2e-2}, {"batch": 12}, {"seed": 1}, {"model": Config(n_layers=1, d_model=16, n_heads=2)}]
)
def test_a_run_of_another_config_is_refused_with_the_difference(config, tmp_path, change):
    make_trainer(tmp_path, dataclasses.replace(config, steps=2)).fit()
    with pytest.raises(Error, match=next(iter(change))) as e:
        make_trainer(tmp_path, dataclasses.replace(config, steps=2, **change)).fit()
    assert e.value.code == 2


def test_other_data_under_a_run_is_refused(config, tmp_path, text_file):
    make_trainer(tmp_path / "run", dataclasses.replace(config, steps=2)).fit()
    text_file.write_text(text_file.read_text().replace("cat", "tac"))
    with pytest.raises(Error, match="other data") as e:
        make_trainer(tmp_path / "run", dataclasses.replace(config, steps=4)).fit()
    assert e.value.code == 3


def test_a_damaged_checkpoint_is_passed_over_and_named(config, tmp_path, capsys):
    make_trainer(tmp_path / "whole", config).fit()
    run = tmp_path / "run"
    fit_and_die_after(make_trainer(run, config), 16)
    newest = checkpoint.newest_valid(run)[0]
    weights = newest / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    make_trainer(run, config).fit()
    err = capsys.readouterr().err
    assert f"warning: {newest} has a damaged model.safetensors" in err
    assert "from step 10" in err
    assert weights_of(run) == weights_of(tmp_path / "whole")
    assert rows_of(run) == rows_of(tmp_path / "whole")


def test_without_any_valid_checkpoint_nothing_is_overwritten(config, tmp_path):
    fit_and_die_after(make_trainer(tmp_path, config), 8)
    for step in checkpoint.saved_steps(tmp_path):
        (checkpoint.folder_of(tmp_path, step) / "MANIFEST.json").unlink()
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(Error, match="none of them is valid") as e:
        make_trainer(tmp_path, config).fit()
    assert e.value.code == 3
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


def test_the_newest_and_the_best_checkpoints_are_kept(config, tmp_path):
    config = dataclasses.replace(
        config, keep=2, save_every=4, lr=0.3, lr_floor=0.99, warmup=0, steps=90, eval_every=3, eval_windows="all"
    )
    make_trainer(tmp_path, config).fit()
    best = checkpoint.read_state(checkpoint.newest_valid(tmp_path)[0]).best
    steps = checkpoint.saved_steps(tmp_path)
    assert steps[-1] == 90
    assert int(best["step"]) in steps
    assert len(steps) <= 3
    assert open_run(tmp_path, "best").folder == checkpoint.folder_of(tmp_path, int(best["step"]))
    losses = {row["step"]: row["val_loss"] for row in rows_of(tmp_path) if "val_loss" in row}
    assert min(losses, key=losses.get) == best["step"] != 90


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    with torch.no_grad():
        model.weight[0, 0] = math.inf
    with pytest.raises(Error, match="not finite") as e:
        checkpoint.save(tmp_path, model, optimizer, checkpoint.State(step=3), {})
    assert e.value.code == 5
    assert checkpoint.saved_steps(tmp_path) == []


def test_a_parameter_that_has_had_no_gradient_is_saved_and_loaded_without_moments(tmp_path):
    def made():
        model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        return model, torch.optim.AdamW(model.parameters(), fused=True)

    model, optimizer = made()
    model["used"](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    folder = checkpoint.save(tmp_path, model, optimizer, checkpoint.State(step=1), {})
    again, other = made()
    checkpoint.load_weights(folder, again)
    checkpoint.load_moments(folder, again, other)
    assert [len(other.state[p]) for p in again.parameters()] == [3, 3, 0, 0]
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        for key, value in optimizer.state[a].items():
            assert torch.equal(value, other.state[b][key])


@pytest.mark.parametrize("at", ["sampled", "whole split"])
@pytest.mark.parametrize("killed", [False, True])
def test_a_validation_that_a_signal_breaks_off_is_made_when_the_run_goes_on(config, tmp_path, monkeypatch, at, killed):
    make_trainer(tmp_path / "whole", config).fit()
    trainer = make_trainer(tmp_path / "stopped", config)
    last = at == "whole split"
    step = config.steps if last else config.eval_every

    def validation(n_windows):
        for batch in trainer_validation(n_windows):
            if trainer.state.step == step and (n_windows is None) == last:
                trainer._stop.number = 15
            yield batch

    trainer_validation = trainer.task.validation
    trainer.task = dataclasses.replace(trainer.task, validation=validation)
    result = trainer.fit()
    assert (result.step, result.signal) == (step, 15)
    assert rows_of(tmp_path / "stopped")[-1]["step"] < step
    again = make_trainer(tmp_path / "stopped", config)
    if killed:  # after the row, before the save
        monkeypatch.setattr(again.saver, "save", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            again.fit()
        again = make_trainer(tmp_path / "stopped", config)
    again.fit()
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    assert weights_of(tmp_path / "stopped") == weights_of(tmp_path / "whole")
    states = [checkpoint.read_state(checkpoint.newest_valid(tmp_path / name)[0]) for name in ("stopped", "whole")]
    assert states[0] == states[1]


def test_a_first_save_that_fails_is_made_up_for_by_the_same_trainer(config, tmp_path, monkeypatch):
    trainer, real = make_trainer(tmp_path / "a", config), checkpoint.publish

    def full(run, *_):
        raise Error(run, "cannot be written (No space left on device)", "make room", 4)

    monkeypatch.setattr(checkpoint, "publish", full)
    with pytest.raises(Error, match="No space"):
        trainer.fit()
    monkeypatch.setattr(checkpoint, "publish", real)
    trainer.fit()
    make_trainer(tmp_path / "b", config).fit()
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b")
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_a_validation_loss_that_is_not_finite_is_told_and_is_never_the_best(config, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path, config)
    real, first = trainer._measure, []

    def measure(n_windows):
        first.append(trainer.state.step)
        measured = real(n_windows)
        return dataclasses.replace(measured, total=math.nan) if len(first) == 1 else measured

    monkeypatch.setattr(trainer, "_measure", measure)
    trainer.fit()
    assert f"step {first[0]}: the validation loss is not finite" in capsys.readouterr().err
    assert math.isfinite(trainer.state.best["val_loss"])
    assert "val_loss" not in next(row for row in rows_of(tmp_path) if row["step"] == first[0])


def test_a_second_process_is_refused_while_the_first_runs(config, tmp_path):
    from classiclm.files import locked

    with locked(tmp_path), pytest.raises(Error, match="in use") as e:
        make_trainer(tmp_path, config).fit()
    assert e.value.code == 4


COMMAND = [sys.executable, "-m", "classiclm", "train", "gpt2-shakespeare-cpu", "--device", "cpu"]
SMALL = [
    "--batch",
    "4",
    "--steps",
    "60",
    "--save_every",
    "5",
    "--log_every",
    "1",
    "--eval_every",
    "20",
    "--eval_windows",
    "4",
    "--seed",
    "3",
]
SIZES = [
    "--model.n_layers",
    "1",
    "--model.d_model",
    "16",
    "--model.n_heads",
    "2",
    "--model.n_ctx",
    "16",
    "--model.dropout",
    "0.1",
]


def start(run, text_file):
    command = [*COMMAND, *SMALL, *SIZES, "--data", str(text_file), "--out", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for_row(run, step, process):
    path = run / "metrics.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (path.is_file() and path.read_bytes().count(b"\n") >= step):
            return
        time.sleep(0.005)
    raise AssertionError("the run never came to that step")


def test_sigterm_saves_and_leaves_with_143_and_the_run_goes_on_exactly(tmp_path, text_file):
    whole = start(tmp_path / "whole", text_file)
    whole.communicate(timeout=60)
    process = start(tmp_path / "run", text_file)
    wait_for_row(tmp_path / "run", 7, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "the same command goes on from there" in err
    again = start(tmp_path / "run", text_file)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0, err
    assert "from step" in err
    assert out == ""  # stdout is for products
    assert weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigkill_at_random_times_until_done_ends_with_the_same_bytes(tmp_path, text_file):
    whole = start(tmp_path / "whole", text_file)
    whole.communicate(timeout=60)
    for trial in range(4):
        run, kills = tmp_path / f"run-{trial}", 0
        while True:
            process = start(run, text_file)
            wait_for_row(run, 6 + 9 * kills + trial, process)
            if kills < 5 and process.poll() is None:
                process.kill()
            _, err = process.communicate(timeout=60)
            if kills:
                assert "from step" in err or process.returncode == -9
                assert "from step 0" not in err
            kills += 1
            if process.returncode == 0:
                break
        assert kills > 2
        assert weights_of(run) == weights_of(tmp_path / "whole")
        assert rows_of(run) == rows_of(tmp_path / "whole")
        assert not list((run / "checkpoints").glob(".tmp-*"))
