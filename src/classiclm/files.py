"""Every lasting write goes through here, so that a crash at any instant leaves the old file or the new one, whole.

The protocol: write into a temporary place on the same file system, flush to the disk (fsync), rename, flush the folder.
A folder is published the same way and carries a manifest of sizes and sha256 sums; one whose manifest does not match is
as good as absent.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import filelock

from classiclm.errors import RESOURCE, Error

MANIFEST = "MANIFEST.json"
FORMAT = 1
_TEMPORARY = ".classiclm-tmp-"  # a name of our own: whatever bears it may be swept


def is_path(name_or_path: str) -> bool:
    """A string with a separator in it is a path, else a name."""
    return "/" in name_or_path or "\\" in name_or_path


def sha256(data: bytes) -> str:
    """The hexadecimal sum of some bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """The hexadecimal sum of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write into an Error (exit 4) that names the path."""
    try:
        yield
    except OSError as e:
        why = f"cannot be written ({e.strerror or e})"
        raise Error(path, why, "name a folder that can be written, with enough free space", RESOURCE) from e


def make_folder(path: Path) -> Path:
    """The folder, made if need be. Raises Error (exit 4)."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_file(path: Path, data: bytes) -> None:
    """Replace one file as a whole. Raises Error (exit 4)."""
    write_stream(path, [data])


def write_stream(path: Path, pieces: Iterable[bytes]) -> None:
    """Replace one file as a whole, by pieces that need not all be in memory. Raises Error (exit 4)."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    with writing(path):
        try:
            _write_through(temporary, pieces)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)


def write_once(path: Path, data: bytes) -> None:
    """As `write_file`, but a file that has this content already is left as it is."""
    if not path.is_file() or path.stat().st_size != len(data) or sha256_of_file(path) != sha256(data):
        write_file(path, data)


def publish_folder(path: Path, files: Mapping[str, bytes], info: Mapping[str, object]) -> None:
    """Write a folder of files with its manifest, visible only when complete. `path` must not exist yet.

    Nothing but `files` and `info` goes in: no time, host or path, so equal content means equal bytes.
    """
    sums = {name: {"size": len(data), "sha256": sha256(data)} for name, data in sorted(files.items())}
    manifest = {"format": FORMAT, **info, "files": sums}
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")
    with writing(path):
        try:
            temporary.mkdir(parents=True)
            for name, data in files.items():
                _write_through(temporary / name, [data])
            _write_through(temporary / MANIFEST, [json.dumps(manifest, indent=1).encode()])
            _flush_folder(temporary)
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _flush_folder(path.parent)


def defect(path: Path) -> str | None:
    """What is wrong with a published folder, in words; None if every file is as its manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            return f"has format {manifest['format']}, this version reads {FORMAT}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"lacks {name}"
            if file.stat().st_size != expected["size"] or sha256_of_file(file) != expected["sha256"]:
                return f"has a damaged {name}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"has no readable {MANIFEST}"
    return None


def remove_folder(path: Path) -> None:
    """Delete a published folder: renamed first, so that it never looks valid while half of it is gone."""
    trash = path.with_name(f"{_TEMPORARY}trash-{uuid.uuid4().hex[:8]}")
    with writing(path):
        os.rename(path, trash)
        shutil.rmtree(trash)


@contextmanager
def locked(folder: Path, *inside: str) -> Iterator[None]:
    """Hold a folder's lock; what a killed writer left in it, and in folders inside, is swept.

    Raises Error (exit 4) if another process holds it. The kernel frees the lock of a process that dies.
    """
    make_folder(folder)
    lock = filelock.FileLock(folder / ".lock")
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as e:
            raise Error(folder, "is in use by another process", "wait for it, or choose another --out", RESOURCE) from e
    try:
        for name in (".", *inside):
            sweep(folder / name)
        yield
    finally:
        lock.release()


def sweep(folder: Path) -> None:
    """Delete what dead writers left behind. Call it only while holding the folder's lock."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _write_through(path: Path, pieces: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its renames are durable by themselves
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
