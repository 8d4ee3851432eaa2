"""Files -> documents: text, jsonl, csv, tsv, parquet and mail, each of them also as .gz or .zst.

Besides what opening.py says of odd bytes:

| what is met | what happens |
|---|---|
| a folder | its files with known endings and its mail, sorted; hidden files and folders are passed over |
| a pipe, socket, device or dead link in a folder, under a known ending | an error |
| a file without text | no document, counted |
| a document of more than 8 Mi characters | cut, at a line break if there is one near, counted |
| a message of more than 8 MiB | its beginning is kept (the rest could not be parsed), counted |
| bytes that are not UTF-8, or zero, in a message | kept: the step `mail` decodes it |
| a record of more than 64 MiB | an error |
| a record without text (null, a number, an empty string) | left out, counted |
| a column that is not there | an error that lists those that are |
| a line that is no JSON object, a broken csv or parquet file, half a character in a record | an error with the place |
"""

import csv
import glob
import itertools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from classiclm.data.documents import Document
from classiclm.data.mailboxes import read_message, read_messages
from classiclm.data.opening import Notes as Notes
from classiclm.data.opening import (
    check_file,
    ending_of,
    is_archive,
    is_sound,
    read_bytes,
    read_text,
    replaced,
)
from classiclm.data.parquet import read_rows
from classiclm.errors import BAD_INPUT, Error

MAX_CHARS = 8 << 20  # of a document
MAX_RECORD = 64 << 20  # bytes of a line in memory; characters of a field of csv
CUT = "documents cut because they are too long"
NO_TEXT = "records without text"
FORMATS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".mbox": "mbox",
    ".eml": "mail",
}
_LISTED = 50  # columns that an error names
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)*\n")
_LEADING_LINES = re.compile(r"(?:[ \t]*\n)*")
_NUMBERED = re.compile(r"\d+\.")  # a message in the folders that Enron's mail was published as: inbox/1.
_HEADER = re.compile(rb"(?:From |[A-Za-z][A-Za-z0-9-]*:[ \t\r\n])")  # how a message begins
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
    inside = sorted(file for file in _walk(path) if not file.is_dir())
    found = [file for file in inside if ending_of(file) in FORMATS or _is_mail_by_name(file)]
    found = found or [file for file in inside if file.is_file() and not is_archive(file)]
    if not found or not all(_format(file) for file in found[:20]):
        endings = ", ".join(FORMATS)
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
        fix = f"rename it to end in one of {', '.join(FORMATS)}, or pass --format"
        raise Error(path, "has an ending that no reader knows", fix, BAD_INPUT)
    n = 0
    for document in _with_errors(_READERS[format](path, how, name, notes), path, how.errors, notes, format):
        for part in _parts(document, notes) if format != "text" else [document]:
            n += 1
            yield part
    if not n:
        notes.add("files without text")


def _walk(path: str) -> Iterator[Path]:
    """What is below a folder and not hidden, but for hidden maildirs. Links are followed, to each folder once.

    Raises Error (exit 3) for a folder that cannot be read.
    """
    seen = set()

    def fail(e: OSError) -> None:
        raise Error(e.filename, e.strerror or "cannot be read", "name a folder that can be read", BAD_INPUT) from e

    for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
        here, place = Path(folder), os.path.realpath(folder)
        visible = [name for name in folders if not name.startswith(".") or (here / name / "cur").is_dir()]
        folders[:] = [] if place in seen else sorted(visible)
        yield from (here / name for name in names if not name.startswith(".") and place not in seen)
        seen.add(place)


def _is_mail_by_name(path: Path) -> bool:
    return path.parent.name in ("cur", "new") or _NUMBERED.fullmatch(path.name) is not None


def _format(path: Path) -> str | None:
    """What a file is, by its ending or its name; without either, whether it begins like a message."""
    format = FORMATS.get(ending_of(path))
    if format is None and (_is_mail_by_name(path) or _HEADER.match(next(read_bytes(path), b""))):
        return "mail"
    return format


def _with_errors(
    documents: Iterable[Document], path: Path, errors: str, notes: Notes, format: str
) -> Iterator[Document]:
    """Documents with half characters or bytes that were no text are dealt with; but raw mail has codings of its own."""
    for document in documents:
        if format in ("mail", "mbox") or is_sound(document.text):
            yield document
        elif errors == "skip":
            notes.add("documents left out for bytes that are not UTF-8")
        elif errors == "replace":
            yield Document(replaced(document.text, notes), document.name)
        else:
            fix = "pass --errors replace or skip"
            raise Error(document.name, "has half a character (a lone surrogate) in its text", fix, BAD_INPUT)


def _parts(document: Document, notes: Notes, n: int = 0) -> Iterator[Document]:
    """A document, or the parts of one that is too long. n: its parts that were there before this text."""
    text, start = document.text, 0
    if len(text) > MAX_CHARS and not n:
        notes.add(CUT)
    while len(text) - start > MAX_CHARS:
        end, n = _place_to_cut(text, start), n + 1
        yield Document(text[start:end], f"{document.name}#{n}")
        start = end
    text = text[start:]
    if text and not text.isspace():
        yield Document(text, f"{document.name}#{n + 1}" if n else document.name)


def _place_to_cut(text: str, start: int = 0) -> int:
    """Behind the last line break of what a document may have, if it is in the second half of that."""
    limit = start + MAX_CHARS
    return text.rfind("\n", start + MAX_CHARS // 2, limit) + 1 or limit


def _read_text(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    """A file's documents; those that are blocks are numbered from 1, and lines by their place in the file."""
    number, n, rest = 1, 0, ""  # n: parts cut off from the document that rest goes on with
    for piece in itertools.chain(_gathered(read_text(path, how.errors, notes)), [None]):
        texts = _split(rest + (piece or ""), how.documents)
        rest = "" if piece is None else texts.pop()
        for text in texts:
            text = text.rstrip() if how.documents == "block" else text
            document = Document(text, name if how.documents == "file" else f"{name}:{number}")
            yield from _parts(document, notes, n)
            number, n = number + (how.documents == "line" or bool(text)), 0
        while len(rest) > MAX_CHARS:
            notes.add(CUT, 0 if n else 1)
            place, n = _place_to_cut(rest), n + 1
            yield Document(rest[:place], f"{name}#{n}" if how.documents == "file" else f"{name}:{number}#{n}")
            rest = rest[place:]


def _split(text: str, documents: str) -> list[str]:
    """The documents in a text; the last may be unfinished. Of blocks, blank lines in front are left out."""
    if documents == "file":
        return [text]
    if documents == "line":
        return text.split("\n")
    leading = _LEADING_LINES.match(text)
    return _BLANK_LINES.split(text[leading.end() if leading else 0 :])


def _gathered(pieces: Iterable[str]) -> Iterator[str]:
    """Pieces joined to at least MAX_CHARS / 4, so that a long text is not copied at each of them."""
    waiting: list[str] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= MAX_CHARS // 4:
            yield "".join(waiting)
            waiting, size = [], 0
    yield "".join(waiting)


def _lines(path: Path, how: Reading, notes: Notes) -> Iterator[str]:
    """The lines of a file with their ends. Raises Error (exit 3) for one that takes more than MAX_RECORD bytes."""
    waiting: list[str] = []
    size = 0
    for piece in read_text(path, how.errors, notes):
        *whole, last = piece.split("\n")
        for line in whole:
            line = "".join([*waiting, line, "\n"])
            waiting, size = [], 0  # before the line is handed on, for it may be long
            yield line
        waiting.append(last)
        size += sys.getsizeof(last) if last else 0  # up to four bytes a character
        if size > MAX_RECORD:
            why = f"has a line of more than {MAX_RECORD >> 20} MiB"
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
        except (ValueError, RecursionError) as e:  # ValueError itself: an integer of more than 4,300 digits
            reason = "nested too deeply" if isinstance(e, RecursionError) else getattr(e, "msg", "a number is too long")
            raise Error(f"{path}:{i}", f"is no JSON ({reason})", "correct the line", BAD_INPUT) from e
        if not isinstance(record, dict):
            raise Error(f"{path}:{i}", "is no JSON object", 'write {"text": ...} on each line', BAD_INPUT)
        if first:
            _check_columns(path, how, record)
            first = False
        yield f"{name}:{i}", record.get(how.text), record.get(how.group) if how.group else None


def _check_columns(path: Path, how: Reading, columns: Iterable[object]) -> None:
    known = [str(column) for column in columns]
    for column in (how.text, how.group):
        if column is not None and column not in known:
            flag = "--text" if column == how.text else "--group"
            there = ", ".join(known[:_LISTED]) + (" ..." if len(known) > _LISTED else "") or "none"
            raise Error(path, f"has no column {column!r}", f"name one of its columns with {flag}: {there}", BAD_INPUT)


def _read_csv(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_csv_records(path, how, name, notes, ","), how, notes)


def _read_tsv(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_csv_records(path, how, name, notes, "\t"), how, notes)


def _csv_records(path: Path, how: Reading, name: str, notes: Notes, delimiter: str) -> Iterator[Record]:
    header: list[str] = []
    for line, row in _csv_rows(path, how, notes, delimiter):
        if not header:
            header = row
            _check_columns(path, how, header)
            continue
        _check_width(path, line, row, header)
        record = dict(zip(header, row, strict=True))
        yield f"{name}:{line}", record[how.text], record[how.group] if how.group else None


def _csv_rows(path: Path, how: Reading, notes: Notes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the line that it begins in. Raises Error (exit 3)."""
    csv.field_size_limit(MAX_RECORD)  # of the whole process; the default is 128 KiB
    rows = csv.reader(_lines(path, how, notes), delimiter=delimiter, strict=True)
    line = 1
    try:
        for row in rows:
            if row:
                yield line, row
            line = rows.line_num + 1
    except csv.Error as e:
        fix = "close its quotes, and write each quote inside a field twice"
        raise Error(f"{path}:{line}", f"is no csv ({e})", fix, BAD_INPUT) from e


def _check_width(path: Path, line: int, row: list[str], header: list[str]) -> None:
    if len(row) != len(header):
        why = f"has {len(row)} fields, and the header has {len(header)}"
        raise Error(f"{path}:{line}", why, "put fields with separators or line breaks in quotes", BAD_INPUT)


def _read_parquet(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _documents(_parquet_records(path, how, name), how, notes)


def _parquet_records(path: Path, how: Reading, name: str) -> Iterator[Record]:
    columns = [how.text] if how.group is None else [how.text, how.group]
    rows = read_rows(path, columns, lambda there: _check_columns(path, how, there))
    for i, row in enumerate(rows, start=1):
        yield f"{name}:{i}", row[0], row[1] if how.group else None


def _documents(records: Iterable[Record], how: Reading, notes: Notes) -> Iterator[Document]:
    """Records as documents; neighbours of one group are joined by blank lines, up to MAX_CHARS characters."""
    if how.group is None:
        return (Document(text, place) for place, text, _ in _with_text(records, notes))
    return _grouped(_with_text(records, notes))


def _with_text(records: Iterable[Record], notes: Notes) -> Iterator[Record]:
    for record in records:
        place, text, group = record
        if isinstance(text, str) and text and not text.isspace():
            yield place, text.replace("\r\n", "\n"), group
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
    return _messages([read_message(path, MAX_CHARS)], [name], notes)


def _read_mbox(path: Path, how: Reading, name: str, notes: Notes) -> Iterator[Document]:
    return _messages(read_messages(path, MAX_CHARS), (f"{name}:{n}" for n in itertools.count(1)), notes)


def _messages(messages: Iterable[tuple[str, bool]], names: Iterable[str], notes: Notes) -> Iterator[Document]:
    for (text, is_longer), name in zip(messages, names, strict=False):
        if is_longer:
            notes.add("messages of which only the beginning was kept, because they are too long")
        if text and not text.isspace():
            yield Document(text, name)


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "mail": _read_mail,
    "mbox": _read_mbox,
}
