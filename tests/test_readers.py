"""Files of every kind and state give their documents, or one line that says what is wrong; oracles are Python's own."""

import csv
import gzip
import io
import json
import mailbox
import os
import random
import re
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classiclm.data import mailboxes, opening, readers
from classiclm.data.readers import MAX_CHARS, Notes, Reading, list_files, read_file
from classiclm.errors import BAD_INPUT, Error

CUT = "documents cut because they are too long"
NO_TEXT = "records without text"
PROPERTY = settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def documents(path, notes=None, name=None, **how):
    return list(read_file(Path(path), Reading(**how), name or Path(path).name, Notes() if notes is None else notes))


def texts(path, notes=None, **how):
    return [document.text for document in documents(path, notes, **how)]


def refusal(path, **how):
    """The one line that a file is refused with."""
    with pytest.raises(Error) as caught:
        documents(path, **how)
    message = str(caught.value)
    assert caught.value.code == BAD_INPUT
    assert "\n" not in message
    assert re.fullmatch(r".+: .+\. Fix: .+\.", message)
    return message


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def packed(data, ending):
    if ending == ".gz":
        return gzip.compress(data, mtime=0)
    if ending == ".zst":
        return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)  # as zstd does
    return data


# --- what a document is ---


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    text = " A title\n\nand a line  \n\n\n"
    assert [(d.text, d.name) for d in documents(write(tmp_path / "a.txt", text))] == [(text, "a.txt")]


def test_blocks_end_at_blank_lines_and_keep_their_indentation(tmp_path):
    path = write(tmp_path / "a.md", "\n \n  one\n two\n \t\n\nthree\n\n\n    four\n\n")
    found = [(d.text, d.name) for d in documents(path, documents="block")]
    assert found == [("  one\n two", "a.md:1"), ("three", "a.md:2"), ("    four", "a.md:3")]


def test_lines_are_numbered_as_in_an_editor_and_blank_ones_are_none(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\n  \ntwo\u2028still two\nthree")
    found = [(d.text, d.name) for d in documents(path, documents="line")]
    assert found == [("one", "a.txt:1"), ("two\u2028still two", "a.txt:4"), ("three", "a.txt:5")]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["txt", "md", "jsonl", "csv", "tsv", "eml", "mbox", "parquet"])
def test_every_format_is_read_plain_and_compressed(tmp_path, kind, ending):
    rows = [("one", 'zwei, "drei"'), ("two", "vier\nfünf")]
    if kind == "parquet":
        data = parquet_of({"name": [a for a, _ in rows], "text": [b for _, b in rows]})
    elif kind in ("csv", "tsv"):
        out = io.StringIO()
        csv.writer(out, delimiter="," if kind == "csv" else "\t").writerows([("name", "text"), *rows])
        data = out.getvalue().encode()
    elif kind == "jsonl":
        data = "".join(json.dumps({"name": a, "text": b}) + "\n" for a, b in rows).encode()
    else:
        data = b"Subject: x\n\n" + rows[1][1].encode()
    expected = [b for _, b in rows] if kind in ("jsonl", "csv", "tsv", "parquet") else [data.decode()]
    path = write(tmp_path / f"a.{kind}{ending}", packed(b"From a\n" * (kind == "mbox") + data, ending))
    assert texts(path) == expected
    assert texts(path.rename(tmp_path / f"A.{kind.upper()}{ending.upper()}")) == expected


def parquet_of(columns, **options):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), out, **options)
    return out.getvalue()


# --- bytes and characters ---


@PROPERTY
@given(
    st.lists(st.sampled_from(["a", "\r\n", "\n", "\r", "é", "€", "\U0001f600", "\ufeff", "\ufffd"]), max_size=30),
    st.integers(1, 7),
    st.booleans(),
)
def test_text_is_the_same_however_its_bytes_are_cut(tmp_path, monkeypatch, characters, size, has_bom):
    text = "".join(characters)
    path = write(tmp_path / "a.txt", ("\ufeff" if has_bom else "") + text)
    monkeypatch.setattr(opening, "_PIECE", size)
    with path.open(encoding="utf-8-sig") as file:  # with Python's own line ends
        expected = file.read()
    assert "".join(texts(path)) == (expected if expected.strip() else "")


@PROPERTY
@given(st.lists(st.sampled_from([b"a\n", b"\xff", b"\xe2\x82", b"\xf0\x9f", b"\xc3\xa9", b"\x80"])), st.integers(1, 5))
def test_bad_bytes_are_found_however_they_are_cut(tmp_path, monkeypatch, pieces, size):
    data = b"x" + b"".join(pieces)
    path = write(tmp_path / "a.txt", data)
    monkeypatch.setattr(opening, "_PIECE", size)
    notes = Notes()
    escaped = data.decode(errors="surrogateescape")
    n_bad = len(re.findall("[\udc80-\udcff]", escaped))
    assert texts(path, notes, errors="replace") == [re.sub("[\udc80-\udcff]", "\ufffd", escaped)]
    assert sum(notes.counts.values()) == n_bad
    assert len(texts(path, errors="skip")) == (0 if n_bad else 1)
    if not n_bad:
        assert texts(path) == [data.decode()]
        return
    with pytest.raises(UnicodeDecodeError) as expected:
        data.decode()
    assert f"is not UTF-8 at byte {expected.value.start}." in refusal(path)


@PROPERTY
@given(st.text(alphabet="ab \t\n", max_size=40), st.integers(1, 5))
def test_blocks_are_the_same_however_the_text_is_cut(tmp_path, monkeypatch, text, size):
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(readers, "_gathered", lambda pieces: iter(pieces))
    monkeypatch.setattr(opening, "_PIECE", size)
    blocks = [[]]
    for line in text.split("\n"):
        if line.strip():
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    expected = [(block, f"a.txt:{i}") for i, block in enumerate(filter(None, blocks), start=1)]
    found = [(d.text.split("\n"), d.name) for d in documents(path, documents="block")]
    assert [(" ".join(a).split(), b) for a, b in found] == [(" ".join(a).split(), b) for a, b in expected]
    assert [len(a) for a, _ in found] == [len(a) for a, _ in expected]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_mark_of_byte_order_is_dropped_from_compressed_files_too(tmp_path, ending):
    data = "\ufefftext\n".encode()
    members = b"".join(packed(data[i : i + 1], ending) for i in range(len(data)))
    assert texts(write(tmp_path / f"a.txt{ending}", members)) == ["text\n"]
    assert texts(write(tmp_path / f"b.txt{ending}", packed(data, ending))) == ["text\n"]


def test_bad_bytes_cost_only_the_block_or_line_they_are_in(tmp_path):
    path, notes = write(tmp_path / "a.txt", b"one\n\nt\xffwo\n\nthree\n"), Notes()
    assert texts(path, notes, documents="block", errors="skip") == ["one", "three"]
    assert dict(notes.counts) == {"documents left out for bytes that are not UTF-8": 1}
    assert texts(path, documents="line", errors="skip") == ["one", "three"]


def test_bad_bytes_in_records_follow_the_policy(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    bad = pyarrow.array([b"good", b"b\xffd"]).cast(pyarrow.binary())
    broken = pyarrow.StringArray.from_buffers(2, bad.buffers()[1], bad.buffers()[2])  # as nothing checks
    files = {
        "a.parquet": parquet_of({"text": broken}),
        "a.jsonl": b'{"text": "good"}\n{"text": "b\xffd"}\n',
        "half.jsonl": b'{"text": "good"}\n{"text": "b\\ud83dd"}\n',
        "a.csv": b"text\ngood\nb\xffd\n",
    }
    for name, data in files.items():
        path = write(tmp_path / name, data)
        assert "UTF-8" in refusal(path) or "half a character" in refusal(path), name
        assert texts(path, errors="replace") == ["good", "b\ufffdd"], name
        assert texts(path, errors="skip") == ["good"], name


def test_line_ends_inside_records_are_made_those_of_unix(tmp_path):
    record = json.dumps({"text": "a\r\nb"}) + "\r\n"
    assert texts(write(tmp_path / "a.jsonl", record)) == ["a\nb"]
    assert texts(write(tmp_path / "a.csv", b'text\r\n"a\r\nb"\r\n')) == ["a\nb"]
    assert texts(write(tmp_path / "a.parquet", parquet_of({"text": ["a\r\nb"]}))) == ["a\nb"]


# --- documents and records that are too long ---


@pytest.mark.parametrize("kind", ["file", "block", "line"])
def test_a_long_line_is_cut_into_documents_of_the_limit(tmp_path, kind):
    path, notes = write(tmp_path / "a.txt", b"x" * (2 * MAX_CHARS + 5)), Notes()
    found = documents(path, notes, documents=kind)
    assert [len(d.text) for d in found] == [MAX_CHARS, MAX_CHARS, 5]
    assert len({d.name for d in found}) == 3
    assert dict(notes.counts) == {CUT: 1}


@PROPERTY
@given(st.text(alphabet="ab\n", max_size=120), st.integers(1, 40), st.sampled_from(["file", "line"]))
def test_cutting_loses_nothing_and_prefers_line_breaks(tmp_path, monkeypatch, text, size, kind):
    path = write(tmp_path / "a.txt", "b" + text)
    monkeypatch.setattr(readers, "MAX_CHARS", 20)
    monkeypatch.setattr(opening, "_PIECE", size)
    found = texts(path, documents=kind)
    assert max(map(len, found)) <= 20
    assert "".join(found).replace("\n", "") == ("b" + text).replace("\n", "")
    for part in found[:-1] if kind == "file" else []:
        assert part.endswith("\n") or "\n" not in part[10:] or len(part) < 20


def test_a_document_that_is_exactly_as_long_as_may_be_is_not_cut(tmp_path):
    notes = Notes()
    assert len(texts(write(tmp_path / "a.txt", b"x" * MAX_CHARS), notes)) == 1
    assert not notes.counts


def test_a_long_record_is_cut_and_one_that_is_longer_than_a_record_may_be_is_refused(tmp_path, monkeypatch):
    record = json.dumps({"text": "x" * (MAX_CHARS + 1)})
    notes = Notes()
    assert [d.name for d in documents(write(tmp_path / "a.jsonl", record), notes)] == ["a.jsonl:1#1", "a.jsonl:1#2"]
    assert dict(notes.counts) == {CUT: 1}
    monkeypatch.setattr(readers, "MAX_RECORD", 1 << 20)
    assert "a line of more than 1 MiB" in refusal(tmp_path / "a.jsonl")
    field = write(tmp_path / "a.csv", b'text\n"' + b"x\n" * (1 << 20) + b'"\n')
    assert "field larger" in refusal(field)


def test_csv_fields_may_be_longer_than_the_csv_modules_own_limit(tmp_path):
    long = "word, " * 50_000
    assert len(long) > 2 * 131_072
    assert texts(write(tmp_path / "a.csv", f'text,n\n"{long}",1\n')) == [long]


def test_of_a_message_that_is_too_long_the_beginning_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_CHARS", 100)
    message = "Subject: x\n\n" + "y" * 200
    notes = Notes()
    assert texts(write(tmp_path / "a.eml", message), notes) == [message[:100]]
    box = f"From a\n{message}\n\nFrom b\nSubject: z\n\nshort\n"
    found = texts(write(tmp_path / "a.mbox", box), notes)
    assert found == [message[:100], "Subject: z\n\nshort\n"]
    assert list(notes.counts.values()) == [2]


# --- records ---


def test_records_without_text_are_left_out_and_counted(tmp_path):
    values = ["one", None, "", "two"]
    files = {
        "a.jsonl": "".join(json.dumps({"text": v}) + "\n" for v in [*values, 3, [], {"a": 1}]) + '{"other": 1}\n\n',
        "a.csv": "text,n\none,1\n,2\n,3\ntwo,4\n\n",
    }
    for name, content in files.items():
        notes = Notes()
        assert texts(write(tmp_path / name, content), notes) == ["one", "two"]
        assert dict(notes.counts) == {NO_TEXT: 6 if name == "a.jsonl" else 2}
    notes = Notes()
    assert texts(write(tmp_path / "a.parquet", parquet_of({"text": values})), notes) == ["one", "two"]
    assert dict(notes.counts) == {NO_TEXT: 2}


@pytest.mark.parametrize("kind", ["large_string", "dictionary", "string_view"])
def test_parquet_text_may_be_kept_in_any_of_arrows_ways(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    plain = pyarrow.array(["eins", "zwölf", None])
    column = plain.dictionary_encode() if kind == "dictionary" else plain.cast(getattr(pyarrow, kind)())
    assert texts(write(tmp_path / "a.parquet", parquet_of({"text": column}))) == ["eins", "zwölf"]


def test_neighbours_of_a_group_are_one_document(tmp_path):
    rows = [("A", "one"), ("A", "two"), ("B", "three"), ("B", None), ("B", "four"), ("A", "five")]
    expected = [("one\n\ntwo", 1), ("three\n\nfour", 3), ("five", 6)]
    jsonl = "".join(json.dumps({"book": a, "text": b}) + "\n" for a, b in rows)
    parquet = parquet_of({"book": [a for a, _ in rows], "text": [b for _, b in rows]}, row_group_size=1)
    for name, content in (("a.jsonl", jsonl), ("a.parquet", parquet)):
        found = documents(write(tmp_path / name, content), group="book")
        assert [(d.text, d.name) for d in found] == [(text, f"{name}:{row}") for text, row in expected]


def test_a_group_is_closed_before_it_grows_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_CHARS", 10)
    rows = "".join(json.dumps({"g": 1, "text": t}) + "\n" for t in ("abcd", "efgh", "ijkl"))
    assert texts(write(tmp_path / "a.jsonl", rows), group="g") == ["abcd\n\nefgh", "ijkl"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"title": "x", "body": "y"}\n'),
        ("a.csv", "title,body\nx,y\n"),
        ("a.tsv", "title\tbody\nx\ty\n"),
        ("a.parquet", None),
    ],
)
def test_a_wrong_column_is_answered_with_those_there_are(tmp_path, name, content):
    content = parquet_of({"title": ["x"], "body": ["y"]}) if content is None else content
    path = write(tmp_path / name, content)
    assert "no column 'text'" in refusal(path)
    assert "--text: title, body" in refusal(path)
    assert "no column 'book'" in refusal(path, text="body", group="book")
    assert texts(path, text="body") == ["y"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "a.jsonl:2: is no JSON"),
        ("a.jsonl", '{"text": "x"}\n{"text": "cut sh', "a.jsonl:2: is no JSON"),
        ("a.jsonl", '{"text": "x"}\n\n["x"]\n', "a.jsonl:3: is no JSON object"),
        ("a.jsonl", "[" * 200_000 + "\n", "a.jsonl:1: is no JSON"),
        ("a.jsonl", '{"text": ' + "9" * 10_000 + "}\n", "a.jsonl:1: is no JSON"),
        ("a.csv", 'text,n\n"never closed,1\nx,2\n', "is no csv"),
        ("a.csv", "text,n\nx,1\nx, with a comma,2\n", "a.csv:3: has 3 fields, and the header has 2"),
        ("a.parquet", "PAR1 but no more than that", "is no readable parquet file"),
        ("a.parquet", "", "is no readable parquet file"),
        ("a.parquet.gz", gzip.compress(b"no parquet", mtime=0), "is no readable parquet file"),
    ],
)
def test_broken_records_are_named_by_file_and_line(tmp_path, name, content, words):
    if "parquet" in name:
        pytest.importorskip("pyarrow")
    assert words in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_parquet_file_that_is_cut_short_is_refused(tmp_path, share):
    whole = parquet_of({"text": [f"document {i}" for i in range(1000)]})
    assert "a.parquet: is no readable parquet file" in refusal(
        write(tmp_path / "a.parquet", whole[: int(len(whole) * share)])
    )


def test_damage_in_the_middle_of_a_parquet_file_is_no_traceback(tmp_path):
    whole = parquet_of({"text": [f"document {i} é" for i in range(1000)]}, compression="zstd")
    generator = random.Random(1)
    n_refused = 0
    for _ in range(60):
        data = bytearray(whole)
        for place in generator.sample(range(len(data)), 5):
            data[place] ^= 1 << generator.randrange(8)
        try:
            documents(write(tmp_path / "a.parquet", bytes(data)))
        except Error:
            n_refused += 1
    assert n_refused > 20


@PROPERTY
@given(st.lists(st.tuples(st.text(st.sampled_from('ab,"\n;é')), st.text("a,\n")), min_size=1, max_size=5))
def test_csv_is_read_as_it_was_written(tmp_path, rows):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("n", "text"), *(("1", f"x{a}{b}") for a, b in rows)])
    assert texts(path) == [f"x{a}{b}" for a, b in rows]


@PROPERTY
@given(st.binary(max_size=200), st.sampled_from(["jsonl", "csv", "tsv", "txt", "md", "eml", "mbox", "txt.gz"]))
def test_random_bytes_are_read_or_refused_in_one_line(tmp_path, data, kind):
    path = write(tmp_path / f"a.{kind}", data)
    try:
        found = documents(path, errors="replace")
    except Error:
        assert path.name in refusal(path, errors="replace")
    else:
        assert all(document.name.startswith(path.name) for document in found)


# --- mail ---


def test_an_mbox_has_the_messages_that_pythons_own_reader_finds(tmp_path):
    path = tmp_path / "a.mbox"
    box = mailbox.mbox(path)
    bodies = ["one\n", "From the start\n\nFrom here\n", "", "line\n\n\nline\n"]
    for i, body in enumerate(bodies):
        message = mailbox.mboxMessage()
        message["Subject"] = f"number {i}"
        message.set_payload(body)
        box.add(message)
    box.close()
    found = texts(path)
    assert [text.partition("\n\n")[2].rstrip() for text in found] == [body.rstrip() for body in bodies]
    assert [text.partition("\n")[0] for text in found] == [f"Subject: number {i}" for i in range(4)]


@pytest.mark.parametrize("size", [1, 3, 50])
def test_an_mbox_is_the_same_however_its_bytes_are_cut(tmp_path, monkeypatch, size):
    content = b"From a\nX: 1\n\nbody\n\nFrom b\r\nX: 2\r\n\r\n>From me \xff\r\n\r\nFrom c\nX: 3\n\nend"
    path = write(tmp_path / "a.mbox", content)
    monkeypatch.setattr(opening, "_PIECE", size)
    messages = [text.replace("\r", "").rstrip() for text in texts(path)]
    assert messages == ["X: 1\n\nbody", "X: 2\n\nFrom me \udcff", "X: 3\n\nend"]


def test_a_long_line_of_an_mbox_comes_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(mailboxes, "_LONGEST_LINE", 20)
    monkeypatch.setattr(opening, "_PIECE", 7)
    line = "".join(map(str, range(100)))
    assert texts(write(tmp_path / "a.mbox", f"From a\nX: 1\n\n{line}\n\nFrom b\n{line}\n")) == [
        f"X: 1\n\n{line}\n",
        f"{line}\n",
    ]


def test_mail_comes_raw_with_all_its_bytes(tmp_path):
    raw = b"\xef\xbb\xbfSubject: caf\xe9\r\n\r\nna\xefve\r\n"
    (text,) = texts(write(tmp_path / "1.", raw))
    assert text.encode(errors="surrogateescape") == raw[3:]


# --- compressed files ---


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_or_damaged_is_refused(tmp_path, ending):
    data = random.Random(1).randbytes(20_000).hex().encode()
    whole = packed(data, ending)
    for size in (1, 5, len(whole) // 2, len(whole) - 1):
        refusal(write(tmp_path / f"a.txt{ending}", whole[:size]))
    refusal(write(tmp_path / f"a.txt{ending}", whole[:100] + b"garbage" + whole[107:]))
    refusal(write(tmp_path / f"a.txt{ending}", whole + b"garbage"))
    assert texts(write(tmp_path / f"a.txt{ending}", whole + whole)) == [(data * 2).decode()]


def test_zeros_behind_a_gzip_member_are_padding(tmp_path):
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(b"text", mtime=0) + b"\0" * 600)) == ["text"]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_bomb_is_refused_before_it_unfolds(tmp_path, ending):
    path = write(tmp_path / f"a.txt{ending}", packed(b"a" * (200 << 20), ending))
    limit = 65 << 20 if ending == ".gz" else 129 << 20
    sizes = []
    with pytest.raises(Error, match="more than 200 times its size"):
        sizes.extend(map(len, opening.read_bytes(path)))
    assert max(sizes, default=0) <= 32 << 20
    assert sum(sizes) <= limit
    refusal(path)


def test_much_text_that_is_compressed_well_is_no_bomb(tmp_path):
    data = b"".join(b"%d bottles\n" % (i % 1000) for i in range(100_000))
    assert len(data) / len(gzip.compress(data, mtime=0)) < 200
    assert texts(write(tmp_path / "a.txt.gz", gzip.compress(data, mtime=0))) == [data.decode()]
    few = b"a" * (1 << 20)  # compressed a thousandfold, but small
    assert texts(write(tmp_path / "b.txt.gz", gzip.compress(few, mtime=0))) == [few.decode()]


def archives():
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("a.txt", "text")
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as file:
        file.addfile(tarfile.TarInfo("a.txt"))
    tar, zipped = outer.getvalue(), inner.getvalue()
    return {
        "a.zip": zipped,
        "a.tar": tar,
        "a.TAR.GZ": gzip.compress(tar, mtime=0),
        "a.tgz": gzip.compress(tar, mtime=0),
        "a.txt.gz.gz": gzip.compress(gzip.compress(b"text", mtime=0)),
        "a.zip.gz": gzip.compress(zipped, mtime=0),
        "a.7z": b"7z\xbc\xaf\x27\x1c",
        "a.txt": gzip.compress(b"text", mtime=0),  # under another name: binary
        "b.txt": zipped,
        "c.txt.gz": gzip.compress(gzip.compress(b"text", mtime=0)),
    }


@pytest.mark.parametrize("name", archives())
def test_archives_and_files_compressed_twice_are_refused(tmp_path, name):
    message = refusal(write(tmp_path / name, archives()[name]), format="text")
    assert ("is an archive" in message) == (name not in ("a.txt", "b.txt", "c.txt.gz"))


def test_a_text_about_archives_is_a_text(tmp_path):
    assert texts(write(tmp_path / "how-to.zip.txt", "unzip it")) == ["unzip it"]
    assert texts(write(tmp_path / "how-to.tar.md.gz", gzip.compress(b"untar it", mtime=0))) == ["untar it"]


# --- what is no text file ---


def test_empty_files_are_counted(tmp_path):
    notes = Notes()
    contents = {"a.txt": "", "b.txt": " \n\n", "c.txt": "\ufeff", "d.jsonl": "\n", "e.csv": "", "f.csv": "text\n"}
    contents |= {"g.mbox": "", "h.eml": "", "i.txt.gz": gzip.compress(b"", mtime=0), "j.txt.gz": ""}
    for name, content in contents.items():
        assert texts(write(tmp_path / name, content), notes) == []
    assert dict(notes.counts) == {"files without text": len(contents)}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
@pytest.mark.parametrize("errors", ["strict", "replace", "skip"])
def test_binary_files_are_refused_and_the_zero_byte_is_named(tmp_path, name, errors):
    path = write(tmp_path / name, b"\n" * 2_000_000 + b"\0")
    assert "a zero byte at 2000000" in refusal(path, errors=errors)


def test_an_unknown_ending_needs_a_format(tmp_path):
    path = write(tmp_path / "letters", "some text")
    assert "--format" in refusal(path)
    assert texts(path, format="text") == ["some text"]
    assert texts(write(tmp_path / "a.json", '{"text": "x"}'), format="jsonl") == ["x"]


def odd_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(tmp_path / "socket.txt"))
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "folder.txt").mkdir()
    there = ["pipe.txt", "socket.txt", "link.txt", "loop.txt", "folder.txt"]
    return [*there, "missing.txt", "x" * 300 + ".txt", "a\0.txt"]


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_never_opened(tmp_path, monkeypatch):
    names = odd_files(tmp_path)
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("opened"))
    for name in names:
        for ending in (name, f"{name}.gz", name.replace(".txt", ".parquet")):
            assert "opened" not in refusal(tmp_path / ending)
    assert "is no plain file" in refusal(Path("/dev/zero"), format="text")
    assert "is no plain file" in refusal(Path("/dev/null"), format="parquet")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_what_is_no_regular_file_in_a_folder_or_pattern_is_named(tmp_path, number):
    name = odd_files(tmp_path)[number]
    for place in (tmp_path, f"{tmp_path}/{name[:4]}*", tmp_path / name):
        with pytest.raises(Error, match=name):
            [documents(path) for path in list_files(str(place)) if path.name == name]


# --- lists of files ---


def test_a_folder_gives_its_readable_files_in_order(tmp_path):
    read = ["a.txt", "b/c.md", "b/d.jsonl.gz", "b/e.CSV", "f.parquet", "g.zst/h.tsv.zst", "inbox/1.", "inbox/10."]
    read += ["mail/cur/1:2,S", "mail/new/2.host", ".Sent/cur/3:2,S"]
    other = [".hidden.txt", ".git/a.txt", "x.pdf", "x.tar.gz", "x.gz", "mail/tmp/4", "maildir.zip", "._a.txt"]
    for name in [*read, *other]:
        write(tmp_path / name, "X: y\n")
    found = list_files(str(tmp_path))
    assert [str(path.relative_to(tmp_path)) for path in found] == sorted(read, key=lambda name: Path(name).parts)


def test_messages_without_an_ending_are_mail_by_how_they_begin(tmp_path):
    write(tmp_path / "inbox/1", "From: a\n\nb")
    write(tmp_path / "inbox/2", "X-Key: a\n\nb")
    files = list_files(str(tmp_path))
    assert [text for file in files for text in texts(file)] == ["From: a\n\nb", "X-Key: a\n\nb"]


def test_links_are_followed_to_each_folder_once(tmp_path):
    write(tmp_path / "real/a.txt", "x")
    write(tmp_path / "data/b.txt", "y")
    (tmp_path / "data/one").symlink_to(tmp_path / "real")
    (tmp_path / "data/two").symlink_to(tmp_path / "real")
    (tmp_path / "data/self").symlink_to(tmp_path / "data")
    (tmp_path / "data/c.txt").symlink_to(tmp_path / "real/a.txt")
    found = [str(path.relative_to(tmp_path / "data")) for path in list_files(str(tmp_path / "data"))]
    assert found == ["b.txt", "c.txt", "one/a.txt"]


def test_a_pattern_gives_its_files_and_a_name_with_brackets_is_itself(tmp_path):
    for name in ("a1.txt", "a2.txt", "b.txt", "a[1].txt", "sub/a3.txt"):
        write(tmp_path / name, "x")
    (tmp_path / "a4").mkdir()
    assert [path.name for path in list_files(f"{tmp_path}/a?.txt")] == ["a1.txt", "a2.txt"]
    assert [path.name for path in list_files(f"{tmp_path}/**/a3.txt")] == ["a3.txt"]
    assert [path.name for path in list_files(f"{tmp_path}/a[1].txt")] == ["a[1].txt"]


@pytest.mark.parametrize("place", ["missing", "empty", "*.txt", "pictures", "x" * 5000, "a\0b", "a\0*"])
def test_nothing_to_read_is_said_in_one_line(tmp_path, place):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "pictures/a.png", b"\x89PNG")
    with pytest.raises(Error) as caught:
        list_files(f"{tmp_path}/{place}")
    assert caught.value.code == BAD_INPUT
    assert "\n" not in str(caught.value)


def test_odd_file_names_are_read(tmp_path):
    names = ["new\nline.txt", "-rf.txt", " .txt", "ü.txt", "x" * 251 + ".txt", os.fsdecode(b"\xff\xfe.txt")]
    for name in names:
        write(tmp_path / name, "text")
    files = list_files(str(tmp_path))
    assert sorted(path.name for path in files) == sorted(names)
    assert [text for file in files for text in texts(file)] == ["text"] * len(names)


# --- memory ---

PEAK = """
import re, sys
from pathlib import Path
from classiclm.data.readers import Notes, Reading, read_file

def peak():  # of this program alone: what getrusage tells includes the process that it was forked from
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before, n = peak(), 0
try:
    for document in read_file(Path(sys.argv[1]), Reading(documents=sys.argv[2]), "a", Notes()):
        n += len(document.text)
except Exception as e:
    assert type(e).__name__ == "Error", e
print((peak() - before) // 1024, n)
"""


def peak(path, kind="file"):
    """(MiB that reading a file takes at most, characters read), in a process of its own."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells the peak of one program")
    done = subprocess.run([sys.executable, "-c", PEAK, path, kind], capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


@pytest.mark.parametrize("kind", ["file", "block", "line"])
def test_memory_is_bounded_for_a_line_of_64_mb(tmp_path, kind):
    size, n = peak(write(tmp_path / "a.txt", b"x" * 64_000_000), kind)
    assert n == 64_000_000
    assert size < 100


@pytest.mark.parametrize(
    ("name", "limit", "is_read"),
    [("a.jsonl", 400, True), ("emoji.jsonl", 400, True), ("long.jsonl", 150, False), ("open.csv", 450, False)],
)
def test_memory_is_bounded_for_a_huge_record(tmp_path, name, limit, is_read):
    path = tmp_path / name
    fill = {"a.jsonl": "x" * 60_000_000, "emoji.jsonl": "\U0001f600" * 12_000_000, "long.jsonl": "x" * 100_000_000}
    record = '{"text": "' + fill.get(name, "") + '"}\n'
    write(path, record if name in fill else b'text\n"' + (b"x" * 99 + b"\n") * 1_000_000)
    size, n = peak(path)
    assert (n > 0) == is_read
    assert size < limit


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.txt.gz", "a.txt.zst", "a.mbox", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    generator = random.Random(1)
    rows = [generator.randbytes(1000).hex() for _ in range(2_000)]
    forms = {
        ".jsonl": "".join(json.dumps({"text": row}) + "\n" for row in rows),
        ".mbox": "".join(f"From a\nX: y\n\n{row}\n\n" for row in rows),
    }
    if name == "a.parquet":
        data = parquet_of({"text": rows * 25}, row_group_size=100_000, use_dictionary=False)
    else:
        text = forms.get(Path(name).suffix, "".join(f"{row}\n" for row in rows)) * 25
        data = packed(("text\n" * (name == "a.csv") + text).encode(), Path(name).suffix)
    size, n = peak(write(tmp_path / name, data))
    assert n > 95_000_000
    assert size < 90
