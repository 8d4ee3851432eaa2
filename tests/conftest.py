"""What all tests share: one thread, no network, small texts."""

import os
import socket

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from classiclm.cli import main

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that opens an internet connection is wrong."""
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise OSError("tests have no network")
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture
def cli(capsys):
    """Run a command in this process: cli("train", ...) -> (exit code, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def text_file(tmp_path):
    """A small file of plain text in a folder of its own."""
    folder = tmp_path / "text"
    folder.mkdir()
    path = folder / "small.txt"
    path.write_text("the cat sat on the mat and the dog sat on the log.\n" * 80)
    return path
