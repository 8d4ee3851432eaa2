"""Cleaning on datatrove's executors: the same documents as the plain path gives, whoever does the work."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("datatrove")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("zstandard")
pytest.importorskip("ftfy")

from classiclm.data import cluster  # noqa: E402
from classiclm.data.cleaning import DUPLICATE_STEPS, Cleaning, clean, make_steps  # noqa: E402
from classiclm.data.cluster import CleanSteps, Engine, clean_on, make_executor, next_command, report  # noqa: E402
from classiclm.data.hub import HubSet  # noqa: E402
from classiclm.data.readers import Notes, Reading  # noqa: E402
from classiclm.data.sources import SOURCES, HubRows, resolve  # noqa: E402
from classiclm.errors import BAD_INPUT, RESOURCE, USAGE, Error  # noqa: E402
from samples import make_samples  # noqa: E402

LOCAL = Engine("local", tasks=3)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(cluster.__file__).parents[2]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def origins(tmp_path_factory):
    """The six corpora; Enron has 47 files and Gutenberg 35, the others one each."""
    samples = make_samples(tmp_path_factory.mktemp("samples"))
    return {name: resolve(f"{name}={path}") for name, path in samples.items()}


@pytest.fixture
def letters(tmp_path):
    """Seven files of two documents, one of them too short to keep."""
    folder = tmp_path / "letters"
    folder.mkdir()
    for i in range(7):
        (folder / f"{i}.jsonl").write_text(f'{{"text": "Letter {i}. {"word " * 60}"}}\n{{"text": "short {i}"}}\n')
    return resolve(str(folder), None, ["whitespace", "short", "exact"])


def plain(origin):
    """Sorted names and texts of the documents that the plain path keeps, its effects and the reader's notes."""
    notes, names = Notes(), [name for name in origin.steps if name not in DUPLICATE_STEPS]
    stream, effects = clean((document for document, _ in origin.read(None, notes)), make_steps(names, Cleaning()))
    return sorted((document.name, document.text) for document in stream), effects, dict(notes.counts)


def kept(out, name):
    """Names and texts in the files of a source, task by task."""
    rows = [pq.read_table(path).to_pylist() for path in sorted((out / "clean" / name).glob("*.parquet"))]
    return [[(row["id"], row["text"]) for row in part] for part in rows]


def failure(call, *arguments):
    with pytest.raises(Error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


# The same documents


def test_three_tasks_in_two_processes_keep_the_documents_that_the_plain_path_keeps(origins, tmp_path):
    assert clean_on(list(origins.values()), tmp_path, Cleaning(), LOCAL, 2)
    for name, origin in origins.items():
        expected, effects, notes = plain(origin)
        parts = kept(tmp_path, name)
        assert len(parts) == (3 if len(origin.files) > 1 else 1)
        assert sorted(row for part in parts for row in part) == expected
        assert 30 < len(expected) < 50
        found_notes, found = report(tmp_path, name)
        assert found_notes == notes
        for mine, theirs in zip(found, effects, strict=True):
            assert dataclasses.replace(mine, examples={}) == dataclasses.replace(theirs, examples={})
            assert mine.examples.keys() == theirs.examples.keys()


def test_each_task_reads_every_third_file(letters, tmp_path):
    clean_on([letters], tmp_path / "out", Cleaning(), LOCAL, 1)
    files = [[name.partition(":")[0] for name, _ in part] for part in kept(tmp_path / "out", "letters")]
    assert files == [[f"{i}.jsonl" for i in range(rank, 7, 3)] for rank in range(3)]


def test_no_task_is_left_without_a_file(letters, tmp_path):
    executor = make_executor(letters, tmp_path / "out", Cleaning(), Engine("local", tasks=100))
    assert executor.world_size == 7


def test_the_second_command_makes_shards_of_the_same_documents_as_one_command_alone(cli, origins, tmp_path):
    origin = origins["openwebtext"]
    assert clean_on([origin], tmp_path, Cleaning(), LOCAL, 1)
    _, command, *arguments = shlex.split(next_command([origin], tmp_path))
    plainly = [f"openwebtext={origin.files[0][1]}", "--out", tmp_path / "plain"]
    rest = ["--tokenizer", "bpe-300", "--workers", 1, "--val_share", 0.1]
    assert cli(command, *arguments, *rest)[0] == 0
    assert cli(command, *plainly, *rest)[0] == 0
    for split in ("train", "val"):
        one, two = (list((tmp_path / folder).glob(f"{split}-*.bin")) for folder in ("shards", "plain"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_tasks_that_start_in_another_folder_find_the_files(letters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    executor = make_executor(resolve("./letters"), Path("out"), Cleaning(), LOCAL)
    monkeypatch.chdir("/")
    executor.workers = 1
    executor.run()
    assert sum(map(len, kept(tmp_path / "out", "letters"))) == 14
    assert len(list((tmp_path / "out" / "log" / "letters").glob("notes-*.json"))) == 3


def test_a_file_whose_name_is_not_text_is_read(tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    try:
        (folder / os.fsdecode(b"caf\xe9.txt")).write_text("text")
    except OSError:
        pytest.skip("this file system takes only names in UTF-8")
    assert clean_on([resolve(str(folder))], tmp_path / "out", Cleaning(), LOCAL, 1)
    assert kept(tmp_path / "out", "odd") == [[("caf\\udce9.txt", "text")]]


def test_the_next_command_names_what_the_sources_still_need(letters, tmp_path):
    out = tmp_path / "a b"
    other = dataclasses.replace(letters, name="other", steps=("near",))
    command = shlex.split(next_command([letters, other], out))
    assert command[2:4] == [f"{out}/clean/letters", f"{out}/clean/other"]
    assert command[4:] == ["--cleaning", "exact,near", "--out", f"{out}/shards"]
    assert "--cleaning none" in next_command([dataclasses.replace(letters, steps=("short",))], out)


# Hub sets


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_parts_of_a_hub_set_are_all_of_it_and_have_names_of_their_own(tmp_path, monkeypatch, world_size):
    datasets, pa = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    for i in range(3):
        texts = [f"{i}.{k}" if k else None for k in range(4)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{i}.parquet")
    files = sorted(str(path) for path in tmp_path.glob("*.parquet"))
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    monkeypatch.setattr(cluster, "open_stream", lambda *_: stream)
    origin = HubRows("cnn", SOURCES["cnn"], Reading(), (), HubSet("someone/news", revision="0" * 40))
    step = cluster.ReadOrigin(origin, tmp_path / "log")
    documents = [document for rank in range(world_size) for document in step(None, rank, world_size)]
    assert [document.text for document in documents] == [f"{i}.{k}" for i in range(3) for k in (1, 2, 3)]
    assert len({document.id for document in documents}) == 9
    notes = Counter()
    for path in (tmp_path / "log").glob("notes-*.json"):
        notes.update(json.loads(path.read_bytes()))
    assert notes == {"records without text": 3}


# Going on


def test_only_tasks_that_are_not_marked_as_done_run_again(letters, tmp_path):
    out = tmp_path / "out"
    assert clean_on([letters], out, Cleaning(), LOCAL, 1)
    expected = kept(out, "letters")
    files = sorted((out / "clean" / "letters").glob("*.parquet"))
    (out / "log" / "letters" / "completions" / "00001").unlink()
    files[1].write_bytes(b"what a killed task left")
    before = [path.stat().st_mtime_ns for path in files]
    assert clean_on([letters], out, Cleaning(), LOCAL, 1)
    after = [path.stat().st_mtime_ns for path in files]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]
    assert kept(out, "letters") == expected
    assert report(out, "letters")[1][0].documents_in == 14


@pytest.mark.parametrize(
    ("engine", "settings", "steps", "named"),
    [
        (Engine("local", tasks=2), Cleaning(), ["whitespace", "short"], "tasks: 3 -> 2"),
        (LOCAL, Cleaning(min_chars=7), ["whitespace", "short"], "cleaning.min_chars: 200 -> 7"),
        (LOCAL, Cleaning(), ["short"], "steps"),
    ],
)
def test_what_would_mix_two_runs_is_refused(letters, tmp_path, engine, settings, steps, named):
    make_executor(letters, tmp_path / "out", Cleaning(), LOCAL)
    other = dataclasses.replace(letters, steps=tuple(steps))
    error = failure(make_executor, other, tmp_path / "out", settings, engine)
    assert error.code == USAGE
    assert named in str(error)


def test_other_files_than_it_was_begun_with_are_refused(letters, tmp_path):
    make_executor(letters, tmp_path / "out", Cleaning(), LOCAL)
    letters.files[3][1].write_text('{"text": "longer"}')
    error = failure(make_executor, letters, tmp_path / "out", Cleaning(), LOCAL)
    assert error.code == BAD_INPUT
    assert "other files" in str(error)


def test_bad_input_in_a_task_is_the_readers_own_error(letters, tmp_path):
    letters.files[3][1].write_text('{"body": "no text here"}')
    error = failure(clean_on, [letters], tmp_path / "out", Cleaning(), LOCAL, 2)
    assert error.code == BAD_INPUT
    assert "body" in str(error)


def test_a_misspelt_step_is_told_before_anything_starts(letters, tmp_path):
    wrong = dataclasses.replace(letters, steps=("whitspace",))
    error = failure(make_executor, wrong, tmp_path / "out", Cleaning(), LOCAL)
    assert error.code == USAGE
    assert "did you mean 'whitespace'" in str(error)
    assert not (tmp_path / "out").exists()


# Slurm and Ray

# A cluster of one node: sbatch runs the tasks of the array one after another, each in processes of its own.
SBATCH = """#!/bin/bash
for script; do :; done
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$script")
for i in $(seq 0 $last); do
  SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here RUN_OFFSET=0 bash "$script" >> "$SBATCH_LOG" 2>&1 || exit 1
done
echo Submitted batch job 17
"""
SRUN = '#!/bin/bash\nwhile [[ $1 != launch_pickled_pipeline ]]; do shift; done\nexec "$@"\n'
SCONTROL = "#!/bin/bash\necho here\n"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "sbatch.log"))
    return tmp_path / "sbatch.log"


def test_tasks_that_slurm_starts_in_fresh_processes_keep_the_same_documents(slurm, letters, tmp_path):
    engine = Engine("slurm", tasks=2, partition="cpu", setup="echo the node is ready")
    done = clean_on([letters], tmp_path / "out", Cleaning(), engine, None)
    assert done, slurm.read_text()
    assert sorted(row for part in kept(tmp_path / "out", "letters") for row in part) == plain(letters)[0]
    assert slurm.read_text().count("the node is ready") == 3  # two tasks, and the sum of their counts


def test_without_slurm_the_script_is_written_and_the_error_says_where(letters, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = Engine("slurm", tasks=3, hours=5, cpus=2, gigabytes=7, partition="cpu")
    error = failure(clean_on, [letters], tmp_path / "out", Cleaning(), engine, 2)
    log = tmp_path / "out" / "log" / "letters"
    script = (log / "launch_script.slurm").read_text()
    assert error.code == RESOURCE
    assert str(log / "launch_script.slurm") in str(error)
    for line in ("partition=cpu", "time=5:00:00", "cpus-per-task=2", "mem-per-cpu=7G", "array=0-2%2"):
        assert f"#SBATCH --{line}\n" in script
    assert "#SBATCH --job-name=classiclm-letters" in script
    assert f"launch_pickled_pipeline {log / 'executor.pik'}" in script
    assert b"classiclm.data.cluster" in (log / "executor.pik").read_bytes()
    assert "whitespace" in (log / "executor.json").read_text()


def test_slurm_needs_a_partition(letters, tmp_path):
    error = failure(make_executor, letters, tmp_path / "out", Cleaning(), Engine("slurm"))
    assert error.code == USAGE
    assert "--engine.partition" in str(error)


def test_ray_is_told_as_missing_or_its_executor_made(letters, tmp_path):
    engine = Engine("ray", tasks=3, hours=2)
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError:
        error = failure(make_executor, letters, tmp_path / "out", Cleaning(), engine)
        assert error.code == RESOURCE
        assert "pip install 'classiclm[ray]'" in str(error)
        return
    executor = make_executor(letters, tmp_path / "out", Cleaning(), engine)
    assert (executor.world_size, executor.time) == (3, 7200)


# In any pipeline


def test_clean_steps_keep_the_metadata_of_documents_from_elsewhere(tmp_path):
    from datatrove.data import Document

    documents = [Document("a  \n\n\n\nb", "1", metadata={"url": "x"}), Document(" \n ", "2"), Document("c", "3")]
    step = CleanSteps(("whitespace",), Cleaning(), tmp_path)
    cleaned = list(step(documents, 0, 1))
    assert [(document.text, document.id) for document in cleaned] == [("a\n\nb", "1"), ("c", "3")]
    assert cleaned[0].metadata == {"url": "x"}
    assert step.stats["whitespace: empty"].total == 1


def test_datatrove_is_imported_only_when_it_is_used():
    code = "import sys, classiclm.data.cluster; print({'datatrove', 'pyarrow', 'torch'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert run.stdout.strip() == "set()"


def test_a_missing_datatrove_is_told(letters, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    error = failure(make_executor, letters, tmp_path / "out", Cleaning(), LOCAL)
    assert error.code == RESOURCE
    assert "pip install 'classiclm[cluster]'" in str(error)
