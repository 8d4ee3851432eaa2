"""`train` under torchrun: two processes do what one does, and a run may change their number, lose one, be stopped."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from classiclm.files import sha256_of_file
from classiclm.train import checkpoint

SOURCE = Path(__file__).resolve().parent.parent / "src"
STRATEGIES = ("ddp", "fsdp")
TIMEOUT = 6  # seconds of silence; starting up is not counted
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="asks /proc for torchrun's children"),
]


def environment():
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def command(text_file, run, steps, n, *rest, launcher=(), strategy="ddp"):
    sizes = ["--model.n_layers", 2, "--model.d_model", 16, "--model.n_heads", 2, "--model.n_ctx", 12]
    every = ["--log_every", 1, "--eval_every", 10, "--save_every", 5, "--keep", 4, "--timeout", 20]
    fixed = ["--batch", 8, "--steps", steps, "--device", "cpu", "--precision", "fp32"]
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *launcher] if n > 1 else []
    shared = ["--strategy", strategy] if n > 1 else []
    made = [*start, "-m", "classiclm", "train", "gpt2-shakespeare-cpu", "--data", text_file, "--out", run]
    return [sys.executable, *map(str, [*made, *sizes, *every, *fixed, *shared, *rest])]


def train(*arguments, **settings):
    done = subprocess.run(
        command(*arguments, **settings), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows_of(run):
    """Without what depends on the clock; a row that is being written is not there yet."""
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "seconds")} for row in rows]


def losses(run):
    return [row["loss"] for row in rows_of(run)]


def bytes_of(run, steps):
    """The sums of a checkpoint's files: the weights, the moments, each rank's own and what goes with them."""
    folder = checkpoint.folder_of(run, steps)
    return {path.name: sha256_of_file(path) for path in folder.iterdir()}


def check_same(run, whole, steps):
    assert bytes_of(run, steps) == bytes_of(whole, steps)
    assert rows_of(run) == rows_of(whole)
    assert [row["step"] for row in rows_of(run)] == list(range(1, steps + 1))


@pytest.mark.parametrize(("strategy", "numbers"), [("ddp", (1, 2, 1)), ("fsdp", (2, 1, 2))])
def test_the_number_of_processes_may_change_from_start_to_start(text_file, tmp_path, strategy, numbers):
    for steps, n in zip((5, 10, 15), numbers, strict=True):
        train(text_file, tmp_path / "one", steps, 1)  # with the same ends: the rate's schedule follows from them
        train(text_file, tmp_path / "changing", steps, n, strategy=strategy)
    assert len(losses(tmp_path / "one")) == 15
    assert losses(tmp_path / "changing") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_losses_of_one(text_file, tmp_path, strategy):
    train(text_file, tmp_path / "one", 20, 1)
    train(text_file, tmp_path / "two", 20, 2, strategy=strategy)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


class Launched:
    """A torchrun that is at work, and the ids of its two processes."""

    def __init__(self, arguments, log):
        self.log, self.arguments = log, arguments
        with log.open("w") as file:
            self.process = subprocess.Popen(arguments, env=environment(), stdout=file, stderr=file)

    @property
    def said(self):
        return self.log.read_text()

    def wait_for_step(self, run, step):
        give_up = time.monotonic() + 120
        while len(rows_of(run)) < step:
            time.sleep(0.02)
            assert self.process.poll() is None, self.said
            assert time.monotonic() < give_up, self.said

    def ranks(self):
        """The process ids, by rank: torchrun starts them in this order."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in listed if b"classiclm" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def exit_codes(self):
        """Rank -> exit code, as torchrun's last words have it."""
        found = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", self.said)
        return {int(rank): int(code) for rank, code in found}


@contextmanager
def launched(tmp_path, *arguments, **settings):
    job = Launched(command(*arguments, **settings), tmp_path / "said.txt")
    try:
        yield job
    finally:
        ranks = job.ranks() if job.process.poll() is None else []
        for pid in (*ranks, job.process.pid):
            if job.process.poll() is None:
                os.kill(pid, signal.SIGKILL)
        job.process.wait()


def is_gone(pid):
    """Ended, whether or not torchrun has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(("kind", "victim", "strategy"), [
    ("SIGKILL", 1, "ddp"), ("SIGKILL", 0, "fsdp"), ("SIGSTOP", 1, "fsdp"), ("SIGSTOP", 0, "ddp"),
])  # fmt: skip
def test_who_is_left_behind_ends_in_time_with_code_6_and_names_the_other(text_file, tmp_path, kind, victim, strategy):
    run = tmp_path / "run"
    arguments = (text_file, run, 100_000, 2, "--timeout", TIMEOUT)
    with launched(tmp_path, *arguments, strategy=strategy) as job:
        job.wait_for_step(run, random.Random(f"{kind} {victim}").randrange(5, 60))
        ranks = job.ranks()
        os.kill(ranks[victim], getattr(signal, kind))
        since = time.monotonic()
        while not is_gone(ranks[1 - victim]):
            time.sleep(0.05)
            assert time.monotonic() - since <= TIMEOUT + 5, job.said
        if kind == "SIGSTOP":
            os.kill(ranks[victim], signal.SIGKILL)  # as torchrun does, 30 seconds later
        assert job.process.wait(60) == 1
    step = rows_of(run)[-1]["step"]
    (line,) = [line for line in job.said.splitlines() if line.startswith("error: ")]
    named = re.match(rf"error: rank {victim}: step (\d+): .* Fix: .", line)
    assert named, line
    assert abs(int(named[1]) - step) <= 1
    assert job.exit_codes() == {victim: -signal.SIGKILL, 1 - victim: 6}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Strategy -> a run that nothing has happened to, and its text."""
    made = {}

    def make(strategy):
        if strategy not in made:
            folder = tmp_path_factory.mktemp("whole")
            text = folder / "small.txt"
            text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 80)
            train(text, folder / "run", 120, 2, strategy=strategy)
            made[strategy] = (folder / "run", text)
        return made[strategy]

    return make


@pytest.mark.parametrize(("victim", "strategy"), [(1, "ddp"), (0, "fsdp")])
def test_a_killed_process_is_started_again_and_the_run_ends_with_the_same_bytes(whole, tmp_path, victim, strategy):
    run, (same, text) = tmp_path / "run", whole(strategy)
    with launched(tmp_path, text, run, 120, 2, strategy=strategy, launcher=("--max-restarts", "1")) as job:
        job.wait_for_step(run, random.Random(victim).randrange(12, 60))
        os.kill(job.ranks()[victim], signal.SIGKILL)
        assert job.process.wait(200) == 0, job.said
    assert f"continuing {run} from step " in job.said
    check_same(run, same, 120)


def check_codes(job, code):
    """torchrun takes whoever leaves first for a failure, and sends SIGTERM to the other, which is done by then."""
    first, other = sorted(job.exit_codes().values(), reverse=True)
    assert first == code, job.said
    assert other in (code, -signal.SIGTERM), job.said


@pytest.mark.parametrize(("number", "to", "strategy"), [
    ("SIGTERM", "launcher", "ddp"), ("SIGUSR1", "launcher", "fsdp"), ("SIGTERM", 1, "fsdp"), ("SIGUSR1", 0, "ddp"),
])  # fmt: skip
def test_a_signal_stops_all_at_one_step_and_the_same_command_goes_on(whole, tmp_path, number, to, strategy):
    """To torchrun, which hands it on, or to one process, which tells the other."""
    run, (same, text) = tmp_path / "run", whole(strategy)
    launcher = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    with launched(tmp_path, text, run, 120, 2, strategy=strategy, launcher=launcher) as job:
        job.wait_for_step(run, random.Random(f"{number} {to}").randrange(5, 60))
        os.kill(job.process.pid if to == "launcher" else job.ranks()[to], getattr(signal, number))
        code = job.process.wait(60)
    n = getattr(signal, number)
    step = int(job.said.split(f"stopped by signal {n} at step ")[1].split(", saved")[0])
    assert step < 120
    assert checkpoint.newest_valid(run) == (checkpoint.folder_of(run, step), [])
    owed = bool(checkpoint.read_state(checkpoint.folder_of(run, step)).owed)  # if its validation was broken off
    assert len(rows_of(run)) + owed == step
    assert code == 1
    if to != "launcher":
        check_codes(job, 128 + n)
    said = train(text, run, 120, 2, strategy=strategy)
    assert f"continuing {run} from step {step}" in said
    check_same(run, same, 120)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_diverging_run_ends_with_code_5_on_all_ranks(text_file, tmp_path, strategy):
    """A rate beyond all measure makes the loss infinite within a few steps."""
    rate = ("--lr", "1e30", "--warmup", "1")
    with launched(tmp_path, text_file, tmp_path / "run", 50, 2, *rate, strategy=strategy) as job:
        assert job.process.wait(100) == 1
    assert job.said.count("training diverged") == 2
    check_codes(job, 5)
