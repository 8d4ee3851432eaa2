"""Corpora -> shards: what comes out is what went in, whoever does the work and however often it is killed."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from classiclm.data import prepare as stage
from classiclm.data.dataset import open_dataset
from classiclm.data.duplicates import content_key, normalised
from classiclm.data.tokenizers import load_tokenizer
from classiclm.errors import Error

SOURCE = Path(__file__).resolve().parent.parent / "src"


def sums(folder):
    """Every file of a dataset -> its sha256."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def documents_of(folder, split):
    """The texts of a split, decoded from shards that NumPy reads by itself; end-of-text parts them."""
    tokenizer = load_tokenizer(str(folder))
    texts = []
    for path in sorted(folder.glob(f"{split}-*.bin")):
        tokens = np.memmap(path, dtype=np.uint16, mode="r")
        for part in np.split(tokens, np.flatnonzero(tokens == tokenizer.end_of_text) + 1)[:-1]:
            texts.append(tokenizer.decode(part[:-1].tolist()))
    return texts


@pytest.fixture
def texts():
    words = "the a cat dog house river walks sees under over green old and but slowly home"
    rng = random.Random(5)
    return [f"Text {i}. " + " ".join(rng.choices(words.split(), k=rng.randint(5, 60))) for i in range(300)]


@pytest.fixture
def corpus(tmp_path, texts):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stage, "BLOCK_CHARS", 2000)


def prepare(cli, corpus, out, *flags):
    return cli("prepare", corpus, "--out", out, "--tokenizer", "bpe-300", "--val_share", 0.1, "--workers", 1, *flags)


def test_the_shards_hold_every_document_once(cli, corpus, texts, tmp_path):
    code, table, _ = prepare(cli, corpus, tmp_path / "out", "--shard_tokens", 2000)
    assert code == 0
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert train == [text for text in texts if text in set(train)]  # in the order of the files
    assert len(list((tmp_path / "out").glob("train-*.bin"))) > 5
    assert 10 < len(val) < 60  # a tenth of 300
    assert "300" in table


def test_a_document_is_in_the_split_that_its_content_says(cli, corpus, tmp_path):
    prepare(cli, corpus, tmp_path / "out")
    for split in ("train", "val"):
        keys = [content_key(text) for text in documents_of(tmp_path / "out", split)]
        assert all((key < 0.1 * 2**64) == (split == "val") for key in keys)


def test_the_counts_in_the_manifest_add_up(cli, corpus, texts, tmp_path):
    flags = ["--cleaning", "whitespace,short,exact", "--cleaning.min_chars", 60]
    corpus.write_text(corpus.read_text() + json.dumps({"text": texts[7].upper() + "  "}) + "\n" + '{"text": null}\n')
    prepare(cli, corpus, tmp_path / "out", *flags)
    meta = json.loads((tmp_path / "out" / "meta.json").read_bytes())
    (source,) = meta["sources"]
    steps = {step["name"]: step for step in source["steps"]}
    n_short = sum(len(text) < 60 for text in texts)
    assert list(steps) == ["whitespace", "short", "exact"]
    assert steps["whitespace"]["documents_in"] == 301
    assert steps["short"]["removed"] == {"short": n_short}
    assert steps["exact"]["removed"] == {"exact duplicate": 1}
    example = steps["exact"]["examples"]["exact duplicate"]
    assert normalised(texts[7]).startswith(normalised(example["before"]))
    assert (example["document"], example["after"]) == ("texts.jsonl:301", "texts: texts.jsonl:8")
    assert sum(source["notes"].values()) == 1  # the record without a text
    for step, following in zip(source["steps"], source["steps"][1:], strict=False):
        assert step["documents_out"] == step["documents_in"] - sum(step["removed"].values())
        assert (step["documents_out"], step["characters_out"]) == (
            following["documents_in"],
            following["characters_in"],
        )
    counts = meta["splits"]
    assert counts["train"]["documents"] + counts["val"]["documents"] == steps["exact"]["documents_out"]
    assert counts["train"]["chars"] + counts["val"]["chars"] == steps["exact"]["characters_out"]
    for split, found in counts.items():
        kept = documents_of(tmp_path / "out", split)
        n_tokens = sum(shard["tokens"] for shard in meta["shards"] if shard["split"] == split)
        assert found["chars"] == sum(map(len, kept))
        assert found["bytes"] == sum(len(text.encode()) for text in kept)
        assert (
            found["tokens"]
            == n_tokens
            == sum(len(np.fromfile(path, np.uint16)) for path in (tmp_path / "out").glob(f"{split}-*.bin"))
        )


def test_equal_and_nearly_equal_documents_stay_in_one_split(cli, texts, tmp_path):
    nearly = [text + " indeed" for text in texts if len(text) > 250]
    doubled = [*texts, *[f"  {text.title()}" for text in texts], *nearly]
    path = tmp_path / "doubled.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in doubled))
    assert prepare(cli, path, tmp_path / "as-they-are", "--val_share", 0.5)[0] == 0
    train, val = ({normalised(t) for t in documents_of(tmp_path / "as-they-are", s)} for s in ("train", "val"))
    assert not train & val
    assert prepare(cli, path, tmp_path / "near", "--val_share", 0.5, "--cleaning", "exact,near")[0] == 0
    train, val = (documents_of(tmp_path / "near", split) for split in ("train", "val"))
    assert len(train) + len(val) < len(texts) + 3  # of texts of 250 characters and more no second form is left
    of = {normalised(text).removesuffix(" indeed"): "train" for text in train}
    assert not [text for text in val if len(text) > 250 and normalised(text).removesuffix(" indeed") in of]


def test_the_number_of_workers_changes_no_byte(corpus, tmp_path):
    for n in (1, 3):
        run = [sys.executable, "-c", _SCRIPT, str(corpus), "--out", str(tmp_path / str(n)), "--workers", str(n)]
        subprocess.run(run, check=True, capture_output=True, env=_environment(), timeout=100)
    assert sums(tmp_path / "1") == sums(tmp_path / "3")


# The command with small blocks, for there to be several; spawned workers import this program again.
_SCRIPT = """
import sys
from classiclm.cli import main
from classiclm.data import prepare
prepare.BLOCK_CHARS = 2000
if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:], "--tokenizer", "bpe-300", "--val_share", "0.1", "--shard_tokens", "2000"]))
"""


def _environment():
    return {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}


def kill_until_done(arguments, out, rng, n_kills):
    """Start the command again and again, killed as soon as it has got a little further, then let it finish."""
    for _ in range(n_kills):
        before = n_pieces(out)
        child = subprocess.Popen(arguments, env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        aim = before + rng.randint(1, 40)
        while child.poll() is None and n_pieces(out) < aim and not any(out.glob("*.bin")):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (out / "meta.json").exists()  # each kill hit work that was not finished
    done = subprocess.run(arguments, env=_environment(), capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return sums(out)


def n_pieces(out):
    return len(list((out / ".pieces").glob("*.safetensors")))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_killed_at_ten_moments_ends_with_the_same_bytes(texts, tmp_path, workers):
    path = tmp_path / "texts.jsonl"
    rows = (json.dumps({"text": f"{i}. {text}"}) for i in range(20) for text in texts)
    path.write_text("\n".join(rows))
    command = [sys.executable, "-c", _SCRIPT, str(path), "--cleaning", "whitespace,exact,near"]
    expected = kill_until_done([*command, "--out", str(tmp_path / "whole")], tmp_path / "whole", random.Random(0), 0)
    killed = [*command, "--out", str(tmp_path / "killed"), "--workers", str(workers)]
    assert kill_until_done(killed, tmp_path / "killed", random.Random(workers), 10) == expected


@pytest.mark.parametrize("n_done", [0, 1, 7])
def test_what_is_done_is_not_done_again(cli, corpus, tmp_path, monkeypatch, n_done):
    """The work stops at some piece, and the next start reads on behind the pieces that are there."""
    prepare(cli, corpus, tmp_path / "whole")
    made, real = [], stage.Pool.submit

    def stop_after(pool, path, *rest):
        if len(made) == n_done:
            raise KeyboardInterrupt
        made.append(path.name)
        real(pool, path, *rest)

    monkeypatch.setattr(stage.Pool, "submit", stop_after)
    assert prepare(cli, corpus, tmp_path / "out")[0] == 130
    monkeypatch.setattr(
        stage.Pool, "submit", lambda pool, path, *rest: made.append(path.name) or real(pool, path, *rest)
    )
    assert prepare(cli, corpus, tmp_path / "out")[0] == 0
    assert len(made) == len(set(made)) > 8
    assert sums(tmp_path / "out") == sums(tmp_path / "whole")


def test_the_same_command_again_says_that_it_is_finished(cli, corpus, tmp_path):
    prepare(cli, corpus, tmp_path / "out")
    before = sums(tmp_path / "out")
    code, table, said = prepare(cli, corpus, tmp_path / "out")
    assert (code, sums(tmp_path / "out")) == (0, before)
    assert "is finished" in said
    assert "texts" in table


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--cleaning", "short"], "cleaning.steps: None -> short"),
        (["--shard_tokens", "7"], "shard_tokens"),
        (["--limit", "9"], "limit"),
    ],
)
def test_other_settings_than_it_was_begun_with_are_refused(cli, corpus, tmp_path, flags, named):
    prepare(cli, corpus, tmp_path / "out")
    code, _, said = prepare(cli, corpus, tmp_path / "out", *flags)
    assert code == 2
    assert named in said
    assert len(said.splitlines()) == 1


def test_input_that_changed_meanwhile_is_refused(cli, corpus, tmp_path, monkeypatch):
    made, real = [], stage.Pool.submit

    def stop_after_two(pool, path, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        real(pool, path, *rest)

    monkeypatch.setattr(stage.Pool, "submit", stop_after_two)
    assert prepare(cli, corpus, tmp_path / "out")[0] == 130
    made.clear()
    corpus.write_text(corpus.read_text() + '{"text": "one more"}\n')
    code, _, said = prepare(cli, corpus, tmp_path / "out")
    assert code == 3
    assert "other content" in said


def test_a_folder_with_other_files_is_left_alone(cli, corpus, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    code, _, said = prepare(cli, corpus, tmp_path / "full")
    assert code == 2
    assert "letter.txt" in said


def test_a_single_document_cannot_be_split(cli, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("one document and no more\n")
    code, _, said = prepare(cli, path, tmp_path / "out")
    assert code == 3
    assert "--documents block" in said


def test_two_sources_with_one_name_are_told_apart(cli, corpus, tmp_path):
    other = tmp_path / "other" / "texts.jsonl"
    other.parent.mkdir()
    other.write_text('{"text": "alpha beta"}\n{"text": "gamma delta"}\n{"text": "epsilon"}\n')
    code, _, _ = cli("prepare", corpus, other, "--out", tmp_path / "out", "--tokenizer", "bpe-300", "--workers", 1)
    assert code == 0
    assert [source.name for source in open_dataset(tmp_path / "out").meta.sources] == ["texts", "texts-2"]


def test_special_tokens_in_documents_stay_text(cli, tmp_path):
    path = tmp_path / "odd.jsonl"
    odd = ["before <|endoftext|> after", "another one", "and a third <|endoftext|>"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in odd))
    assert prepare(cli, path, tmp_path / "out")[0] == 0
    assert sorted(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == sorted(odd)


def test_a_text_that_the_tokenizer_does_not_know_is_named(cli, corpus, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    corpus.with_name("plain.txt").write_text("abcdefghij " * 50)
    assert cli("tokenizer", "train", "char", "--data", corpus.with_name("plain.txt"), "--out", tokenizer)[0] == 0
    code, _, said = cli("prepare", corpus, "--out", tmp_path / "out", "--tokenizer", tokenizer, "--workers", 1)
    assert code == 3
    assert "texts.jsonl:1: character" in said


def test_weights_need_a_source_each(cli, corpus, tmp_path):
    code, _, said = prepare(cli, corpus, tmp_path / "out", "--weights", 1, 2)
    assert code == 2
    assert "are 2, and the sources 1" in said


def test_a_dead_worker_is_an_error_that_says_how_to_go_on(tmp_path):
    from classiclm.data import workers

    (tmp_path / "tokenizer.json").write_text(load_or_learn().to_json())
    pool = workers.Pool(2, load_or_learn(), tmp_path / "tokenizer.json")
    with pytest.raises(Error, match="was killed") as e, pool:
        submit_and_kill(pool, tmp_path)
    assert e.value.code == 4


def submit_and_kill(pool, folder):
    from classiclm.data.pieces import Block

    for i in range(4):
        pool.submit(folder / str(i), Block([], i, None, 0, False, {}), [], None)
        for process in list(pool._executor._processes.values()):
            process.kill()


@pytest.mark.parametrize("late", ["before", "after"])
def test_a_worker_that_dies_while_another_is_started_is_the_same_error(tmp_path, late, monkeypatch):
    """The executor has closed the pipes that the new one is given, or has told all but the new one to end."""
    from classiclm.data import workers

    (tmp_path / "tokenizer.json").write_text(load_or_learn().to_json())
    pool = workers.Pool(2, load_or_learn(), tmp_path / "tokenizer.json")
    executor, kind = pool._executor, pool._executor._mp_context.Process
    start = kind.start

    def start_late(process):
        for step in [until_broken, start] if late == "before" else [start, until_broken]:
            step(process)

    def until_broken(_):
        while executor._processes and not (executor._broken and executor._call_queue._reader.closed):
            time.sleep(0.01)

    monkeypatch.setattr(kind, "start", start_late)
    with pytest.raises(Error, match="was killed"), pool:
        submit_and_kill(pool, tmp_path)
    assert not any(isinstance(child, kind) for child in multiprocessing.active_children())


def load_or_learn():
    from classiclm.data.tokenizers import ByteBPE

    return ByteBPE.train("the cat sat on the mat", 260)


def write_blocks(path, texts):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n\n".join(texts))


def test_a_text_of_two_sources_is_in_one_split_also_where_one_is_small(cli, texts, tmp_path):
    write_blocks(tmp_path / "small" / "a.txt", texts[:10])
    write_blocks(tmp_path / "large" / "b.txt", texts[:30])
    flags = ["--documents", "block", "--tokenizer", "bpe-300", "--workers", 1, "--val_share", 0.001]
    assert cli("prepare", tmp_path / "small", tmp_path / "large", "--out", tmp_path / "out", *flags)[0] == 0
    train, val = (set(documents_of(tmp_path / "out", split)) for split in ("train", "val"))
    assert val
    assert not train & val


def test_a_masked_model_gets_documents_enough_in_both_splits(cli, texts, tmp_path):
    from classiclm.data.corpora import Data
    from classiclm.data.sentences import prepare_sentences

    write_blocks(tmp_path / "text" / "a.txt", texts[:40])
    flags = ["--documents", "block", "--tokenizer", "wordpiece-300", "--workers", 1]
    assert cli("prepare", tmp_path / "text", "--out", tmp_path / "out", *flags)[0] == 0
    assert len(prepare_sentences(Data(str(tmp_path / "out")), "bert").val.document_ends) == 2


@pytest.mark.parametrize("wrong", [["--cleaning", "shrot"], ["--text", "body"], ["--tokenizer", "gpt9"]])
def test_a_mistake_can_be_mended_in_the_same_folder(cli, corpus, tmp_path, wrong):
    assert prepare(cli, corpus, tmp_path / "out", *wrong)[0] in (2, 3)
    assert prepare(cli, corpus, tmp_path / "out")[0] == 0


def test_a_finished_folder_that_has_lost_a_shard_says_so_and_can_be_made_again(cli, corpus, tmp_path):
    prepare(cli, corpus, tmp_path / "out")
    before = sums(tmp_path / "out")
    (tmp_path / "out" / "val-00000.bin").unlink()
    code, _, said = prepare(cli, corpus, tmp_path / "out")
    assert code == 3
    assert "val-00000.bin" in said
    assert "delete meta.json" in said
    (tmp_path / "out" / "meta.json").unlink()
    assert prepare(cli, corpus, tmp_path / "out")[0] == 0
    assert sums(tmp_path / "out") == before


def test_an_unfinished_folder_is_a_defect_not_a_run(cli, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(stage.Pool, "submit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert prepare(cli, corpus, tmp_path / "out")[0] == 130
    code, out, _ = cli("fsck", tmp_path / "out")
    assert code == 3
    assert "not finished" in out
    code, _, said = cli("train", "gpt2-shakespeare-cpu", "--data", tmp_path / "out", "--out", tmp_path / "run")
    assert code == 3
    assert "not finished" in said


@pytest.mark.timeout(60)
def test_a_pipe_in_a_folder_is_an_error_and_is_not_opened(cli, texts, tmp_path):
    write_blocks(tmp_path / "text" / "a.txt", texts[:10])
    os.mkfifo(tmp_path / "text" / "b.txt")
    flags = ["--documents", "block", "--tokenizer", "bpe-300"]
    code, _, said = cli("prepare", tmp_path / "text", "--out", tmp_path / "out", *flags)
    assert code == 3
    assert "b.txt" in said


def test_names_are_counted_up_until_one_is_free(cli, texts, tmp_path):
    for folder, name in (("1", "a"), ("2", "a-3"), ("3", "a"), ("4", "a")):
        write_blocks(tmp_path / folder / f"{name}.txt", texts[:9])
    sources = [tmp_path / "1" / "a.txt", tmp_path / "2" / "a-3.txt", tmp_path / "3" / "a.txt", tmp_path / "4" / "a.txt"]
    flags = ["--documents", "block", "--tokenizer", "bpe-300", "--workers", 1]
    assert cli("prepare", *sources, "--out", tmp_path / "out", *flags)[0] == 0
    assert [source.name for source in open_dataset(tmp_path / "out").meta.sources] == ["a", "a-3", "a-2", "a-4"]


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_stops_it_cleanly_whenever_it_comes(corpus, tmp_path, number):
    command = [sys.executable, "-c", _SCRIPT, str(corpus), "--workers", "2", "--out"]
    for i, delay in enumerate([0.3, 0.6, 0.9, 1.1, 1.4, 1.8]):
        child = subprocess.Popen(
            [*command, str(tmp_path / str(i))],
            env=_environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        time.sleep(delay)
        os.killpg(child.pid, number)
        _, said = child.communicate(timeout=30)
        assert child.returncode in (0, 128 + number, -number), (
            said
        )  # finished, asked in time, or before it could listen
        assert "Traceback" not in said or child.returncode == -number
