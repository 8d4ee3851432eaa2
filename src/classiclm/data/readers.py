"""Files -> documents: text, jsonl, csv, tsv, parquet and mail, each of them (but parquet) also as .gz or .zst.

Besides what opening.py says of odd bytes:

| what is met | what happens |
|---|---|
| a file without text | no document, counted |
| a document of more than 8 Mi characters | cut, at a line break if there is one near, counted |
| a record of more than 64 MiB | an error |
| a record without text (null, a number, an empty string) | left out, counted |
| a column that is not there | an error that lists those that are |
| a line that is no JSON object, a broken csv or parquet file | an error with the place |
"""

import csv
import glob
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from classiclm.data.documents import Document
from classiclm.data.opening import COMPRESSED, ESCAPED, check_file, is_archive, read_bytes, read_text, replaced
from classiclm.data.opening import Notes as Notes
from classiclm.errors import BAD_INPUT, Error
from classiclm.extras import need

MAX_CHARS = 8 << 20  # of a document
MAX_RECORD = 64 << 20  # characters of a line of jsonl, a field of csv, a message
CUT = "documents cut because they are too long"
NO_TEXT = "records without text"
_FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".mbox": "mbox",
    ".eml": "mail",
}
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)*\n")
_HEADER = re.compile(rb"(?:From |[A-Za-z][A-Za-z0-9-]*:[ \t\r\n])")  # how a message begins
_BATCH = 256  # rows of parquet at once
Record = tuple[str, Any, Any]  # place, text, group


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text: str = "text"  # column with the text (jsonl, csv, tsv, parquet)
    group: str | None = None  # column whose equal neighbouring values make one document, joined by blank lines
    documents: Literal["file", "block", "line"] = "file"  # what a document of a text file is
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "mail"] = "auto"  # auto: by the file's ending
    errors: Literal["strict", "replace", "skip"] = "strict"  # bytes that are not UTF-8


def list_files(path: str) -> list[Path]:
    """The readable files that a path stands for, in order: itself, those below a folder, or those of a pattern.

    Below a folder, files with endings that no reader has are passed over; where none has one, files that begin like
    mail are taken. Raises Error (exit 3) if there is none.
    """
    if glob.has_magic(path) and not os.path.lexists(path):
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if not os.path.isdir(name))
        if not found:
            raise Error(path, "matches no file", "correct the pattern; in a shell, put it in quotes", BAD_INPUT)
        return found
    if not os.path.lexists(path):
        raise Error(path, "does not exist", "name a file, a folder or a pattern of files", BAD_INPUT)
    if not os.path.isdir(path):
        check_file(Path(path))
        return [Path(path)]
    inside = sorted(file for file in Path(path).rglob("*") if file.is_file() or not file.exists())  # or a dead link
    found = [file for file in inside if _ending(file) in _FORMATS or _is_maildirs(file)]
    found = found or [file for file in inside if not file.name.startswith(".") and not is_archive(file)]
    if not found or not all(_format(file) for file in found[:20]):
        endings = ", ".join(_FORMATS)
        fix = f"name a folder with text files, or mail ({endings}; each also .gz or .zst)"
        raise Error(path, "has no .txt, .md or other file that can be read", fix, BAD_INPUT)
    return found


def read_file(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    """The documents of a file, streamed. `name` stands for it in theirs. Raises Error (exit 3); see the tables."""
    check_file(path)
    format = _format(path) if how.format in ("auto", "mail") else how.format
    if format is None or (how.format == "mail" and format == "text"):
        format = "mail" if how.format == "mail" else None
    if format is None:
        fix = f"rename it to end in one of {', '.join(_FORMATS)}, or pass --format"
        raise Error(path, "has an ending that no reader knows", fix, BAD_INPUT)
    n = 0
    for document in _with_errors(_READERS[format](path, how, name, notes), path, how.errors, notes, format):
        for part in _parts(document, notes) if format != "text" else [document]:
            n += 1
            yield part
    if not n:
        notes.add("files without text")


def _ending(path: Path) -> str:
    """The ending that says what a file is, without that of its compression."""
    plain = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()


def _is_maildirs(path: Path) -> bool:
    return path.parent.name in ("cur", "new")


def _format(path: Path) -> str | None:
    """What a file is, by its ending or its place; without either, whether it begins like a message."""
    format = _FORMATS.get(_ending(path))
    if format is None and (_is_maildirs(path) or _HEADER.match(next(read_bytes(path), b""))):
        return "mail"
    return format


def _with_errors(
    documents: Iterable[Document], path: Path, errors: str, notes: Notes, format: str
) -> Iterator[Document]:
    """Documents with half characters or bytes that were no text are dealt with; but raw mail has codings of its own."""
    for document in documents:
        if format in ("mail", "mbox") or document.text.isascii() or not ESCAPED.search(document.text):
            yield document
        elif errors == "skip":
            notes.add("documents left out for bytes that are not UTF-8")
        elif errors == "replace":
            yield Document(replaced(document.text, notes), document.name)
        else:
            fix = "pass --errors replace or skip"
            raise Error(document.name, "has half a character (a lone surrogate) in its text", fix, BAD_INPUT)


def _parts(document: Document, notes: Notes) -> Iterator[Document]:
    """A document, or the parts of one that is too long."""
    if len(document.text) <= MAX_CHARS:
        yield document
        return
    notes.add(CUT)
    text, n = document.text, 1
    while text:
        place = _place_to_cut(text)
        yield Document(text[:place], f"{document.name}#{n}")
        text, n = text[place:], n + 1


def _place_to_cut(text: str) -> int:
    """Behind the last line break of what a document may have, if it is in the second half of that."""
    if len(text) <= MAX_CHARS:
        return len(text)
    place = text.rfind("\n", MAX_CHARS // 2, MAX_CHARS) + 1
    return place or MAX_CHARS


def _read_text(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    pieces = read_text(path, how.errors, notes)
    if how.documents == "file":
        return _whole(pieces, name, notes)
    return _separated(pieces, _BLANK_LINES if how.documents == "block" else re.compile("\n"), name, notes)


def _whole(pieces: Iterable[str], name: str, notes: Notes) -> Iterator[Document]:
    """A file as one document, or as many as its length needs; their texts in a row are that of the file."""
    text, n = "", 0
    for piece in _gathered(pieces):
        text += piece
        while len(text) > MAX_CHARS:
            if not n:
                notes.add(CUT)
            place, n = _place_to_cut(text), n + 1
            yield Document(text[:place], f"{name}#{n}")
            text = text[place:]
    if text and not text.isspace():
        yield Document(text, f"{name}#{n + 1}" if n else name)


def _gathered(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces joined to at least MAX_CHARS / 4, so that a long text is not copied at each of them."""
    waiting: list[str] = []
    for piece in pieces:
        waiting.append(piece)
        if sum(map(len, waiting)) >= MAX_CHARS // 4:
            yield "".join(waiting)
            waiting = []
    yield "".join(waiting)


def _separated(pieces: Iterable[str], border: re.Pattern[str], name: str, notes: Notes) -> Iterator[Document]:
    """The blocks or lines of a file, numbered from 1; those of white space only are none."""
    number, rest = 0, ""
    for piece in itertools.chain(pieces, [None]):
        parts = border.split(rest + (piece or ""))
        rest = "" if piece is None else parts.pop()
        if len(rest) > MAX_CHARS:  # no border in sight
            parts, rest = [*parts, rest], ""
        for part in parts:
            number += 1
            if part and not part.isspace():
                yield from _parts(Document(part.strip("\n"), f"{name}:{number}"), notes)


def _lines(path: Path, how: Reading, notes: Notes) -> Iterator[str]:
    """The lines of a file with their ends. Raises Error (exit 3) for one of more than MAX_RECORD characters."""
    waiting: list[str] = []
    size = 0
    for piece in read_text(path, how.errors, notes):
        *whole, last = piece.split("\n")
        for line in whole:
            yield "".join([*waiting, line, "\n"])
            waiting, size = [], 0
        waiting.append(last)
        size += len(last)
        if size > MAX_RECORD:
            why = f"has a line of more than {MAX_RECORD >> 20} Mi characters"
            raise Error(path, why, "write one document on each line", BAD_INPUT)
    if size:
        yield "".join(waiting)


def _read_jsonl(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_json_records(path, how, name, notes), how, notes)


def _json_records(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Record]:
    first = True
    for i, line in enumerate(_lines(path, how, notes), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            why = f"is no JSON ({getattr(e, 'msg', 'nested too deeply')})"
            raise Error(f"{path}:{i}", why, "correct the line", BAD_INPUT) from e
        if not isinstance(record, dict):
            raise Error(f"{path}:{i}", "is no JSON object", 'write {"text": ...} on each line', BAD_INPUT)
        if first:
            _check_columns(path, how, record)
            first = False
        yield f"{name}:{i}", record.get(how.text), record.get(how.group) if how.group else None


def _check_columns(path: Path, how: Reading, columns: Iterable[object]) -> None:
    known = list(map(str, columns))
    for column in (how.text, how.group):
        if column is not None and column not in known:
            flag = "--text" if column == how.text else "--group"
            there = ", ".join(known) or "none"
            raise Error(path, f"has no column {column!r}", f"name one of its columns with {flag}: {there}", BAD_INPUT)


def _read_csv(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_csv_records(path, how, name, notes, ","), how, notes)


def _read_tsv(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_csv_records(path, how, name, notes, "\t"), how, notes)


def _csv_records(path: Path, how: Reading, name: str, notes: Notes, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_RECORD)  # of the whole process; the default is 128 KiB
    rows = csv.reader(_lines(path, how, notes), delimiter=delimiter)
    try:
        header = next(rows, [])
        if header:
            _check_columns(path, how, header)
        for row in rows:
            record = dict(zip(header, row, strict=False))
            yield f"{name}:{rows.line_num}", record.get(how.text), record.get(how.group) if how.group else None
    except csv.Error as e:
        raise Error(f"{path}:{rows.line_num}", f"is no csv ({e})", "correct the line", BAD_INPUT) from e


def _read_parquet(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_parquet_records(path, how, name), how, notes)


def _parquet_records(path: Path, how: Reading, name: str) -> Iterator[Record]:
    pyarrow = need("pyarrow", "data")
    parquet = need("pyarrow.parquet", "data")
    row = 0
    try:
        with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            _check_columns(path, how, file.schema_arrow.names)
            columns = [column for column in (how.text, how.group) if column is not None]
            for batch in file.iter_batches(_BATCH, columns=columns):
                table = batch.to_pydict()
                for text, group in zip(table[how.text], table[how.group or how.text], strict=True):
                    row += 1
                    yield f"{name}:{row}", text, group if how.group else None
    except (pyarrow.ArrowException, OSError) as e:
        why = f"is no readable parquet file ({' '.join(str(e).split())[:200]})"
        raise Error(path, why, "replace it by a whole file", BAD_INPUT) from e


def _documents(records: Iterable[Record], how: Reading, notes: Notes) -> Iterator[Document]:
    """Records as documents; neighbours of one group are joined by blank lines, up to MAX_CHARS characters."""
    if how.group is None:
        return (Document(text, place) for place, text, _ in _with_text(records, notes))
    return _grouped(_with_text(records, notes))


def _with_text(records: Iterable[Record], notes: Notes) -> Iterator[Record]:
    for record in records:
        if isinstance(record[1], str) and record[1]:
            yield record
        else:
            notes.add(NO_TEXT)


def _grouped(records: Iterable[Record]) -> Iterator[Document]:
    for _, members in itertools.groupby(records, key=lambda record: record[2]):
        texts: list[str] = []
        place, size = "", 0
        for place_here, text, _ in members:
            if texts and size + len(text) > MAX_CHARS:
                yield Document("\n\n".join(texts), place)
                texts, size = [], 0
            place = place if texts else place_here
            texts.append(text)
            size += len(text) + 2
        yield Document("\n\n".join(texts), place)


def _read_mail(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    """One message, raw: the step `mail` takes it apart."""
    data = b""
    for piece in read_bytes(path):
        data += piece
        if len(data) > MAX_RECORD:
            notes.add("messages left out because they are too long")
            return
    if data.strip():
        yield Document(data.decode(errors="surrogateescape"), name)


def _read_mbox(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    """The messages of a mailbox: each begins with a line "From ..." behind an empty one; ">From" in it is "From"."""
    message: list[bytes] = []
    number, size, after_blank = 0, 0, True
    for line in itertools.chain(_byte_lines(path), [b"From "]):
        if after_blank and line.startswith(b"From "):
            if size > MAX_RECORD:
                notes.add("messages left out because they are too long")
            elif any(map(bytes.strip, message)):
                number += 1
                yield Document(b"".join(message).decode(errors="surrogateescape"), f"{name}:{number}")
            message, size = [], 0
        elif size <= MAX_RECORD:
            message.append(line[1:] if re.match(rb">+From ", line) else line)
            size += len(line)
        after_blank = not line.strip()


def _byte_lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for piece in read_bytes(path):
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line + b"\n" for line in whole)
    if rest:
        yield rest
    yield b"\n"  # so that what follows stands behind an empty line


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "mail": _read_mail,
    "mbox": _read_mbox,
}
