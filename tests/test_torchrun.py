"""`train` under torchrun: what two processes do is what one does, and a run may change their number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def environment():
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def command(text_file, run, steps, n, *flags):
    sizes = ["--model.n_layers", 2, "--model.d_model", 16, "--model.n_heads", 2, "--model.n_ctx", 12]
    every = ["--log_every", 1, "--eval_every", 10, "--save_every", 5, "--keep", 4, "--timeout", 20]
    rest = ["--batch", 8, "--steps", steps, "--device", "cpu", "--precision", "fp32"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *flags] if n > 1 else []
    strategy = ["--strategy", "ddp"] if n > 1 and "--strategy" not in flags else []
    made = [*launcher, "-m", "classiclm", "train", "gpt2-shakespeare-cpu", "--data", text_file, "--out", run]
    return [sys.executable, *map(str, [*made, *sizes, *every, *rest, *strategy])]


def train(text_file, run, steps, n, *rest):
    done = subprocess.run(
        [*command(text_file, run, steps, n), *rest], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("strategy", "numbers"), [("ddp", (1, 2, 1)), ("fsdp", (2, 1, 2))])
def test_the_number_of_processes_may_change_from_start_to_start(text_file, tmp_path, strategy, numbers):
    for steps, n in zip((5, 10, 15), numbers, strict=True):
        train(text_file, tmp_path / "one", steps, 1)  # with the same ends: the rate's schedule follows from them
        train(text_file, tmp_path / "changing", steps, n, *(["--strategy", strategy] if n > 1 else []))
    assert len(losses(tmp_path / "one")) == 15
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(text_file, tmp_path, strategy):
    train(text_file, tmp_path / "one", 20, 1)
    train(text_file, tmp_path / "two", 20, 2, "--strategy", strategy)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
