"""Files of mail as raw messages: one message in a file, or many in an mbox. The step `mail` takes a message apart.

Mail has codings of its own, so bytes that are not UTF-8 are no error here: they come as lone surrogates (PEP 383), from
which the bytes can be had back.
"""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from classiclm.data.opening import read_bytes

_LONGEST_LINE = 1 << 20  # bytes; a longer one is handed on in parts
_QUOTED = re.compile(rb">+From ")


def read_message(path: Path, limit: int) -> tuple[str, bool]:
    """The message that a file is, up to `limit` bytes, and whether there are more. Raises Error (exit 3)."""
    parts: list[bytes] = []
    size = 0
    for piece in read_bytes(path):
        parts.append(piece)
        size += len(piece)
        if size > limit:
            break
    return _text(b"".join(parts), limit)


def read_messages(path: Path, limit: int) -> Iterator[tuple[str, bool]]:
    """The messages of an mbox, each as from `read_message`, without white space only. Raises Error (exit 3).

    A message begins with a line "From ..." behind an empty one, which is part of neither message (RFC 4155); a line
    ">From" in it is "From".
    """
    message: list[bytes] = []
    size, after_blank = 0, True
    for line in itertools.chain(_lines(path), [b"\n", b"From "]):
        if after_blank and line.startswith(b"From "):
            if any(map(bytes.strip, message)):
                yield _text(b"".join(message).removesuffix(b"\n"), limit)
            message, size = [], 0
        elif size <= limit:
            message.append(line[1:] if _QUOTED.match(line) else line)
            size += len(line)
        after_blank = not line.strip()


def _text(data: bytes, limit: int) -> tuple[str, bool]:
    return data[:limit].removeprefix(b"\xef\xbb\xbf").decode(errors="surrogateescape"), len(data) > limit


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    for piece in read_bytes(path):
        *whole, rest = (rest + piece).removeprefix(b"\xef\xbb\xbf").split(b"\n")
        yield from (line + b"\n" for line in whole)
        if len(rest) > _LONGEST_LINE:
            yield rest
            rest = b""
    yield rest
