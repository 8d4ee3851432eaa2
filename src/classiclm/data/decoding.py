"""How files are read (`Reading`), what the policies did (`Notes`), and the way from bytes to sound text in pieces."""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal, NoReturn

from classiclm.errors import BAD_INPUT, Error

MAX_CHARS = 8 << 20  # a longer document is cut into several
_NEAR = MAX_CHARS // 8  # so far before the limit a line break is looked for
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_SURROGATES = re.compile("[\ud800-\udfff]")

Format = Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "mail"]


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text: str = "text"  # column with the text, of jsonl, csv, tsv and parquet
    group: str | None = None  # column whose equal neighbouring values make one document, joined by blank lines
    documents: Literal["file", "block", "line"] = "file"  # what a document is in a text file; blocks end at blank lines
    format: Format = "auto"  # what the files are; auto = as their endings say
    errors: Literal["strict", "replace", "skip"] = "strict"  # bytes that are no UTF-8; skip = leave the document out


@dataclass
class Notes:
    """What the policies of reading did, in words -> how often; for the report."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, what: str, n: int = 1) -> None:
        """Count something that happened n times."""
        if n:
            self.counts[what] += n


def decoded(chunks: Iterable[bytes], errors: str, path: Path, notes: Notes) -> Iterator[str]:
    """UTF-8 text in pieces, without a byte order mark and with line ends made "\\n"; the same however it was chunked.

    No chunk may be empty. With errors "skip", the bytes that are no UTF-8 come as lone surrogates (PEP 383), which
    `sound` finds. Raises Error (exit 3) at NUL bytes and, with errors "strict", at bytes that are no UTF-8.
    """
    mode = "surrogateescape" if errors == "skip" else errors
    rest, held, n_before, at_start = b"", "", 0, True
    for chunk in chain(chunks, [b""]):
        data, last = rest + chunk, not chunk
        refuse_binary(chunk, n_before + len(rest), path)
        try:
            text, n_used = codecs.utf_8_decode(data, mode, last)
        except UnicodeDecodeError as e:
            _refuse(path, f"is not UTF-8 at byte {n_before + e.start}")
        if mode == "replace":
            n_own = data[:n_used].count("\ufffd".encode())
            notes.add("characters that are not UTF-8 replaced", text.count("\ufffd") - n_own)
        rest, n_before = data[n_used:], n_before + n_used
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        text = held + text
        text, held = (text[:-1], "\r") if text.endswith("\r") and not last else (text, "")
        if text:
            yield unix_lines(text)


def refuse_binary(chunk: bytes, n_before: int, path: Path) -> None:
    """Raises Error (exit 3) if a NUL byte says that this is no text. n_before: bytes of the file before the chunk."""
    if b"\0" not in chunk:
        return
    if n_before == 0 and chunk.startswith(_UTF16):
        raise Error(path, "is UTF-16", "convert it to UTF-8", BAD_INPUT)
    why = f"is a binary file (a NUL at byte {n_before + chunk.index(0)})"
    raise Error(path, why, "name a text file", BAD_INPUT)


def unix_lines(text: str) -> str:
    """Line ends of Windows made those of Unix. A carriage return alone stays."""
    return text.replace("\r\n", "\n") if "\r" in text else text


def sound(text: str, errors: str, place: str, notes: Notes) -> str | None:
    """The text if it can be written as UTF-8; else, as `errors` says, with U+FFFD in place of what cannot, or None.

    Raises Error (exit 3) with errors "strict".
    """
    if text.isascii() or not _SURROGATES.search(text):
        return text
    if errors == "skip":
        notes.add("documents left out because they are not UTF-8")
        return None
    if errors == "strict":
        _refuse(place, "has text that is not UTF-8")
    text, n = _SURROGATES.subn("\ufffd", text)
    notes.add("characters that are not UTF-8 replaced", n)
    return text


def cut(text: str) -> tuple[str, str]:
    """The first piece of a text that is longer than MAX_CHARS, up to a line break near the limit, and the rest."""
    end = text.rfind("\n", MAX_CHARS - _NEAR, MAX_CHARS) + 1 or MAX_CHARS
    return text[:end], text[end:]


def _refuse(what: object, why: str) -> NoReturn:
    fix = "convert it to UTF-8, or choose errors=replace or errors=skip"
    raise Error(what, why, fix, BAD_INPUT)
