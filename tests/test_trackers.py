"""Trackers: their files, read back by readers of our own, hold the numbers of metrics.jsonl, also after a kill; and
nothing that a tracker does can touch a run."""

import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import zlib

import pytest

from classiclm.train import trackers
from classiclm.train.trackers import Background, make_tracker

INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("wandb", "tensorboard")}
REAL = [
    pytest.param(name, marks=pytest.mark.skipif(not there, reason=f"{name} is not installed"))
    for name, there in INSTALLED.items()
]
CONFIG = {"preset": "gpt2-124m", "lr": 6e-4, "model": {"n_layers": 12}}


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def row(step, attempt=1):
    """A row that says in which attempt it was logged: what is done again has other times."""
    more = {"val_loss": 3.0 + 1 / step, "bits_per_byte": 1 / 3} if step % 4 == 0 else {}
    return {
        "step": step,
        "tokens": step * 16384,
        "loss": 4.0 / step,
        "lr": 6e-4 * step,
        "grad_norm": None if step == 2 else 0.1 * step,
        "tokens_per_s": 1000.1 * attempt,
        "grad_norm/blocks.0": 1e-3 * step,
        **more,
        "seconds": 0.25 * step,
    }


# Readers that share no code with the writers


def wandb_records(run):
    """All records of the one offline file, up to the one that ends it: W&B's own process writes it, and may do so a
    moment after it has said that it is done."""
    (path,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    for _ in range(1000):
        records = list(parse_wandb(path.read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.01)
    raise AssertionError(f"{path} has no end")


def parse_wandb(data):
    """A .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        crc, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            break
        part = data[at + 7 : at + 7 + length]
        if len(part) < length:  # still being written
            break
        assert zlib.crc32(bytes([kind]) + part) == crc
        parts.append(part)
        at += 7 + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def rows_of_wandb(run):
    rows = []
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join([item.key or "", *item.nested_key]).lstrip("/"): item for item in record.history.item}
            assert json.loads(items.pop("_step").value_json) == json.loads(items["step"].value_json)
            rows.append({k: json.loads(v.value_json) for k, v in items.items() if k not in ("_timestamp", "_runtime")})
    return rows


def crc32c(data):
    """Castagnoli's, bit by bit, masked as TensorFlow's records have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def tensorboard_events(run):
    from tensorboard.compat.proto import event_pb2

    for path in sorted((run / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,), (sum_of_length,) = (
                struct.unpack("<Q", data[at : at + 8]),
                struct.unpack("<I", data[at + 8 : at + 12]),
            )
            body = data[at + 12 : at + 12 + length]
            assert crc32c(data[at : at + 8]) == sum_of_length
            assert crc32c(body) == struct.unpack("<I", data[at + 12 + length : at + 16 + length])[0]
            yield event_pb2.Event.FromString(body)
            at += 16 + length


def rows_of_tensorboard(run):
    rows = []
    for event in tensorboard_events(run):
        values = {value.tag: value.simple_value for value in event.summary.value if value.HasField("simple_value")}
        if values:
            rows.append({"step": event.step, **values})
    return rows


def float32(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


def assert_same_as_metrics(name, run, rows):
    """What the tracker's files hold is what metrics.jsonl holds, row by row; TensorBoard keeps 32 bits."""
    wanted = [{key: value for key, value in each.items() if value is not None} for each in rows]
    if name == "wandb":
        assert rows_of_wandb(run) == wanted
        return
    found = rows_of_tensorboard(run)
    assert [each["step"] for each in found] == [each["step"] for each in wanted]
    for ours, theirs in zip(wanted, found, strict=True):
        assert {k: float32(v) for k, v in ours.items() if k != "step"} == {
            k: v for k, v in theirs.items() if k != "step"
        }


@pytest.mark.parametrize("name", REAL)
def test_a_tracker_holds_the_numbers_of_metrics_jsonl(name, tmp_path, capsys):
    rows = [row(step) for step in range(1, 30)]
    with make_tracker(name, tmp_path, CONFIG, []) as tracker:
        for each in rows:
            tracker.log(each)
    assert_same_as_metrics(name, tmp_path, rows)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == ""


@pytest.mark.parametrize("name", REAL)
def test_a_run_that_goes_on_has_each_step_once_and_none_missing(name, tmp_path):
    """Twice: the rows behind the checkpoint are done again, with other times."""
    standing = []
    for attempt, (first, last, saved) in enumerate([(1, 12, 7), (8, 9, 8), (9, 20, 20)], 1):
        with make_tracker(name, tmp_path, CONFIG, standing) as tracker:
            rows = [row(step, attempt) for step in range(first, last + 1)]
            for each in rows:
                tracker.log(each)
        standing = [each for each in [*standing, *rows] if each["step"] <= saved]
    assert [each["step"] for each in standing] == list(range(1, 21))
    assert_same_as_metrics(name, tmp_path, standing)


@pytest.mark.parametrize("name", REAL)
def test_a_tracker_that_is_named_late_has_the_whole_history(name, tmp_path):
    rows = [row(step) for step in range(1, 9)]
    with make_tracker(name, tmp_path, CONFIG, rows[:6]) as tracker:
        for each in rows[6:]:
            tracker.log(each)
    assert_same_as_metrics(name, tmp_path, rows)


@pytest.mark.skipif(not INSTALLED["tensorboard"], reason="tensorboard is not installed")
def test_a_row_is_in_tensorboards_file_while_the_run_goes_on(tmp_path):
    with make_tracker("tensorboard", tmp_path, CONFIG, []) as tracker:
        tracker.log(row(1))
        for _ in range(500):
            if (tmp_path / "tensorboard").is_dir() and rows_of_tensorboard(tmp_path):
                break
            time.sleep(0.01)
        assert_same_as_metrics("tensorboard", tmp_path, [row(1)])


RUN_AND_DIE = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trackers import CONFIG, row
from classiclm.train.trackers import make_tracker

name, run, attempt, saved, last, dies = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:])
path = run / "metrics.jsonl"
rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
rows = [each for each in rows if each["step"] <= saved]
path.write_text("".join(json.dumps(each) + "\\n" for each in rows))
with make_tracker(name, run, CONFIG, rows) as tracker:
    for step in range(saved + 1, last + 1):
        with path.open("a") as file:
            file.write(json.dumps(row(step, attempt)) + "\\n")
        tracker.log(row(step, attempt))
        time.sleep(0.05)
    if dies:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", REAL)
def test_after_a_sigkill_and_a_resume_the_files_are_those_of_metrics_jsonl(name, tmp_path):
    code = RUN_AND_DIE.format(tests=os.path.dirname(__file__))
    run = tmp_path / "run"
    run.mkdir()

    def start(*arguments):
        command = [sys.executable, "-c", code, name, str(run), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    killed = start(1, 0, 12, 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = start(2, 7, 15, 0)
    assert (again.returncode, again.stderr) == (0, "")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in rows] == list(range(1, 16))
    assert rows[7]["tokens_per_s"] == 2 * rows[6]["tokens_per_s"]  # the second attempt's
    assert_same_as_metrics(name, run, rows)


@pytest.mark.skipif(not INSTALLED["wandb"], reason="wandb is not installed")
def test_wandb_keeps_the_run_id_of_a_folder_and_the_config(tmp_path):
    ids = []
    for folder, standing in (("a", []), ("a", [row(1)]), ("b", [])):
        run = tmp_path / folder
        run.mkdir(exist_ok=True)
        with make_tracker("wandb", run, CONFIG, standing) as tracker:
            tracker.log(row(2))
        (record,) = [r.run for r in wandb_records(run) if r.WhichOneof("record_type") == "run"]
        updates = {item.key: json.loads(item.value_json) for item in record.config.update}
        assert {key: updates[key] for key in CONFIG} == CONFIG
        assert record.display_name == folder
        assert record.project == "classiclm"
        ids.append(record.run_id)
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.skipif(not INSTALLED["tensorboard"], reason="tensorboard is not installed")
def test_a_tensorboard_that_is_looking_sees_the_steps_again_and_only_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with make_tracker("tensorboard", tmp_path, CONFIG, []) as tracker:
        for step in range(1, 10):
            tracker.log(row(step))
    looking = EventAccumulator(str(tmp_path / "tensorboard"))
    looking.Reload()
    assert [event.step for event in looking.Scalars("loss")] == list(range(1, 10))
    with make_tracker("tensorboard", tmp_path, CONFIG, [row(step) for step in range(1, 5)]) as tracker:
        for step in range(5, 8):
            tracker.log(row(step, 2))
    looking.Reload()
    assert "step" not in looking.Tags()["scalars"]
    speeds = [(event.step, event.value) for event in looking.Scalars("tokens_per_s")]
    assert speeds == [(step, float32(1000.1 * (1 if step < 5 else 2))) for step in range(1, 8)]
    text = looking.Tensors("config")[-1]
    assert json.loads(text.tensor_proto.string_val[0]) == CONFIG
    assert [event.wall_time for event in looking.Scalars("loss")] == pytest.approx(
        [looking.Scalars("loss")[0].wall_time + 0.25 * i for i in range(7)], abs=1e-3
    )


# What a tracker must not do


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_missing_package_is_one_warning_that_names_the_extra(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with make_tracker(name, tmp_path, CONFIG, []) as tracker:
        for step in range(1, 5):
            tracker.log(row(step))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"warning: tracker {name} is off: {name}: is not installed")
    assert "pip install 'classiclm[track]'" in err


def test_no_tracker_writes_nothing_and_imports_nothing(tmp_path):
    with make_tracker("none", tmp_path, CONFIG, []) as tracker:
        tracker.log(row(1))
    assert list(tmp_path.iterdir()) == []
    code = "import sys, classiclm.train.trackers; print({'wandb', 'tensorboard', 'torch'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


class Faulty:
    """A sink that fails, or waits for the test, in the call of the given name."""

    def __init__(self, where, fault):
        self.where, self.fault, self.rows = where, fault, []
        self._at("init")

    def _at(self, place):
        if place == self.where:
            self.fault()

    def log(self, row):
        self._at("log")
        self.rows.append(row)

    def close(self, failed):
        self._at("close")


def raises(error):
    def fault():
        raise error

    return fault


@pytest.mark.parametrize("where", ["init", "log", "close"])
@pytest.mark.parametrize("error", [OSError("disk\nfull"), ValueError(), SystemExit(1), KeyboardInterrupt()])
def test_any_fault_of_a_tracker_is_one_warning(where, error, capsys):
    with Background("some", lambda: Faulty(where, raises(error))) as tracker:
        for step in range(1, 20):
            tracker.log(row(step))
            time.sleep(0.001)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("warning: tracker some is off: ")
    assert "the run goes on" in err


@pytest.mark.parametrize("where", ["init", "log", "close"])
def test_a_tracker_that_hangs_holds_a_run_up_for_no_longer_than_its_patience(where, capsys):
    forever = threading.Event()
    tracker = Background("some", lambda: Faulty(where, forever.wait), patience=0.2)
    began = time.monotonic()
    for step in range(1, 1000):
        tracker.log(row(step))
    assert time.monotonic() - began < 0.15
    tracker.close(failed=False)
    assert 0.15 < time.monotonic() - began < 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "has not finished within" in err
    forever.set()


def test_a_tracker_that_fails_after_it_was_given_up_says_no_more(capsys):
    released = threading.Event()

    def fault():
        released.wait()
        raise OSError("too late")

    tracker = Background("some", lambda: Faulty("log", fault), patience=0.05)
    tracker.log(row(1))
    tracker.close(failed=False)
    released.set()
    tracker._thread.join(5)
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "has not finished within" in err


def test_a_tracker_that_falls_behind_for_good_is_switched_off(capsys):
    forever = threading.Event()
    tracker = Background("some", lambda: Faulty("log", forever.wait), waiting=10)
    for step in range(1, 100):
        tracker.log(row(step))
    began = time.monotonic()
    tracker.close(failed=False)
    assert time.monotonic() - began < 0.1
    assert capsys.readouterr().err.count("10 rows wait for it") == 1
    forever.set()


def test_rows_arrive_in_order_and_as_they_were():
    sink = Faulty("", None)
    with Background("some", lambda: sink) as tracker:
        for step in range(1, 2000):
            each = row(step)
            tracker.log(each)
            each["loss"] = "changed later"
    assert sink.rows == [row(step) for step in range(1, 2000)]


def test_a_tracker_is_told_whether_the_run_failed():
    told = []
    sink = Faulty("", None)
    sink.close = told.append
    with Background("some", lambda: sink):
        pass
    with pytest.raises(ZeroDivisionError), Background("some", lambda: sink):
        1 / 0  # noqa: B018
    assert told == [False, True]


class FakeWandB(types.SimpleNamespace):
    """The few names of wandb that are used, with a server that has the steps below `step` already."""

    def __init__(self, logged_in, step):
        self.calls, self.rows, self.step = [], [], step
        super().__init__(
            Settings=lambda **settings: settings,
            setup=lambda settings: self.calls.append(("setup", settings)),
            login=lambda **how: self.calls.append(("login", how)) or logged_in,
            init=lambda **how: self.calls.append(("init", how)) or self,
            log=lambda row, step: self.rows.append((step, row)),
            finish=lambda exit_code: self.calls.append(("finish", exit_code)),
        )


@pytest.mark.parametrize(
    ("logged_in", "asked", "mode"),
    [(True, None, "online"), (False, None, "offline"), (True, "offline", "offline"), (False, "online", "online")],
)
def test_wandb_is_offline_if_nobody_is_logged_in_and_never_asks(logged_in, asked, mode, tmp_path, monkeypatch):
    fake = FakeWandB(logged_in, step=0)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    make_tracker("wandb", tmp_path, CONFIG, []).close(failed=True)
    calls = dict(fake.calls)
    assert calls["init"]["mode"] == mode
    assert calls["init"]["dir"] == str(tmp_path)
    assert calls["init"]["config"] == CONFIG
    assert calls["finish"] == 1
    assert calls.get("login", {"prompt": False}) == {"prompt": False}
    assert 0 < calls["setup"]["init_timeout"] <= 60
    assert 0 < calls["setup"]["finish_timeout"] <= 60


def test_a_server_is_sent_what_it_lacks_and_nothing_twice(tmp_path, monkeypatch):
    """It has steps 1 to 8; the run goes on from step 5 of a checkpoint with all rows up to there, or from step 11."""
    for standing, first, sent in ((5, 6, range(9, 13)), (10, 11, range(9, 13))):
        fake = FakeWandB(True, step=9)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        with make_tracker("wandb", tmp_path, CONFIG, [row(step) for step in range(1, standing + 1)]) as tracker:
            for step in range(first, 13):
                tracker.log(row(step))
        assert [step for step, _ in fake.rows] == list(sent)
        assert all(logged["step"] == step for step, logged in fake.rows)


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("a file")
    (tmp_path / "tracker.json").write_text("no JSON")
    for name in [name for name, there in INSTALLED.items() if there]:
        with make_tracker(name, tmp_path, CONFIG, []) as tracker:
            tracker.log(row(1))
        assert capsys.readouterr().err.startswith(f"warning: tracker {name} is off: ")


def test_every_name_has_its_tracker():
    assert set(trackers._SINKS) | {"none"} == set(trackers.Name.__args__)


SILENT_SERVER = """
import functools, os, socket, sys, time
from pathlib import Path
from classiclm.train import trackers

silent = socket.socket()
silent.bind(("127.0.0.1", 0))
silent.listen(50)
os.environ |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
trackers._PATIENCE = 3.0
trackers.Background = functools.partial(trackers.Background, patience=3.0)
began = time.monotonic()
with trackers.make_tracker("wandb", Path(sys.argv[1]), {}, []) as tracker:
    for step in range(1, 100):
        tracker.log({"step": step, "loss": 1.0})
    assert time.monotonic() - began < 1
"""


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED["wandb"], reason="wandb is not installed")
def test_a_server_that_never_answers_holds_up_neither_the_run_nor_its_end(tmp_path):
    began = time.monotonic()
    command = [sys.executable, "-c", SILENT_SERVER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("warning: tracker wandb is off") == 1
    assert time.monotonic() - began < 30
