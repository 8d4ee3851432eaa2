"""The lock of a folder: one process holds it, and whoever else wants it is told who."""

import json
import os
import socket
import subprocess
import time

import pytest

from classiclm.commands import train
from classiclm.errors import BAD_INPUT, RESOURCE, Error
from classiclm.files import locked
from classiclm.train.distributed import World


def test_who_holds_a_lock_is_named_to_whoever_else_wants_it_and_forgotten_when_it_is_free(tmp_path):
    with locked(tmp_path), pytest.raises(Error) as caught, locked(tmp_path):
        pass
    assert caught.value.code == RESOURCE
    assert f"is in use by process {os.getpid()} on {socket.gethostname()}, which started at 2" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("note", [None, b"{", b"[]", b'{"host": 3}', "dead"])
def test_a_holder_that_left_no_name_or_a_dead_ones_is_another_process(tmp_path, note):
    with locked(tmp_path):
        path = tmp_path / ".lock-holder.json"
        if note == "dead":
            child = subprocess.Popen(["true"])
            child.wait()
            note = json.dumps({"host": socket.gethostname(), "pid": child.pid, "started": "now"}).encode()
        path.unlink() if note is None else path.write_bytes(note)
        began = time.monotonic()
        with pytest.raises(Error, match="is in use by another process"), locked(tmp_path):
            pass
        assert time.monotonic() - began < 1


def refuse_to_read(monkeypatch):
    def prepare(*_):
        raise AssertionError("text was read")

    monkeypatch.setattr(train, "prepare", prepare)


def test_a_second_start_of_a_run_is_refused_before_any_text_is_read(tmp_path, monkeypatch, cli):
    refuse_to_read(monkeypatch)
    before = [".lock", ".lock-holder.json"]
    with locked(tmp_path):
        code, _, err = cli("train", "--data", "./nowhere.txt", "--out", tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert code == RESOURCE
    assert err.count("\n") == 1
    assert f"{tmp_path}: is in use by process {os.getpid()} on {socket.gethostname()}, which started at 2" in err


def test_only_the_first_of_many_processes_asks_for_the_lock(tmp_path):
    with locked(tmp_path):
        train.check_free(tmp_path, World(rank=1, size=2))
        with pytest.raises(Error, match="in use"):
            train.check_free(tmp_path, World(rank=0, size=2))


def test_a_start_that_fails_before_training_makes_no_folder_and_holds_no_lock(tmp_path, cli):
    code, _, _ = cli("train", "--data", "./nowhere.txt", "--out", tmp_path / "new")
    assert code == BAD_INPUT
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    assert cli("train", "--data", "./nowhere.txt", "--out", tmp_path / "old")[0] == BAD_INPUT
    with locked(tmp_path / "old"):
        pass
