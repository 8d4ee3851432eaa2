"""Files of unknown origin as streams of text: plain, gzip or zstd, in pieces, so that memory does not grow with a file.

| what is met | what happens |
|---|---|
| a pipe, socket or device; a link that leads nowhere | an error; it is never opened |
| a truncated or damaged .gz or .zst | an error that names it |
| more than 200 bytes out of each byte in, once 64 MiB came out (a bomb) | an error |
| an archive (.zip, .tar, .7z, ...) or compressed twice | an error: unpack it first |
| a zero byte: binary | an error |
| a byte order mark | dropped |
| line ends \\r\\n and \\r | read as \\n |
| bytes that are not UTF-8 | strict: an error with the place; replace: U+FFFD; skip: the document goes, counted |
"""

import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from io import IncrementalNewlineDecoder
from pathlib import Path
from typing import Any

from classiclm.errors import BAD_INPUT, Error
from classiclm.extras import need

_PIECE = 1 << 20  # bytes that come out of a file at once
_ZSTD_PIECE = 1 << 10  # bytes that go in, for 32 MiB at most: a block of four bytes may stand for 128 KiB
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 200
_ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4")
COMPRESSED = (".gz", ".zst")
ESCAPED = re.compile("[\ud800-\udfff]")  # what the decoder makes of a byte that is not UTF-8, or half a character


class Notes:
    """What the readers' policies did: how often each thing was met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, what: str, n: int = 1) -> None:
        """Count n cases."""
        self.counts[what] += n


def check_file(path: Path) -> None:
    """Raises Error (exit 3) for what is not a plain file that can be read as text, without opening it."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:
        link = os.path.islink(path)
        why = "is a link that leads nowhere" if link else getattr(e, "strerror", None) or "cannot be read"
        raise Error(path, why, "name a file that exists", BAD_INPUT) from e
    if not stat.S_ISREG(mode):
        raise Error(path, "is no plain file", "name a file, not a pipe, socket or device", BAD_INPUT)
    if is_archive(path):
        raise Error(path, "is an archive, or compressed twice", "unpack it and name what was in it", BAD_INPUT)


def is_archive(path: Path) -> bool:
    """Whether the name is that of a file with files inside, or of one compressed twice."""
    if path.suffix.lower() in COMPRESSED:
        return ending_of(path) in (*_ARCHIVES, *COMPRESSED)
    return path.suffix.lower() in _ARCHIVES


def ending_of(path: Path) -> str:
    """The ending that says what a file is, without that of its compression: ".txt" for A.TXT.gz."""
    plain = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return plain.suffix.lower()


def read_bytes(path: Path) -> Iterator[bytes]:
    """The content of a file, unpacked, piece by piece. Raises Error (exit 3)."""
    check_file(path)
    ending = path.suffix.lower()
    try:
        if ending == ".gz":
            yield from _unpacked(path, _PIECE, lambda: zlib.decompressobj(wbits=31), _inflate)
        elif ending == ".zst":
            new = need("zstandard", "data").ZstdDecompressor().decompressobj
            yield from _unpacked(path, _ZSTD_PIECE, new, lambda unpacker, data: map(unpacker.decompress, [data]))
        else:
            yield from _raw(path, _PIECE)
    except OSError as e:
        raise Error(path, e.strerror or "cannot be read", "name a file that can be read", BAD_INPUT) from e


def _raw(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def _inflate(unpacker: Any, data: bytes) -> Iterator[bytes]:
    """zlib's output for some input, no more than a piece at a time."""
    while data:
        yield unpacker.decompress(data, _PIECE)
        data = unpacker.unconsumed_tail


def _unpacked(
    path: Path, size: int, new: Callable[[], Any], unpack: Callable[[Any, bytes], Iterator[bytes]]
) -> Iterator[bytes]:
    """The members or frames of a compressed file in a row. Raises Error (exit 3) if it is cut or a bomb."""
    n_in = n_out = 0
    unpacker, fresh = new(), True  # fresh: nothing has gone into this one
    for data in _raw(path, size):
        n_in += len(data)
        while data and not (fresh and n_out and not data.strip(b"\0")):  # nor padding behind the end, as on tapes
            for piece in _named(unpack(unpacker, data), path):
                n_out += len(piece)
                _check_ratio(path, n_in, n_out)
                yield piece
            fresh, data = unpacker.eof, unpacker.unused_data
            unpacker = new() if fresh else unpacker
    if not fresh:
        raise Error(path, "is damaged (it ends too early)", "replace it by a whole file", BAD_INPUT)


def _named(pieces: Iterator[bytes], path: Path) -> Iterator[bytes]:
    try:
        yield from pieces
    except Exception as e:  # zlib.error or ZstdError, of a package that may not be there
        raise Error(path, f"is damaged ({e})", "replace it by a whole file", BAD_INPUT) from e


def _check_ratio(path: Path, n_in: int, n_out: int) -> None:
    if n_out > _BOMB_BYTES and n_out > _BOMB_RATIO * n_in:
        why = f"unpacks to more than {_BOMB_RATIO} times its size"
        raise Error(path, why, "unpack it yourself if its content is wanted", BAD_INPUT)


def read_text(path: Path, errors: str, notes: Notes) -> Iterator[str]:
    """The text of a file, piece by piece; with errors = "skip", bytes that are not UTF-8 stay in it as ESCAPED.

    Raises Error (exit 3) for what the table above calls an error.
    """
    lines = IncrementalNewlineDecoder(None, translate=True)
    at_start = True
    for piece in filter(None, _decoded(path, errors, notes)):
        yield lines.decode(piece.removeprefix("\ufeff") if at_start else piece)
        at_start = False
    yield lines.decode("", final=True)


def _decoded(path: Path, errors: str, notes: Notes) -> Iterator[str]:
    rest, place = b"", 0
    for piece in read_bytes(path):
        data = rest + piece
        cut = _whole_characters(data)
        yield _checked(path, data[:cut], place, errors, notes)
        place, rest = place + cut, data[cut:]
    yield _checked(path, rest, place, errors, notes)


def _whole_characters(data: bytes) -> int:
    """How many bytes there are in front of a character that the end may have cut."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:  # begins a character of two to four bytes
            return len(data) - back
        if byte < 0x80:
            break
    return len(data)


def _checked(path: Path, data: bytes, place: int, errors: str, notes: Notes) -> str:
    if b"\0" in data:
        at = place + data.index(b"\0")
        raise Error(path, f"is a binary file (a zero byte at {at})", "name a text file", BAD_INPUT)
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        if errors == "strict":
            fix = "convert it to UTF-8, or pass --errors replace or skip"
            raise Error(path, f"is not UTF-8 at byte {place + e.start}", fix, BAD_INPUT) from e
        text = data.decode(errors="surrogateescape")
        return text if errors == "skip" else replaced(text, notes)


def is_sound(text: str) -> bool:
    """Whether a text can be written as UTF-8: it has no ESCAPED in it."""
    if text.isascii():
        return True
    try:
        text.encode()  # three times as fast as to search
    except UnicodeEncodeError:
        return False
    return True


def replaced(text: str, notes: Notes) -> str:
    """The text with U+FFFD for every byte that was not UTF-8, counted."""
    text, n = ESCAPED.subn("\ufffd", text)
    if n:
        notes.add("bytes that were not UTF-8, replaced", n)
    return text
