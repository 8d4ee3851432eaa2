"""Files of unknown origin, opened and handed to the commands: what they hold comes out, or one line says why not."""

import gzip
import json
import os
import random
import socket
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classiclm.data import opening
from classiclm.data.corpora import Data, read_documents
from classiclm.data.opening import Notes, ending_of, is_archive, is_sound, read_bytes, read_text
from classiclm.errors import BAD_INPUT, USAGE, Error

SOURCE = Path(__file__).resolve().parent.parent / "src"
PROPERTY = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refusal(call, *arguments):
    """The one line of an error of bad input."""
    with pytest.raises(Error) as caught:
        call(*arguments)
    assert caught.value.code == BAD_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data):
    return pytest.importorskip("zstandard").compress(data)


# Compressed files


@PROPERTY
@given(st.lists(st.binary(max_size=40), max_size=4), st.integers(1, 9), st.sampled_from([".gz", ".zst"]))
def test_members_in_a_row_are_one_file_however_they_are_read(tmp_path, monkeypatch, parts, size, ending):
    """gzip(1) and zstd(1) read a concatenation of compressed files as that of their contents."""
    pack = gzip.compress if ending == ".gz" else zstd
    path = write(tmp_path / f"a.txt{ending}", b"".join(pack(part) for part in parts))
    monkeypatch.setattr(opening, "_PIECE", size)
    monkeypatch.setattr(opening, "_ZSTD_PIECE", size)
    assert b"".join(read_bytes(path)) == b"".join(parts)


def test_frames_of_zstd_that_are_to_be_skipped_are(tmp_path):
    """RFC 8878, 3.1.2: a magic number of 0x184D2A50 to 5F, a length, and that many bytes for somebody else."""
    skipped = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"
    path = write(tmp_path / "a.txt.zst", skipped + zstd(b"one ") + skipped + zstd(b"two") + skipped)
    assert b"".join(read_bytes(path)) == b"one two"


def test_a_wrong_check_sum_is_damage(tmp_path):
    data = bytearray(gzip.compress(b"some text" * 100))
    data[-6] ^= 1  # of the sum in the last eight bytes
    assert "is damaged" in refusal(list, read_bytes(write(tmp_path / "a.txt.gz", bytes(data))))


def bomb(ending):
    """Two GB of one letter, in a file that did not need them to be made."""
    block = b"a" * (1 << 20)
    if ending == ".zst":
        return zstd(block * 64) * 32
    packer = zlib.compressobj(9, wbits=31)
    return b"".join(packer.compress(block) for _ in range(300)) + packer.flush()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_bomb_is_refused_within_seconds_and_bounded_memory(tmp_path, ending):
    path = write(tmp_path / f"a.txt{ending}", bomb(ending))
    began = time.monotonic()
    tracemalloc.start()
    try:
        message = refusal(lambda: [None for _ in read_bytes(path)])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "200 times" in message
    assert time.monotonic() - began < 5
    assert most < 150 << 20


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", False),
        ("a.txt.gz", False),
        ("a.zip", True),
        ("A.Tar.GZ", True),
        ("a.tgz", True),
        ("a.7z.zst", True),
        ("a.txt.gz.zst", True),
        ("about.zip.txt", False),
        ("about.tar.md.gz", False),
        ("zip", False),
        (".zip.txt", False),
    ],
)
def test_an_archive_is_known_by_its_last_ending(name, expected):
    assert is_archive(Path(name)) == expected


@pytest.mark.parametrize(
    ("name", "ending"),
    [("A.TXT.gz", ".txt"), ("a.b.jsonl", ".jsonl"), ("a.gz", ""), ("a", ""), ("1.", ""), ("a.Csv.ZST", ".csv")],
)
def test_the_ending_is_that_of_the_content(name, ending):
    assert ending_of(Path(name)).rstrip(".") == ending


# Characters


@PROPERTY
@given(st.binary(max_size=60), st.integers(1, 6), st.sampled_from(["replace", "skip"]))
def test_any_bytes_are_the_same_text_however_they_are_cut(tmp_path, monkeypatch, data, size, errors):
    data = data.replace(b"\0", b"\xf0")
    path = write(tmp_path / "a.txt", data)
    monkeypatch.setattr(opening, "_PIECE", size)
    found = "".join(read_text(path, errors, Notes()))
    expected = data.decode(errors="surrogateescape").removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert [("\ufffd" if "\ud800" <= c <= "\udfff" else c) for c in expected] == [
        ("\ufffd" if "\ud800" <= c <= "\udfff" else c) for c in found
    ]
    assert is_sound(found) == (errors == "replace" or is_sound(expected))


@pytest.mark.parametrize("border", [-1, 0, 1])
def test_what_the_border_of_a_piece_cuts_is_whole(tmp_path, border):
    """With pieces of the real size: a line end, a character of four bytes."""
    for middle, expected in (("\r\n", "\n"), ("\U0001f600", "\U0001f600"), ("\r", "\n")):
        text = "x" * (opening._PIECE - 1 + border) + middle + "y"
        path = write(tmp_path / "a.txt", text)
        assert "".join(read_text(path, "strict", Notes())) == text.replace(middle, expected)


def test_a_bad_byte_is_named_by_its_place_in_the_whole_file(tmp_path):
    at = 3 * opening._PIECE + 17
    path = write(tmp_path / "a.txt", b"x" * at + b"\xff" + b"y" * 100)
    assert f"not UTF-8 at byte {at}." in refusal(list, read_text(path, "strict", Notes()))
    write(path, b"x" * at + b"\0")
    assert f"a zero byte at {at})" in refusal(list, read_text(path, "strict", Notes()))


@pytest.mark.parametrize(
    ("text", "expected"), [("", True), ("aé€\U0001f600", True), ("a\udcff", False), ("\ud83d", False)]
)
def test_sound_is_what_can_be_written(text, expected):
    assert is_sound(text) is expected


# Through the commands


def bad_files(folder):
    """Name -> (content, flags of prepare, what the line says); what is no file is made in the folder."""
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(folder / "socket.txt"))
    (folder / "link.txt").symlink_to(folder / "nowhere")
    (folder / "folder.txt").mkdir()
    column = "--text: title"
    return {
        "pipe.txt": (None, "", "is no plain file"),
        "socket.txt": (None, "", "is no plain file"),
        "link.txt": (None, "", "leads nowhere"),
        "folder.txt": (None, "", "has no .txt"),
        "missing.txt": (None, "", "does not exist"),
        "empty.txt": (b"", "", ""),
        "empty.jsonl": (b"", "", ""),
        "blank.txt": (b" \n\n", "", ""),
        "binary.txt": (bytes(range(256)), "", "zero byte"),
        "utf16.txt": ("some text".encode("utf-16"), "", "zero byte"),
        "latin.txt": (b"caf\xe9", "", "--errors replace or skip"),
        "skipped.txt": (b"caf\xe9", "--errors skip", ""),
        "mail.eml": (b"Subject: x\n\ncaf\xe9\n", "", ""),
        "line.jsonl": (b'{"text": "a"}\n{"text"', "", "line.jsonl:2"),
        "list.jsonl": (b"[1]\n", "", "list.jsonl:1"),
        "deep.jsonl": (b"[" * 100_000, "", "nested too deeply"),
        "number.jsonl": (b'{"n": ' + b"1" * 5000 + b"}", "", "a number is too long"),
        "half.jsonl": (b'{"text": "\\ud800"}\n', "", "lone surrogate"),
        "column.jsonl": (b'{"title": "a"}\n', "", column),
        "column.csv": (b"title,n\na,1\n", "", f"{column}, n"),
        "many.jsonl": (json.dumps({f"c{i}": 1 for i in range(9999)}).encode(), "", "c49 ..."),
        "odd\nname.jsonl": (b'{"a\\nb": 1}\n', "", "--text: a b"),
        "group.csv": (b"text,n\na,1\n", "--group book", "no column 'book'"),
        "numbers.jsonl": (b'{"text": 3}\n', "", ""),
        "quote.csv": (b'text,n\na,1\n"b\nc,2\n', "", "quote.csv:3: is no csv"),
        "ragged.csv": (b"text,n\na,1\nb\n", "", "ragged.csv:3"),
        "not.parquet": (b"PAR1", "", "parquet"),
        "short.txt.gz": (gzip.compress(b"some text")[:-9], "", "ends too early"),
        "short.txt.zst": (zstd(b"some text" * 50)[:-3], "", "ends too early"),
        "text.txt.gz": (b"no gzip", "", "is damaged"),
        "a.tar.gz": (gzip.compress(b"a"), "", "an archive"),
        "a.txt.gz.gz": (gzip.compress(gzip.compress(b"a")), "", "compressed twice"),
        "what.bin": (b"some text", "", "--format"),
        "format.txt": (b"a", "--format prose", "prose"),
        "bomb.jsonl.gz": (bomb(".gz"), "", "MiB"),
    }


@pytest.mark.timeout(120)
def test_prepare_answers_each_bad_input_with_one_line(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, (name, (content, flags, words)) in enumerate(bad_files(tmp_path).items()):
        path = tmp_path / name
        if content is not None:
            write(path, content)
        rest = ["--out", tmp_path / f"out-{i}", "--tokenizer", "bpe-300", "--workers", 1, *flags.split()]
        code, out, said = cli("prepare", path, *rest)
        errors = [line for line in said.splitlines() if "error: " in line]
        assert code == (USAGE if name == "format.txt" else BAD_INPUT), (name, said)
        assert len(errors) == 1, (name, said)
        assert said.splitlines()[-1] == errors[0], (name, said)
        assert "Fix: " in errors[0], (name, said)
        assert "Traceback" not in said
        assert words in errors[0], (name, said)
        assert out == "", name


def test_a_file_name_that_is_no_text_is_named_as_far_as_it_can_be(tmp_path):
    path = write(tmp_path / os.fsdecode(b"\xff\xfe.jsonl"), b'{"text": "a"}\n{')
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "classiclm", "prepare", path, "--out", tmp_path / "out", "--tokenizer", "bpe-300"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == BAD_INPUT
    assert "\\udcff\\udcfe.jsonl:2: is no JSON" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def records(n):
    rng = random.Random(3)
    words = ["the", "a", "cat", "dog", "house", "river", "walks", "sees", "under", "over", "green", "old", "slowly"]
    return [f"Text {i}: " + " ".join(rng.choices(words, k=30)) for i in range(n)]


def written(folder, texts):
    """The same records in every form that a file may have."""
    jsonl = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    box = "".join(f"From a@b\n{text}\n\n" for text in texts)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    return [
        write(folder / "a.jsonl", jsonl),
        write(folder / "a.jsonl.gz", gzip.compress(jsonl)),
        write(folder / "a.JSONL.zst", zstd(jsonl)),
        write(folder / "a.csv", "text\n" + "".join(f'"{text}"\n' for text in texts)),
        write(folder / "a.tsv", "n\ttext\n" + "".join(f"1\t{text}\n" for text in texts)),
        write(folder / "a.mbox", box),
        folder / "a.parquet",
    ]


def test_a_corpus_may_be_a_file_of_records_in_any_form(tmp_path):
    texts = records(20)
    for path in written(tmp_path, texts):
        assert [text.rstrip("\n") for text in read_documents(Data(str(path)))] == texts, path


def test_a_corpus_may_be_a_pattern_or_folder_of_files_of_records(tmp_path):
    texts = records(6)
    for i in (0, 2, 4):
        write(tmp_path / f"{i}.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts[i : i + 2]))
    assert read_documents(Data(f"{tmp_path}/*.jsonl")) == texts
    assert read_documents(Data(str(tmp_path))) == texts
    write(tmp_path / "about.md", "about them")
    assert read_documents(Data(str(tmp_path))) == ["about them"]  # the texts of a folder come first


def test_a_text_that_is_compressed_with_zstd_is_a_corpus_too(tmp_path):
    assert read_documents(Data(str(write(tmp_path / "a.txt.zst", zstd(b"some text\n"))))) == ["some text\n"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "--data.errors replace"),
        ("b.jsonl", b'{"text": "\\udc00"}\n', "--data.errors replace"),
        ("c.jsonl", b'{"title": "a"}\n', "classiclm prepare` on it: name one of its columns with --text: title"),
        ("d.jsonl", b'{"text": "a"}\n{', "d.jsonl:2"),
    ],
)
def test_a_remedy_is_one_that_train_has(tmp_path, name, content, words):
    path = write(tmp_path / name, content)
    message = refusal(read_documents, Data(str(path)))
    assert words in message
    assert "pass --errors" not in message
    if "replace" in words:
        assert "\ufffd" in read_documents(Data(str(path), errors="replace"))[0]


def test_train_learns_from_records(cli, tmp_path):
    path = written(tmp_path, records(200))[0]
    small = ["--model.n_layers", 1, "--model.d_model", 16, "--model.n_heads", 2, "--model.n_ctx", 32, "--batch", 2]
    run = ["--data", path, "--out", tmp_path / "run", "--tokenizer", "char", "--steps", 2, "--device", "cpu", *small]
    code, _, said = cli("train", "gpt2-shakespeare-cpu", *run)
    assert code == 0, said
    code, _, said = cli("train", "gpt2-shakespeare-cpu", *["--data", tmp_path / "none.jsonl", *run[2:]])
    assert code in (USAGE, BAD_INPUT)
    assert len(said.splitlines()) == 1
