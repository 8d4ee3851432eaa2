"""Signals are requests: the step in hand is finished and saved, and the exit code names the signal."""

import dataclasses
import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from classiclm.errors import Error
from classiclm.train import checkpoint
from classiclm.train.signals import ASKING, StopRequest, stop_requests

SOURCE = Path(__file__).resolve().parent.parent / "src"


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_noted_and_its_handler_given_back(number):
    request, before = StopRequest(), signal.getsignal(number)
    with stop_requests(request):
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert request.number == number
    assert signal.getsignal(number) == before


def test_a_second_signal_ends_at_once():
    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt), stop_requests(StopRequest()):
        twice()


def test_what_takes_longer_than_the_patience_ends_by_itself():
    program = (
        "import os, signal, time\n"
        "from classiclm.train.signals import StopRequest, stop_requests\n"
        "with stop_requests(StopRequest(), patience=0.3):\n"
        "    os.kill(os.getpid(), signal.SIGUSR1)\n"
        "    time.sleep(60)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(SOURCE)}, check=False)
    assert done.returncode == 128 + signal.SIGUSR1
    assert time.monotonic() - began < 20


def test_a_save_in_time_stops_the_watch():
    with stop_requests(StopRequest(), patience=0.2):
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.01)
    time.sleep(0.4)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def train(text_file, run, steps=400):
    sizes = ["--model.n_layers", "1", "--model.d_model", "16", "--model.n_heads", "2", "--model.n_ctx", "12"]
    rest = ["--batch", "4", "--steps", str(steps), "--save_every", "50", "--eval_every", "200", "--device", "cpu"]
    command = [sys.executable, "-m", "classiclm", "train", "gpt2-shakespeare-cpu", "--data", str(text_file)]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(run), *sizes, *rest], env=environment, stderr=subprocess.PIPE, text=True
    )


def n_rows(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_whenever_a_signal_comes_no_step_that_was_done_is_lost(text_file, tmp_path):
    """Twelve signals at random times of one run: each leaves with 128 + n, saved at the very step it stopped at."""
    rng, run, done = random.Random(3), tmp_path / "run", 0
    for i in range(12):
        child = train(text_file, run, steps=20_000)
        while n_rows(run) <= done // 10 + 1:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        number = ASKING[i % len(ASKING)]
        child.send_signal(number)
        _, said = child.communicate(timeout=60)
        assert child.returncode == 128 + number, said
        stopped = int(said.split("at step ")[1].split(",")[0])
        assert checkpoint.saved_steps(run)[-1] == stopped > done
        done = stopped


def fail_saves(monkeypatch, steps):
    """ENOSPC at the saves of these steps."""
    real = checkpoint.publish

    def publish(run, snapshot, world):
        if snapshot.step in steps:
            raise Error(run, f"cannot be written ({os.strerror(errno.ENOSPC)})", "make room", 4)
        return real(run, snapshot, world)

    monkeypatch.setattr(checkpoint, "publish", publish)


@pytest.fixture
def trainer(text_file, tmp_path):
    from classiclm.commands.runs import make_trainer
    from classiclm.data.corpora import Data
    from classiclm.recipe import Recipe
    from classiclm.train.settings import TrainConfig
    from test_trainer import MODEL

    recipe = dataclasses.asdict(Recipe(batch=4, steps=20, lr=1e-2, warmup=5))
    every = {"log_every": 5, "eval_every": 20, "save_every": 4}
    preset = "gpt2-shakespeare-cpu"
    data = Data(str(text_file))
    return make_trainer(
        tmp_path / "run", TrainConfig(**recipe, **every, preset=preset, data=data, device="cpu", model=MODEL)
    )


def test_one_save_that_fails_is_a_warning_and_training_goes_on(trainer, monkeypatch, capsys):
    fail_saves(monkeypatch, {8})
    assert trainer.fit().step == 20
    assert checkpoint.saved_steps(trainer.run)[-2:] == [16, 20]
    said = capsys.readouterr().err
    assert "No space left" in said
    assert "next save" in said


@pytest.mark.parametrize(("steps", "last"), [({8, 12}, 4), ({20}, 16), ({1}, None)])
def test_two_in_a_row_or_the_last_one_end_the_run_and_the_old_checkpoint_stays(trainer, monkeypatch, steps, last):
    fail_saves(monkeypatch, steps)
    with pytest.raises(Error, match="No space left") as e:
        trainer.fit()
    assert e.value.code == 4
    assert (checkpoint.saved_steps(trainer.run) or [None])[-1] == last


def test_a_run_that_saves_in_a_thread_has_the_bytes_of_one_that_does_not(trainer, tmp_path):
    from classiclm.commands.runs import make_trainer
    from classiclm.files import sha256_of_file

    trainer.fit()
    other = make_trainer(tmp_path / "async", dataclasses.replace(trainer.config, async_save=True))
    other.fit()
    assert checkpoint.saved_steps(other.run) == checkpoint.saved_steps(trainer.run)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        one, two = (sha256_of_file(checkpoint.folder_of(run, 20) / name) for run in (trainer.run, other.run))
        assert one == two
