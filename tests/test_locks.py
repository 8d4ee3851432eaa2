"""The lock of a folder: one process holds it, and whoever else wants it is told who."""

import json
import os
import socket
import subprocess
import time

import pytest

from classiclm.errors import RESOURCE, Error
from classiclm.files import locked


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
