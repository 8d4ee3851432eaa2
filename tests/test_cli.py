"""The command line: quick help, one line for each mistake with its exit code, and nothing left behind by a mistake."""

import gc
import importlib
import json
import keyword
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

import classiclm
from classiclm import cli as module
from classiclm.cli import COMMANDS, main
from classiclm.errors import BAD_INPUT, BUG, RESOURCE, USAGE

SOURCE = Path(classiclm.__file__).parents[1]
TINY = ["--model.n_layers", "1", "--model.d_model", "8", "--model.n_heads", "2", "--model.n_ctx", "8"]
TINY += ["--batch", "2", "--steps", "2", "--device", "cpu"]


def python(*arguments, **settings):
    """A fresh interpreter that finds this package first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **settings}
    return subprocess.run(command, text=True, env=environment, timeout=60, **pipes)


# Help and version


def test_help_is_quick():
    took = []
    for _ in range(5):
        began = time.perf_counter()
        done = python("-m", "classiclm", "--help")
        took.append(time.perf_counter() - began)
        assert done.returncode == 0
        assert done.stderr == ""
        assert all(f"  {name} " in done.stdout for name in COMMANDS)
        if took[-1] < 0.5:
            break
    assert min(took) < 0.5


def test_garbage_is_not_looked_for_among_imports_in_a_process_of_its_own():
    code = (
        "import gc, sys; from classiclm.cli import main\n"
        "sys.argv[1:] = ['models']; code = main()\n"
        "print(code, gc.isenabled(), gc.get_freeze_count() > 100_000)"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "0 True True"


def test_a_command_that_is_called_leaves_the_callers_garbage_alone():
    frozen = gc.get_freeze_count()
    assert main(["models"]) == 0
    assert gc.get_freeze_count() == frozen
    assert gc.isenabled()


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, classiclm; from classiclm.cli import main; main(['--help']); main(['--version'])\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'yaml', 'rich', 'tokenizers') if name in sys.modules])"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_config_parser_needs_no_torch():
    done = python("-c", "import sys, classiclm.config; print('torch' in sys.modules)")
    assert done.stdout == "False\n"


def test_a_reader_that_goes_away_is_no_failure():
    reader, writer = os.pipe()
    os.close(reader)
    done = python("-m", "classiclm", "--help", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_is_on_stdout(cli, argv):
    code, out, err = cli(*argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: classiclm COMMAND")


def test_the_version_is_that_of_the_package(cli):
    code, out, err = cli("--version")
    assert (code, out, err) == (0, f"classiclm {classiclm.__version__}\n", "")
    project = SOURCE.parent / "pyproject.toml"
    if project.is_file():
        assert tomllib.loads(project.read_text())["project"]["version"] == classiclm.__version__


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_there_and_explains_its_flags(name, capsys):
    module_name = f"{name}_" if keyword.iskeyword(name) else name
    assert callable(importlib.import_module(f"classiclm.commands.{module_name}").main)
    try:
        code = main([name, "--help"])
    except SystemExit as e:  # as argparse leaves
        code = e.code
    assert code == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: classiclm {name} ")
    assert captured.err == ""


def test_the_lazy_names_of_the_package_are_there():
    assert all(getattr(classiclm, name) is not None for name in classiclm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        classiclm.nothing  # noqa: B018


# What a command may end with


def ends_with(monkeypatch, exception):
    def command(argv, prog):
        raise exception

    monkeypatch.setattr("classiclm.commands.models.main", command)


def test_a_bug_is_one_line_and_exit_code_1(cli, monkeypatch):
    ends_with(monkeypatch, ZeroDivisionError("one\ntwo"))
    code, out, err = cli("models")
    assert (code, out) == (BUG, "")
    assert err == "error: bug: ZeroDivisionError: one two. Fix: run again with --debug and report the traceback.\n"


def test_debug_shows_the_traceback_wherever_it_stands(cli, monkeypatch):
    ends_with(monkeypatch, ZeroDivisionError("oh"))
    for argv in (["--debug", "models"], ["models", "--debug"]):
        code, _, err = cli(*argv)
        assert code == BUG
        assert err.startswith("Traceback")
        assert err.splitlines()[-1].startswith("error: bug: ")


def test_an_interruption_is_exit_code_130(cli, monkeypatch):
    ends_with(monkeypatch, KeyboardInterrupt())
    assert cli("models") == (130, "", "error: interrupted\n")


def cpu_memory_error():
    try:
        torch.empty(10**15)
    except RuntimeError as e:
        return e
    pytest.skip("this machine has petabytes")


@pytest.mark.parametrize("make", [MemoryError, cpu_memory_error, lambda: torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_a_resource_error(cli, monkeypatch, make):
    ends_with(monkeypatch, make())
    code, _, err = cli("models")
    assert code == RESOURCE
    assert err.startswith("error: memory: ")


# Mistakes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a run on it, made once."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log.\n" * 40)
    code = main(["train", "--data", f"{folder}/text.txt", "--out", f"{folder}/run", *TINY])
    assert code == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A working folder with that run and with all kinds of bad things in it."""
    folder = tmp_path / "here"
    shutil.copytree(trained, folder)
    for name, content in {
        "tiny.txt": b"at",
        "short.txt": b"hello there",
        "greek.txt": "αβγ δεζ\n".encode() * 40,
        "binary.txt": b"a\0b" * 99,
        "latin.txt": b"caf\xe9 " * 99,
        "broken.yaml": b"a: [",
        "latin.yaml": b"lr: \xe9",
        "list.yaml": b"- 1\n",
        "unknown.yaml": b"stepz: 3\n",
        "bad.yaml": b"lr: [1]\n",
        "tokenizer.json": b"{}",
        "blocked": b"a file where a folder should be",
    }.items():
        (folder / name).write_bytes(content)
    (folder / "empty").mkdir()
    damaged = folder / "damaged"
    shutil.copytree(folder / "run", damaged)
    for weights in damaged.rglob("model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.chdir(folder)
    return folder


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


TRAIN = [
    (USAGE, "--out", "train --data ./text.txt"),
    (USAGE, "--stepz", "train --data ./text.txt --out new --stepz 3"),
    (USAGE, "--model.n_layerz", "train --data ./text.txt --out new --model.n_layerz 3"),
    (USAGE, "gpt9", "train gpt9 --data ./text.txt --out new"),
    (USAGE, "extra", "train gpt2-124m extra --out new"),
    (USAGE, "steps", "train --data ./text.txt --out new --steps 0"),
    (USAGE, "steps", "train --data ./text.txt --out new --steps -5"),
    (USAGE, "steps", "train --data ./text.txt --out new --steps 1.5"),
    (USAGE, "steps", "train --data ./text.txt --out new --steps"),
    (USAGE, "lr", "train --data ./text.txt --out new --lr nan"),
    (USAGE, "lr", "train --data ./text.txt --out new --lr 0"),
    (USAGE, "batch", "train --data ./text.txt --out new --batch many"),
    (USAGE, "batch", "train --data ./text.txt --out new --batch 99999999999999999999"),
    (USAGE, "micro_batch", "train --data ./text.txt --out new --micro_batch 0"),
    (USAGE, "seed", "train --data ./text.txt --out new --seed -1"),
    (USAGE, "seed", "train --data ./text.txt --out new --seed 18446744073709551616"),
    (USAGE, "n_heads", "train --data ./text.txt --out new --model.d_model 10 --model.n_heads 3"),
    (USAGE, "model.dropout", "train --data ./text.txt --out new --model.dropout 1"),
    (USAGE, "model.vocab_size", "train --data ./text.txt --out new --model.vocab_size 7"),
    (USAGE, "model.vocab_size", "train --data ./text.txt --out new --model.vocab_size 7.0"),
    (USAGE, "device", "train --data ./text.txt --out new --device tpu"),
    (USAGE, "precision", "train --data ./text.txt --out new --precision fp64"),
    (USAGE, "precision", "train --data ./text.txt --out new --device cpu --precision fp16"),
    (USAGE, "tokenizer", "train --data ./text.txt --out new --tokenizer word"),
    (USAGE, "bpe-10", "train --data ./text.txt --out new --tokenizer bpe-10"),
    (USAGE, "bpe-99999999999999999999", "train --data ./text.txt --out new --tokenizer bpe-99999999999999999999"),
    (USAGE, "nope", "train --data nope --out new"),
    (USAGE, "./text.txt", "train --data text.txt --out new"),
    (USAGE, "data.val_share", "train --data ./text.txt --data.val_share 0 --out new"),
    (USAGE, "data.errors", "train --data ./text.txt --data.errors ignore --out new"),
    (USAGE, "stepz", "train --config unknown.yaml --data ./text.txt --out new"),
    (USAGE, "lr", "train --config bad.yaml --data ./text.txt --out new"),
    (USAGE, "list.yaml", "train --config list.yaml --data ./text.txt --out new"),
    (BAD_INPUT, "broken.yaml", "train --config broken.yaml --data ./text.txt --out new"),
    (BAD_INPUT, "latin.yaml", "train --config latin.yaml --data ./text.txt --out new"),
    (BAD_INPUT, "none.yaml", "train --config none.yaml --data ./text.txt --out new"),
    (BAD_INPUT, "none.txt", "train --data ./none.txt --out new"),
    (BAD_INPUT, "empty", "train --data ./empty --out new"),
    (BAD_INPUT, "tiny.txt", "train --data ./tiny.txt --out new"),
    (BAD_INPUT, "--model.n_ctx", "train --data ./short.txt --out new"),
    (BAD_INPUT, "binary.txt", "train --data ./binary.txt --out new"),
    (BAD_INPUT, "latin.txt", "train --data ./latin.txt --out new"),
    (BAD_INPUT, "none.json", "train --data ./text.txt --out new --tokenizer ./none.json"),
    (BAD_INPUT, "tokenizer.json", "train --data ./text.txt --out new --tokenizer ./tokenizer.json"),
    (BAD_INPUT, "latin.txt", "train --data ./text.txt --out new --tokenizer ./latin.txt"),
    (RESOURCE, "blocked", "train --data ./text.txt --out blocked"),
    (RESOURCE, "blocked", "train --data ./text.txt --out blocked/below"),
]
GENERATE = [
    (USAGE, "RUN", "generate"),
    (USAGE, "extra", "generate run extra"),
    (USAGE, "--promt", "generate run --promt a"),
    (USAGE, "--prompt", "generate run --prompt="),
    (USAGE, "temperature", "generate run --temperature -1"),
    (USAGE, "temperature", "generate run --temperature nan"),
    (USAGE, "top_k", "generate run --top_k 0"),
    (USAGE, "top_p", "generate run --top_p 0"),
    (USAGE, "top_p", "generate run --top_p 1.5"),
    (USAGE, "top_p", "generate run --top_p nan"),
    (USAGE, "max_new_tokens", "generate run --max_new_tokens 0"),
    (USAGE, "seed", "generate run --seed 18446744073709551616"),
    (USAGE, "overflow", "generate run --overflow wrap"),
    (USAGE, "device", "generate run --device tpu"),
    (USAGE, "bset", "generate run --checkpoint bset"),
    (BAD_INPUT, "step-00000099", "generate run --checkpoint 99"),
    (BAD_INPUT, "none", "generate none"),
    (BAD_INPUT, "blocked", "generate blocked"),
    (BAD_INPUT, "empty", "generate empty"),
    (BAD_INPUT, "damaged", "generate damaged"),
    (BAD_INPUT, "damaged", "generate damaged --checkpoint 2"),
    (BAD_INPUT, "U+005A", "generate run --prompt Z"),
    (BAD_INPUT, "12 tokens", "generate run --prompt thecatthecat --overflow error"),
]
EVALUATE = [
    (USAGE, "RUN: is missing", "evaluate"),
    (USAGE, "split", "evaluate run --split test"),
    (USAGE, "--json", "evaluate run --jsno"),
    (USAGE, "nope", "evaluate run --data nope"),
    (USAGE, "bset", "evaluate run --checkpoint bset"),
    (BAD_INPUT, "none", "evaluate run none"),
    (BAD_INPUT, "damaged", "evaluate damaged"),
    (BAD_INPUT, "none.txt", "evaluate run --data ./none.txt"),
    (BAD_INPUT, "tiny.txt", "evaluate run --data ./tiny.txt"),
    (BAD_INPUT, "U+03B1", "evaluate run --data ./greek.txt"),
]
LADDER = [
    (USAGE, "rungs", "ladder --data ./text.txt --rungs 0"),
    (USAGE, "rungs", "ladder --data ./text.txt --rungs 13"),
    (USAGE, "rungs", "ladder --data ./text.txt --rungs 3-1"),
    (USAGE, "rungs", "ladder --data ./text.txt --rungs 1,,2"),
    (USAGE, "rungs", "ladder --data ./text.txt --rungs 1-99999999999"),
    (USAGE, "budget", "ladder --data ./text.txt --budget big"),
    (USAGE, "nope", "ladder --data nope"),
    (USAGE, "ladder show N", "ladder show"),
    (USAGE, "ladder show N", "ladder show 13"),
    (USAGE, "ladder show N", "ladder show two"),
    (USAGE, "ladder diff N M", "ladder diff 1"),
    (USAGE, "ladder diff N M", "ladder diff 1 2 3"),
    (USAGE, "climb", "ladder climb"),
    (BAD_INPUT, "none.txt", "ladder --data ./none.txt"),
    (BAD_INPUT, "tiny.txt", "ladder --data ./tiny.txt"),
    (RESOURCE, "blocked", "ladder --data ./text.txt --out blocked"),
]
OTHER = [
    (USAGE, "'train'", "trian gpt2-124m"),
    (USAGE, "frobnicate", "frobnicate"),
    (USAGE, "--halp", "--halp"),
    (USAGE, "--json", "models --jsn"),
    (USAGE, "extra", "models extra"),
    (USAGE, "--out", "demo --uot x"),
]


@pytest.mark.parametrize(("expected", "named", "line"), TRAIN + GENERATE + EVALUATE + LADDER + OTHER)
def test_a_mistake_is_one_line_with_its_exit_code_and_leaves_nothing_behind(cli, here, expected, named, line):
    before = snapshot(here)
    code, out, err = cli(*line.split())
    *told, error = err.splitlines()
    assert error.startswith("error: ")
    assert named in error
    assert " Fix: " in error
    assert error.endswith(".")
    assert (code, out) == (expected, "")
    assert not [text for text in told if text.startswith(("error", "Traceback"))]
    assert told == [] or expected != USAGE  # a wrong word is found before the work begins
    assert snapshot(here) == before


def test_a_message_stays_one_line_whatever_was_typed(cli):
    code, _, err = cli("two\nlines")
    assert code == USAGE
    assert err.count("\n") == 1


def test_continuing_with_another_config_shows_the_difference_and_touches_nothing(cli, trained):
    before = snapshot(trained)
    argv = ["train", "--data", f"{trained}/text.txt", "--out", trained / "run", *TINY, "--lr", "0.5"]
    code, out, err = cli(*argv)
    assert (code, out) == (USAGE, "")
    assert "lr: 0.001 -> 0.5" in err.splitlines()[-1]
    assert snapshot(trained) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [("metrics.jsonl", b"5\n"), ("metrics.jsonl", b"{}\n"), ("metrics.jsonl", b"{\n"), ("config.yaml", b"a: [")],
)
def test_a_defect_in_a_run_folder_is_bad_input_that_names_the_file(cli, trained, tmp_path, name, content):
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    (run / name).write_bytes(content)
    code, out, err = cli("train", "--data", f"{trained}/text.txt", "--out", run, *TINY)
    assert (code, out) == (BAD_INPUT, "")
    assert err.splitlines()[-1].startswith(f"error: {run / name}: ")
    assert (run / name).read_bytes() == content


# What goes well


def test_stdout_holds_only_the_product(cli, here):
    code, out, _ = cli("evaluate", "run", "--data", "./text.txt", "--json")
    assert code == 0
    assert set(json.loads(out)[0]) >= {"loss", "perplexity", "bits_per_byte", "bits_per_char"}
    code, out, err = cli("generate", "run", "--prompt", "the", "--max_new_tokens", 5, "--greedy")
    assert (code, len(out), err) == (0, len("the") + 5 + 1, "")
    code, out, err = cli("models", "--json")
    assert (code, err) == (0, "")
    assert {row["name"] for row in json.loads(out)} >= {"gpt2-124m", "ladder-1"}


def test_a_prompt_that_reads_null_is_a_text(cli, here):
    code, _, err = cli("generate", "run", "--prompt", "null", "--max_new_tokens", 1)
    assert code == BAD_INPUT
    assert "'u'" in err


def test_a_finished_run_says_so_and_ends_well(cli, trained):
    code, out, err = cli("train", "--data", f"{trained}/text.txt", "--out", trained / "run", *TINY)
    assert (code, out) == (0, "")
    assert "is finished: step 2" in err


def test_the_printed_config_starts_the_same_run(cli, tmp_path):
    _, first, _ = cli("train", "gpt2-shakespeare", "--model.n_layers", "2", "--lr", "6e-4", "--print_config")
    (tmp_path / "c.yaml").write_text(first)
    code, second, err = cli("train", "--config", tmp_path / "c.yaml", "--print_config")
    assert (code, second, err) == (0, first, "")


def test_the_table_of_commands_and_the_usage_agree():
    assert all(text in module.usage() for text in COMMANDS.values())


@pytest.mark.skipif(sys.platform != "linux", reason="finds the name of an open file in /proc")
def test_a_full_disk_is_a_resource_error_that_leaves_the_old_checkpoints_whole(cli, trained, tmp_path, monkeypatch):
    """As a full disk does it: the bytes are taken and the flush fails."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    before = {path: path.read_bytes() for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()}
    config = (run / "config.yaml").read_text().replace("steps: 2\n", "steps: 9\n")
    (tmp_path / "longer.yaml").write_text(config)
    real = os.fsync

    def fsync(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").find("step-00000009") >= 0:
            raise OSError(28, "No space left on device")
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    code, out, err = cli("train", "--config", tmp_path / "longer.yaml", "--out", run)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert (code, out) == (RESOURCE, "")
    assert len(lines) == 1
    assert "No space left on device" in lines[0]
    assert "Fix: " in lines[0]
    assert {path: path.read_bytes() for path in sorted((run / "checkpoints").rglob("*")) if path.is_file()} == before
