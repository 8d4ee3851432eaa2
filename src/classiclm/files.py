"""Every lasting write goes through here, so that a crash at any instant leaves the old file or the new one, whole.

The protocol: write into a temporary place on the same file system, flush to the disk (fsync), rename, flush the folder.
A folder is published the same way and carries a manifest of sizes and sha256 sums; one whose manifest does not match is
as good as absent.

Formats of a manifest: 1 has no sum of its own. 2 (now written) has one, so that a change of the manifest is found too.
"""

import hashlib
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import filelock

from classiclm.errors import RESOURCE, Error

MANIFEST = "MANIFEST.json"
FORMAT = 2
_READABLE = (1, FORMAT)
_HOLDER = ".lock-holder.json"  # beside the lock, which a second process may empty in trying it
_PATIENCE = 0.5  # seconds: the holder of a lock writes its name directly after taking it
_LARGE = 1 << 20  # bytes that are worth a thread
_TEMPORARY = ".classiclm-tmp-"  # a name of our own: whatever bears it may be swept

Piece = bytes | memoryview
Sums = dict[str, dict[str, int | str]]  # name of a file -> its "size" and "sha256"


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


def write_stream(path: Path, pieces: Iterable[Piece]) -> None:
    """Replace one file as a whole, by pieces that need not all be in memory. Raises Error (exit 4)."""
    temporary = temporary_for(path)
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
    temporary = temporary_for(path)
    with writing(path):
        try:
            temporary.mkdir(parents=True)
            sums = write_into(temporary, {name: [data] for name, data in files.items()})
            seal(temporary, sums, info)
            reveal(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def temporary_for(path: Path) -> Path:
    """A new name beside `path`, of a kind that `sweep` knows."""
    return path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")


def write_into(folder: Path, files: Mapping[str, Iterable[Piece]]) -> Sums:
    """Write files through to the disk, in pieces that need not all be in memory; their sums, taken on the way."""
    return {name: _write_through(folder / name, pieces) for name, pieces in files.items()}


def seal(folder: Path, sums: Sums, info: Mapping[str, object]) -> None:
    """Add the manifest to a folder whose files are all on the disk."""
    manifest = {"format": FORMAT, **info, "files": dict(sorted(sums.items()))}
    _write_through(folder / MANIFEST, [_sealed(manifest)])
    _flush_folder(folder)


def reveal(temporary: Path, path: Path) -> None:
    """Give a sealed folder its name, which must be free."""
    os.rename(temporary, path)
    _flush_folder(path.parent)


def _sealed(manifest: Mapping[str, object]) -> bytes:
    """The manifest's bytes, with their own sum as the last entry."""
    return _json({**manifest, "sha256": sha256(_json(manifest))})


def _json(tree: object) -> bytes:
    return json.dumps(tree, indent=1).encode()


def defect(path: Path, unread: str | None = None) -> str | None:
    """What is wrong with a published folder, in words; None if every file is as its manifest says.

    unread: what the names of files begin with that the caller will not read; of those only the size is looked at.
    """
    try:
        data = _plain(path / MANIFEST).read_bytes()
        manifest = json.loads(data)
        if manifest["format"] not in _READABLE:
            return f"has format {manifest['format']}, this version reads {' and '.join(map(str, _READABLE))}"
        if manifest["format"] > 1 and _sealed({k: v for k, v in manifest.items() if k != "sha256"}) != data:
            return f"has a damaged {MANIFEST}"
        files = manifest["files"].items()
        skipped = {name for name, _ in files if unread is not None and name.startswith(unread)}
        with ThreadPoolExecutor(max_workers=len(files) or 1) as beside:  # sums are taken outside of Python's lock
            problems = list(beside.map(lambda file: _defect_of(path / file[0], file[1], file[0] not in skipped), files))
        return next(filter(None, problems), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"has no readable {MANIFEST}"


def _defect_of(file: Path, expected: Mapping[str, object], will_be_read: bool) -> str | None:
    """What is wrong with one file. One that cannot be read is damaged."""
    size, total = expected["size"], expected["sha256"]
    try:
        is_sound = _plain(file).stat().st_size == size and (not will_be_read or sha256_of_file(file) == total)
    except FileNotFoundError:
        return f"lacks {file.name}"
    except OSError:
        is_sound = False
    return None if is_sound else f"has a damaged {file.name}"


def _plain(file: Path) -> Path:
    """The file itself. Raises FileNotFoundError for a folder or a link in its place."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        raise FileNotFoundError(file)
    return file


def remove_folder(path: Path) -> None:
    """Delete a published folder: renamed first, so that it never looks valid while half of it is gone."""
    trash = path.with_name(f"{_TEMPORARY}trash-{uuid.uuid4().hex[:8]}")
    with writing(path):
        os.rename(path, trash)
        _flush_folder(path.parent)
        shutil.rmtree(trash)


@contextmanager
def locked(folder: Path, *inside: str) -> Iterator[None]:
    """Hold a folder's lock; what a killed writer left in it, and in folders inside, is swept.

    Raises Error (exit 4) if another process holds it, and names that process. The kernel frees the lock of a process
    that dies.
    """
    make_folder(folder)
    lock, note = filelock.FileLock(folder / ".lock"), folder / _HOLDER
    with writing(folder):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as e:
            why = f"is in use by {_holder(note)}"
            raise Error(folder, why, "wait for it, or choose another --out", RESOURCE) from e
    try:
        for name in (".", *inside):
            sweep(folder / name)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        write_file(note, _json({"host": socket.gethostname(), "pid": os.getpid(), "started": started}))
        try:
            yield
        finally:
            with writing(note):
                note.unlink(missing_ok=True)
    finally:
        lock.release()


def _holder(note: Path) -> str:
    """The process that holds a lock, in words. A note by one that is dead is waited out: the next is about to write."""
    give_up = time.monotonic() + _PATIENCE
    while time.monotonic() < give_up:
        try:
            holder = json.loads(note.read_bytes())
            host, pid, started = str(holder["host"]), int(holder["pid"]), str(holder["started"])
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.01)
            continue
        if host != socket.gethostname() or _is_alive(pid):
            return f"process {pid} on {host}, which started at {started}"
        time.sleep(0.01)
    return "another process"


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end a process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def sweep(folder: Path) -> None:
    """Delete what dead writers left behind. Call it only while holding the folder's lock. Raises Error (exit 4)."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with writing(leftover):
                leftover.unlink(missing_ok=True)


def _write_through(path: Path, pieces: Iterable[Piece]) -> dict[str, int | str]:
    """Write to the disk, not only to the system's memory; the size and the sum of what was written.

    A large piece is summed up by a thread while it is written: either takes about as long as the other.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as beside:
        for piece in pieces:
            summed = beside.submit(digest.update, piece) if len(piece) > _LARGE else None
            file.write(piece)
            summed.result() if summed else digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _flush_folder(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its renames are durable by themselves
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
