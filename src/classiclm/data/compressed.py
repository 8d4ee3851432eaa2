"""The bytes of a file in pieces, whether it is plain, gzip (.gz) or zstandard (.zst, extra `data`).

Nothing is believed that a file says about itself: only regular files are opened, bytes are counted as they come out,
and a file that unfolds like a bomb, or holds another archive, is refused.
"""

import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from classiclm.errors import BAD_INPUT, Error
from classiclm.extras import need

CHUNK = 1 << 20  # bytes
MAX_RATIO = 200  # bytes out of a compressed byte; text gives 3 to 10, gzip's limit is 1032
SURE_BYTES = 64 << 20  # so many may come out of any file before its ratio counts
_STEP = 1 << 10  # bytes put in at once: of zstandard at most 32 MiB can come out of so many (4 make a block of 128 KiB)
_COMPRESSED = (".gz", ".zst")
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z", ".rar", ".bz2", ".xz")
_MAGIC = {
    b"\x1f\x8b\x08": "gzip",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf\x27\x1c": "7z",
    b"\xfd7zXZ\x00": "xz",
    b"Rar!\x1a\x07": "rar",
}
_KINDS = (  # what is not opened, since that could wait forever or never end
    (stat.S_ISDIR, "is a folder"),
    (stat.S_ISFIFO, "is a named pipe"),
    (stat.S_ISSOCK, "is a socket"),
)


def plain_suffix(path: Path) -> str:
    """The ending behind which .gz or .zst is left out, in small letters: ".txt" for a.txt and A.TXT.gz."""
    return _plain(path).suffix


def check_regular(path: Path) -> None:
    """Raises Error (exit 3) unless the path, links followed, is a file that can be opened and ends. Opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as e:  # ValueError: a NUL character in the name
        why = (getattr(e, "strerror", None) or str(e)).lower()
        why = "is a link to what does not exist" if isinstance(e, FileNotFoundError) and path.is_symlink() else why
        raise Error(path, why, "name a file that exists", BAD_INPUT) from e
    if not stat.S_ISREG(mode):
        why = next((words for test, words in _KINDS if test(mode)), "is a device")
        raise Error(path, why, "name a regular file", BAD_INPUT)


def read_chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in pieces of about CHUNK; none is empty.

    Raises Error: exit 3 for what is no regular file, cannot be read, is damaged or cut short, is an archive, or unfolds
    to more than MAX_RATIO times its size; exit 4 if zstandard is not installed.
    """
    _refuse_archive_name(path)
    check_regular(path)
    n_seen = 0
    try:
        with path.open("rb") as file:
            for chunk in _unpacked(file, path):
                if not n_seen:
                    _refuse_archive(chunk, path)
                n_seen += len(chunk)
                yield chunk
    except OSError as e:
        raise Error(path, e.strerror or str(e), "name a file that can be read", BAD_INPUT) from e


def _plain(path: Path) -> Path:
    name = Path(path.name.lower())
    return name.with_suffix("") if name.suffix in _COMPRESSED else name


def _refuse_archive_name(path: Path) -> None:
    if plain_suffix(path) in (*_COMPRESSED, *_ARCHIVES):
        raise Error(path, "is an archive", "unpack it, and name the files in it", BAD_INPUT)


def _refuse_archive(head: bytes, path: Path) -> None:
    """Archives under another name; a tar has its mark at byte 257."""
    kind = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)
    if kind is None and head[257:262] == b"ustar" and b"\0" in head[:257]:
        kind = "tar"
    if kind is not None:
        where = "holds" if path.suffix.lower() in _COMPRESSED else "is"
        raise Error(path, f"{where} a {kind} archive", "unpack it, and name the files in it", BAD_INPUT)


def _unpacked(file: BinaryIO, path: Path) -> Iterator[bytes]:
    match path.suffix.lower():
        case ".gz":
            return _inflated(file, path, lambda: zlib.decompressobj(wbits=31), zlib.error)
        case ".zst":
            zstandard = need("zstandard", "data")
            return _inflated(file, path, zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError)
        case _:
            return iter(lambda: file.read(CHUNK), b"")


def _inflated(
    file: BinaryIO, path: Path, new: Callable[[], Any], failure: type[Exception]
) -> Iterator[bytes]:
    """What comes out of a compressed file of one or more members, in pieces of CHUNK and a little more."""
    parts: list[bytes] = []
    size = 0
    try:
        for part in _members(file, path, new):
            parts.append(part)
            size += len(part)
            if size >= CHUNK:
                yield b"".join(parts)
                parts, size = [], 0
    except failure as e:
        raise Error(path, f"is damaged ({e})", "replace it by a whole file", BAD_INPUT) from e
    if size:
        yield b"".join(parts)


def _members(file: BinaryIO, path: Path, new: Callable[[], Any]) -> Iterator[bytes]:
    """The members of a compressed file, unpacked, in pieces; zeros behind a member are padding."""
    n_in = n_out = 0
    member: Any = None
    for piece in _steps(file):
        n_in += len(piece)
        rest = piece
        while rest := rest if member else rest.lstrip(b"\0"):
            member = member or new()
            part = member.decompress(rest)
            n_out += len(part)
            if n_out > max(SURE_BYTES, MAX_RATIO * n_in):
                why = f"unfolds to more than {MAX_RATIO} times its size, like a bomb"
                raise Error(path, why, "unpack it yourself if you trust it", BAD_INPUT)
            yield part
            rest, member = (member.unused_data, None) if member.eof else (b"", member)
    if member:
        raise Error(path, "is cut short", "replace it by a whole file", BAD_INPUT)


def _steps(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK):
        for i in range(0, len(chunk), _STEP):
            yield chunk[i : i + _STEP]
