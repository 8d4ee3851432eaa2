"""Signals: a loop of training is saved at the step in hand; all else is left where it stands, and can go on."""

import dataclasses
import errno
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from classiclm.cli import main
from classiclm.errors import Error
from classiclm.files import sha256, sha256_of_file
from classiclm.train import checkpoint
from classiclm.train.signals import ASKING, StopRequest, farewell, interruptible, stop_requests

SOURCE = Path(__file__).resolve().parent.parent / "src"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


# How signals are heard


def send(number):
    """A signal to this process; it has the time to arrive."""
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_is_noted_and_its_handler_given_back(number):
    request, before = StopRequest(), signal.getsignal(number)
    with stop_requests(request):
        send(number)
    assert request.number == number
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", ASKING)
def test_what_has_nothing_to_save_is_interrupted(number):
    request, before = StopRequest(), (signal.getsignal(number), sys.unraisablehook)
    with pytest.raises(KeyboardInterrupt), interruptible(request):
        send(number)
    assert request.number == number
    assert (signal.getsignal(number), sys.unraisablehook) == before


def test_the_inner_block_hears_and_then_the_outer_one_again():
    outer, inner, heard = StopRequest(), StopRequest(), []

    def work():
        with stop_requests(inner):
            send(signal.SIGUSR1)
        heard.append((outer.number, inner.number))
        send(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt), interruptible(outer):
        work()
    assert heard == [(None, signal.SIGUSR1)]
    assert outer.number == signal.SIGTERM


def test_nobody_watches_when_the_block_is_left():
    with stop_requests(StopRequest(), patience=0.2):
        send(signal.SIGUSR1)
    time.sleep(0.4)
    assert not [thread for thread in threading.enumerate() if thread.name == "signals"]


def test_a_thread_that_is_not_the_main_one_leaves_signals_to_it():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with interruptible(StopRequest()):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


_HEADER = """
import hashlib, os, signal, sys, time
from classiclm.train.signals import StopRequest, interruptible, stop_requests
def compute():  # for minutes, and Python gets no word in
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
class Finaliser:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
"""


def python(body, **files):
    """A process that runs a program, with other modules beside it."""
    code = "".join(f"open({name + '.py'!r}, 'w').write({text!r})\n" for name, text in files.items())
    program = [sys.executable, "-c", f"import sys; sys.path.insert(0, '')\n{code}{_HEADER}{body}"]
    return subprocess.Popen(program, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("block", ["stop_requests(StopRequest())", "interruptible(StopRequest())"])
def test_a_second_signal_ends_the_process_at_once_whatever_it_is_at(block):
    child = python(f"with {block}: compute()")
    assert child.stdout.readline() == "ready\n"
    time.sleep(0.2)  # now it computes
    child.send_signal(signal.SIGUSR1)
    time.sleep(0.4)
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=20)
    assert time.monotonic() - began < 5
    assert (child.returncode, said) == (128 + signal.SIGTERM, farewell(signal.SIGTERM) + "\n")


def test_a_signal_that_a_launcher_sends_twice_is_one():
    child = python(
        "request = StopRequest()\n"
        "with stop_requests(request):\n"
        "    print('ready', flush=True)\n"
        "    while request.number is None: time.sleep(0.001)\n"
        "    time.sleep(0.5)\n"
        "    print('saved')"
    )
    assert child.stdout.readline() == "ready\n"
    for _ in range(2):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    assert child.communicate(timeout=20) == ("saved\n", "")
    assert child.returncode == 0


def test_what_takes_longer_than_the_patience_ends_by_itself():
    child = python("with stop_requests(StopRequest(), patience=0.3): compute()")
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGUSR1)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, said) == (128 + signal.SIGUSR1, farewell(signal.SIGUSR1) + "\n")


@pytest.mark.parametrize(
    "body",
    [
        "Finaliser()",  # from which no exception is passed on
        "import slow",  # where extension modules may print it, and raise another
        "try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)\n    except: time.sleep(60)",  # a library's mistake
    ],
)
def test_an_interruption_that_is_swallowed_ends_the_process_too(body, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slow = "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)\n"
    child = python(f"with interruptible(StopRequest()):\n    {body}\n    time.sleep(60)", slow=slow)
    _, said = child.communicate(timeout=20)
    assert (child.returncode, said) == (128 + signal.SIGTERM, farewell(signal.SIGTERM) + "\n")


# Commands that have nothing to save


@pytest.mark.parametrize("number", ASKING)
@pytest.mark.parametrize("made_of_it", [None, ImportError("numpy failed to import"), BrokenPipeError()])
def test_a_command_ends_with_128_and_the_number_and_says_what_to_do(cli, monkeypatch, number, made_of_it):
    def command(argv, prog):
        try:
            send(number)
        except KeyboardInterrupt:
            raise made_of_it or KeyboardInterrupt from None

    monkeypatch.setattr("classiclm.commands.models.main", command)
    assert cli("models") == (128 + number, "", farewell(number) + "\n")


# A command whose phases take longer than they do. What is named is looked up when it is called: each call takes so many
# seconds more, and the first one leaves a mark that it is under way. Spawned workers import this program again.
_SLOW = """
import importlib, os, sys, time
from classiclm import cli
def slow(place, seconds, call=None):
    module, _, name = place.partition(":")
    owner = importlib.import_module(module)
    *inner, name = name.split(".")
    for part in inner:
        owner = getattr(owner, part)
    real = getattr(owner, name)
    def called(*arguments, **keywords):
        open(os.environ["MARK"], "w").close()
        time.sleep(seconds)
        return real(*arguments, **keywords)
    setattr(owner, name, called)
"""


def start(patch, arguments, mark):
    """A process of its own group that runs a command; it makes the file `mark` when the phase is under way."""
    mark.unlink(missing_ok=True)
    end = 'if __name__ == "__main__":\n    sys.exit(cli.main())'
    program = mark.with_name("program.py")
    program.write_text(f"{_SLOW}{patch}\n{end}")
    return subprocess.Popen(
        [sys.executable, program, *map(str, arguments)],
        env={**ENVIRONMENT, "MARK": str(mark), "XDG_CACHE_HOME": str(mark.parent / "cache"), "CLASSICLM_DATA": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(mark, child):
    while not mark.exists():
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.002)


@dataclasses.dataclass
class Tally:
    """What came of the signals that were sent."""

    counts: Counter = dataclasses.field(default_factory=Counter)
    slowest: float = 0.0  # seconds from a signal to the end

    def strike(self, child, number, whole_group):
        """Send a signal, and see that the process ends as it should, with all it has started; what it said."""
        began = time.monotonic()
        (os.killpg if whole_group else os.kill)(child.pid, number)
        _, said = child.communicate(timeout=60)
        took = time.monotonic() - began
        self.counts[signal.Signals(number).name] += 1
        self.slowest = max(self.slowest, took)
        assert child.returncode == 128 + number, said
        assert "Traceback" not in said, said
        assert "Exception ignored" not in said, said
        assert "the same command goes on from there" in said.splitlines()[-1]
        assert is_empty(child.pid), "it has left processes behind"
        return said

    def __str__(self):
        sent = ", ".join(f"{name} {n}" for name, n in sorted(self.counts.items()))
        return f"{sum(self.counts.values())} signals ({sent}), slowest end after {self.slowest:.2f} s"


def is_empty(group):
    """Whether no process of a group is left; what has just been killed gets a moment."""
    give_up = time.monotonic() + 3
    while time.monotonic() < give_up:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def no_leftovers(folder):
    return not list(folder.rglob(".classiclm-tmp-*"))


def texts(folder, n_files=12, n_documents=8):
    """Files of documents that differ, and some that hardly do."""
    rng = random.Random(0)
    words = "cat dog mat log sun sea hill road bird tree house river stone wind snow".split()  # noqa: SIM905
    folder.mkdir()
    for i in range(n_files):
        blocks = [" ".join(rng.choices(words, k=60)) + "." for _ in range(n_documents)]
        blocks.append(blocks[0] + " indeed")
        (folder / f"{i:02d}.txt").write_text("\n\n".join(blocks))
    return folder


_BLOCKS = "from classiclm.data import prepare, exports\nprepare.BLOCK_CHARS = 1500\nexports._PIECE = 100\n"
_PREPARE = {  # phase -> what takes longer, and flags
    "hashing": ("slow('classiclm.data.sources:_row', 0.3)", []),
    "learning the tokenizer": ("slow('classiclm.data.prepare:content_key', 0.1)", []),
    "tokenising": ("slow('classiclm.data.workers:make_piece', 0.3)", []),
    "tokenising in two processes": ("slow('classiclm.data.workers:make_piece', 0.6)", ["--workers", 2]),
    "duplicates": ("slow('classiclm.data.duplicates:NearIndex.add', 0.03)", []),
    "shards": ("slow('classiclm.data.reduce:write_shard', 0.3)", []),
    "a slow disk": ("slow('os:fsync', 0.3)", []),
    "exports": ("slow('classiclm.data.exports:write_stream', 0); slow('os:fsync', 0.5)", []),
}


def prepare_command(folder, out):
    steps = ["--cleaning", "whitespace,exact,near", "--documents", "block", "--val_share", 0.1]
    sizes = ["--tokenizer", "bpe-300", "--shard_tokens", 500, "--workers", 1, "--export", "nanogpt"]
    return ["prepare", folder, "--out", out, *steps, *sizes]


def sums(out):
    files = (path for path in sorted(out.rglob("*")) if path.suffix in (".bin", ".idx", ".json"))
    return {str(path.relative_to(out)): sha256_of_file(path) for path in files}


def test_prepare_takes_its_workers_with_it_when_it_is_stopped(tmp_path):
    texts(tmp_path / "texts")
    command = [*prepare_command(tmp_path / "texts", tmp_path / "out"), "--workers", 2]
    child = start(_BLOCKS + "slow('classiclm.data.workers:make_piece', 60)", command, tmp_path / "mark")
    wait_for(tmp_path / "mark", child)
    Tally().strike(child, signal.SIGTERM, whole_group=False)
    assert no_leftovers(tmp_path / "out")
    assert not (tmp_path / "out" / "meta.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_prepare_can_be_stopped_in_every_phase_and_ends_with_the_same_bytes(tmp_path, capsys):
    rng, folder = random.Random(1), texts(tmp_path / "texts")
    whole = start(_BLOCKS, prepare_command(folder, tmp_path / "whole"), tmp_path / "mark")
    assert whole.wait(timeout=100) == 0
    n = 0
    for phase, (patch, flags) in _PREPARE.items():
        tally, out = Tally(), tmp_path / phase
        command = [*prepare_command(folder, out), *flags]
        for number in rng.sample(ASKING, 3):
            child = start(_BLOCKS + patch, command, tmp_path / "mark")
            wait_for(tmp_path / "mark", child)
            time.sleep(rng.uniform(0, 0.8))
            tally.strike(child, number, whole_group=n % 2 == 0)
            n += 1
            assert not (out / "meta.json").exists() or phase == "exports"
        assert start(_BLOCKS, command, tmp_path / "mark").wait(timeout=100) == 0
        assert sums(out) == sums(tmp_path / "whole")
        assert no_leftovers(out)
        assert tally.slowest < 2
        with capsys.disabled():
            print(f"\nprepare, {phase}: {tally}", end="")


class Drips(http.server.BaseHTTPRequestHandler):
    """A server that takes a second for 100 kB, and goes on where it was asked to."""

    body = bytes(range(256)) * 4000

    def do_GET(self):
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"one"')
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.body) - 1}/{len(self.body)}")
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        try:
            for i in range(start, len(self.body), 1000):
                self.wfile.write(self.body[i : i + 1000])
                time.sleep(0.01)
        except OSError:  # the client was stopped
            self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_download_that_is_stopped_goes_on_where_it_was(tmp_path, capsys):
    rng, tally = random.Random(2), Tally()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Drips)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    patch = (
        "from classiclm.data import corpora, locate\n"
        f"url, digest = 'http://127.0.0.1:{server.server_port}', {sha256(Drips.body)!r}\n"
        "corpora.SHAKESPEARE = locate.Download('a.txt', url, digest)\n"
        "slow('classiclm.data.locate:_receive', 0)"
    )
    place, before = tmp_path / "cache" / "classiclm" / "a.txt", 0
    command = ["train", "gpt2-shakespeare-cpu", "--data", "shakespeare", "--out", tmp_path / "run", "--device", "cpu"]
    for i in range(12):
        child = start(patch, command, tmp_path / "mark")
        wait_for(tmp_path / "mark", child)
        time.sleep(rng.uniform(0.1, 0.5))
        tally.strike(child, ASKING[i % 3], whole_group=i % 2 == 0)
        assert not place.exists()
        there = place.with_name("a.txt.part").stat().st_size
        assert there > before
        before = there
    server.shutdown()
    server.server_close()
    assert tally.slowest < 2
    with capsys.disabled():
        print(f"\ndownload: {tally}, {before:,} bytes there", end="")


SIZES = [f"--model.{name}={n}" for name, n in {"n_layers": 1, "d_model": 16, "n_heads": 2, "n_ctx": 12}.items()]


def train_command(text, run, **settings):
    every = {"batch": 4, "steps": 20_000, "save_every": 50, "eval_every": 200, "device": "cpu", **settings}
    flags = [f"--{name}={value}" for name, value in every.items()]
    return ["train", "gpt2-shakespeare-cpu", "--data", text, "--out", run, *SIZES, *flags]


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """A text whose validation takes a small model seconds."""
    path = tmp_path_factory.mktemp("long") / "long.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log.\n" * 20_000)
    return path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_generating_evaluating_and_climbing_can_be_stopped(text_file, long_text, tmp_path, capsys):
    assert main([str(a) for a in train_command(text_file, tmp_path / "run", steps=2)]) == 0
    longer, whole = ["--data", long_text], ["--split", "train"]
    phases = {
        "generate": ("generate:_new_tokens", ["generate", tmp_path / "run", "--max_new_tokens", 10**6], 12, 0.5),
        "evaluate": ("evaluate:mean_loss", ["evaluate", tmp_path / "run", *longer, *whole], 12, 0.5),
        "ladder": ("ladder:make_trainer", ["ladder", "--out", tmp_path / "ladder", *longer, "--device", "cpu"], 12, 3),
        "start": (None, ["evaluate", tmp_path / "run", *longer, *whole], 12, 2),
    }
    rng = random.Random(5)
    for phase, (place, command, n, latest) in phases.items():
        tally = Tally()
        mark = "open(os.environ['MARK'], 'w').close()"
        patch = f"slow('classiclm.commands.{place}', 0)" if place else mark
        for i in range(n):
            child = start(patch, command, tmp_path / "mark")
            wait_for(tmp_path / "mark", child)
            time.sleep(rng.uniform(0.05, latest))
            tally.strike(child, ASKING[i % 3], whole_group=i % 2 == 0)
        assert tally.slowest < 2
        with capsys.disabled():
            print(f"\n{phase}: {tally}", end="")


# Training


def n_rows(run):
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


_TRAIN = {  # phase -> what leaves the mark, settings, seconds that a signal may take
    "loop": ("train.step:Stepper.__call__", {}, 2),
    "validation": ("train.trainer:Trainer._measure", {"eval_every": 10, "eval_windows": "all"}, 2),
    "save": ("train.checkpoint:publish", {"save_every": 2}, 5),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("phase", _TRAIN)
def test_whenever_a_signal_comes_no_step_that_was_done_is_lost(text_file, long_text, tmp_path, capsys, phase):
    """Twelve signals to one run: each leaves with 128 + n, saved at the very step it stopped at."""
    rng, run, tally, done = random.Random(3), tmp_path / "run", Tally(), 0
    place, settings, limit = _TRAIN[phase]
    patch = f"slow('classiclm.{place}', 0)"
    if phase == "save":
        patch += "\nreal = os.fsync\nos.fsync = lambda descriptor: (time.sleep(0.05), real(descriptor))"
    text = long_text if phase == "validation" else text_file
    for i in range(12):
        child = start(patch, train_command(text, run, log_every=1, **settings), tmp_path / "mark")
        wait_for(tmp_path / "mark", child)
        time.sleep(rng.uniform(0, 0.5))
        said = tally.strike(child, ASKING[i % 3], whole_group=i % 2 == 0)
        stopped = int(said.split("at step ")[1].split(",")[0])
        assert checkpoint.saved_steps(run)[-1] == stopped >= done
        owed = bool(checkpoint.read_state(checkpoint.folder_of(run, stopped)).owed)  # if its validation was broken off
        assert n_rows(run) + owed == stopped  # every step that was done is logged, and saved
        assert no_leftovers(run)
        done = stopped
    assert tally.slowest < limit
    with capsys.disabled():
        print(f"\ntraining, {phase}: {tally}, {done} steps and none of them lost", end="")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_signal_ends_a_slow_save_and_the_run_can_go_on(text_file, tmp_path, capsys):
    rng, run, slowest = random.Random(6), tmp_path / "run", 0.0
    assert main([str(a) for a in train_command(text_file, run, steps=40, save_every=10)]) == 0
    patch = "real, mark = os.fsync, os.environ['MARK']\n"
    patch += "os.fsync = lambda descriptor: (time.sleep(5 * os.path.exists(mark)), real(descriptor))"
    patch += "\nslow('classiclm.train.checkpoint:publish', 0)"
    for i in range(6):
        child = start(patch, train_command(text_file, run, steps=80, save_every=10), tmp_path / "mark")
        wait_for(tmp_path / "mark", child)
        time.sleep(rng.uniform(0, 0.5))
        child.send_signal(ASKING[i % 3])
        time.sleep(0.4)
        assert child.poll() is None  # it is still saving
        began, second = time.monotonic(), ASKING[(i + 1) % 3]
        child.send_signal(second)
        _, said = child.communicate(timeout=60)
        slowest = max(slowest, time.monotonic() - began)
        assert child.returncode == 128 + second
        assert said.splitlines()[-1] == farewell(second)
        assert "Traceback" not in said
        assert checkpoint.newest_valid(run)[0] == checkpoint.folder_of(run, 40)
    assert slowest < 2
    assert main([str(a) for a in train_command(text_file, run, steps=80, save_every=10)]) == 0
    assert no_leftovers(run)
    with capsys.disabled():
        print(f"\nsecond signals: 6, slowest end after {slowest:.2f} s", end="")


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
