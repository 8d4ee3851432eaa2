"""classiclm fsck: a sound folder is ok in a line; of a damaged one every defect is a line, and the exit code is 3."""

import json

import pytest

from classiclm.commands import fsck
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.files import publish_folder
from test_dataset import make_dataset


@pytest.fixture
def check(capsys):
    """Run the command: check(path, ...) -> exit code, lines of stdout."""

    def run(*arguments):
        capsys.readouterr()
        code = fsck.main([str(argument) for argument in arguments], "classiclm fsck")
        return code, capsys.readouterr().out.splitlines()

    return run


@pytest.fixture
def run_folder(tmp_path):
    """A run with two checkpoints, as train leaves it."""
    run = tmp_path / "run"
    for step in (10, 20):
        files = {"model.safetensors": bytes(range(99)), "state.json": b"{}"}
        publish_folder(run / "checkpoints" / f"step-{step:08d}", files, {"step": step})
    (run / "config.yaml").write_text("preset: gpt2-124m\n")
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": 2.0}\n')
    return run


def test_a_sound_dataset_is_ok_in_a_line(check, tmp_path):
    folder = make_dataset(tmp_path / "data")
    code, lines = check(folder)
    assert (code, lines) == (
        0,
        [f"{folder}: ok, a dataset of 25 training and 11 validation tokens in 5 shards"],
    )


def test_every_defect_of_a_dataset_is_a_line(check, tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / "train-00001.bin").write_bytes(b"ab")
    (folder / "val-00000.idx").unlink()
    code, lines = check(folder)
    assert code == BAD_INPUT
    assert [line.partition(": ")[0] for line in lines] == [
        str(folder / "train-00001.bin"),
        str(folder / "val-00000.idx"),
    ]
    code, lines = check(folder, "--json")
    answer = json.loads(lines[0])
    assert (code, answer["ok"], answer["kind"], len(answer["defects"])) == (BAD_INPUT, False, "dataset", 2)


def test_a_dataset_whose_preparation_was_not_finished_is_no_success(check, tmp_path):
    folder = make_dataset(tmp_path / "data")
    (folder / "meta.json").unlink()
    code, lines = check(folder)
    assert code == BAD_INPUT
    assert len(lines) == 1
    assert "not finished" in lines[0]


def test_a_sound_run_is_ok_in_a_line(check, run_folder):
    assert check(run_folder) == (0, [f"{run_folder}: ok, a run with 2 checkpoints"])
    code, lines = check(run_folder, "--json")
    assert code == 0
    assert json.loads(lines[0]) == {
        "path": str(run_folder),
        "kind": "run",
        "ok": True,
        "what": "a run with 2 checkpoints",
        "defects": [],
    }


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b" x", lambda data: b""])
def test_a_damaged_checkpoint_is_named_even_if_it_is_not_the_newest(check, run_folder, name, damage):
    path = run_folder / "checkpoints/step-00000010" / name
    path.write_bytes(damage(path.read_bytes()))
    code, lines = check(run_folder)
    assert code == BAD_INPUT
    assert len(lines) == 1
    assert lines[0].startswith(f"{path.parent}: ")
    assert name in lines[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", b"a: [1"),
        ("config.yaml", b"- a list\n"),
        ("config.yaml", b"\xff\xfe"),
        ("metrics.jsonl", b'{"step": 1}\nnot json\n{"step": 3}\n'),
        ("metrics.jsonl", b'{"loss": 1}\n'),
        ("metrics.jsonl", b"[" * 200_000 + b"\n"),
    ],
)
def test_a_config_or_metrics_that_cannot_be_read_is_named(check, run_folder, name, content):
    (run_folder / name).write_bytes(content)
    code, lines = check(run_folder)
    assert code == BAD_INPUT
    assert len(lines) == 1
    assert lines[0].startswith(f"{run_folder / name}: ")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_trained_run_needs_its_config_and_metrics(check, run_folder, name):
    (run_folder / name).unlink()
    assert check(run_folder) == (BAD_INPUT, [f"{run_folder / name}: is missing"])
    (run_folder / name).mkdir()
    assert check(run_folder) == (BAD_INPUT, [f"{run_folder / name}: is no plain file"])


def test_a_last_row_of_metrics_that_a_crash_has_torn_is_no_defect(check, run_folder):
    with (run_folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3')
    assert check(run_folder)[0] == 0


def test_an_imported_run_has_neither_and_is_whole(check, tmp_path):
    publish_folder(tmp_path / "run/checkpoints/step-00000000", {"model.safetensors": b"w"}, {"step": 0})
    assert check(tmp_path / "run") == (0, [f"{tmp_path / 'run'}: ok, a run with 1 checkpoint"])


def test_other_paths_are_refused_in_a_line(check, tmp_path):
    (tmp_path / "file").write_text("a")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty", "missing"):
        with pytest.raises(Error) as raised:
            check(tmp_path / name)
        assert raised.value.code == BAD_INPUT
        assert str(tmp_path / name) in str(raised.value)
    with pytest.raises(Error) as raised:
        check()
    assert raised.value.code == USAGE
