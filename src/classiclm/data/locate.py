"""Where a published file is: under $CLASSICLM_DATA, in the cache, or fetched once into the cache and verified.

A download grows in FILE.part beside its place and is renamed at the end: what stands at the place is whole, and a
download that broke off, be it by a kill, goes on where it was (HTTP Range). FILE.part.json keeps the address and the
server's mark of the version that is being fetched; of another version nothing is appended.
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from classiclm.errors import BAD_INPUT, Error
from classiclm.files import make_folder, sha256_of_file, write_file, writing

_TIMEOUT = 20  # seconds without a byte
_ATTEMPTS = 3  # in a row that brought nothing
_PAUSE = 1.0  # seconds before the second attempt, twice as many before the third
_REPORT_EVERY = 5.0  # seconds between two lines about a download
_MAX_READ = 1 << 20  # bytes
_PASSING = (408, 429, 500, 502, 503, 504)  # answers of a server that may be another one soon


@dataclass(frozen=True)
class Download:
    """A published file: its place below the data folder, and where it comes from.

    Without a sha256, that of the first download is kept in FILE.sha256 beside the file, and holds from then on.
    """

    place: str
    url: str
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()  # other addresses of the same file, tried in this order


class _Failure(Exception):
    """An address does not give the file, and will not soon."""


class _Broken(Exception):
    """A download ended early, or has to begin anew; another attempt may bring the rest."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/classiclm, by default ~/.cache/classiclm."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "classiclm"


def find(file: Download) -> Path | None:
    """The file if it is on this machine already."""
    places = [Path(root) for root in [os.environ.get("CLASSICLM_DATA")] if root]
    for root in [*places, cache_folder()]:
        if (root / file.place).is_file():
            return root / file.place
    return None


def locate(file: Download) -> Path:
    """The path of the file, downloaded if need be, its content verified.

    Raises Error: exit 3 for a file that is not the published one, and without a network, naming where to place it; exit
    4 if the cache cannot be written.
    """
    found = find(file)
    if found is None:
        return _download(file)
    return _checked(found, file)


def _checked(found: Path, file: Download) -> Path:
    record = _beside(found, ".sha256")
    expected = file.sha256
    if expected is None and record.is_file():
        expected = record.read_text(errors="replace").partition(" ")[0].strip()
    if expected is None or sha256_of_file(found) == expected:
        return found
    if file.sha256 is None:
        why = f"is not what was downloaded: its sha256 is not that of {record.name}"
        raise Error(found, why, "delete both to fetch it again", BAD_INPUT)
    fix = "replace it by the published file, or give the path itself if another text is meant"
    raise Error(found, f"is not the published {file.place}: its sha256 differs", fix, BAD_INPUT)


def _download(file: Download) -> Path:
    """Fetch the file into the cache from the first address that gives it."""
    target = cache_folder() / file.place
    make_folder(target.parent)
    reasons = []
    with _alone(file):
        if target.is_file():  # another process has fetched it meanwhile
            return _checked(target, file)
        for url in (file.url, *file.mirrors):
            try:
                return _fetch(url, file, target)
            except _Failure as e:
                reasons.append(f"{url}: {e}" if file.mirrors else str(e))
    why = f"is not on this machine and cannot be downloaded ({'; '.join(reasons)})"
    fix = f"download {file.url} yourself and place it at {target}, or set CLASSICLM_DATA to a folder with {file.place}"
    raise Error(file.place, why, fix, BAD_INPUT)


@contextmanager
def _alone(file: Download) -> Iterator[None]:
    """Holds the lock of a download: two processes must not write one part."""
    lock = filelock.FileLock(make_folder(cache_folder() / "locks") / f"{file.place.replace('/', '-')}.lock")
    with writing(Path(lock.lock_file)):
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _say(f"{file.place}: another process is downloading it; waiting")
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(url: str, file: Download, target: Path) -> Path:
    """Attempts at one address until the file is whole. Raises _Failure."""
    part = _beside(target, ".part")
    longest, fruitless = _size(part), 0
    while True:
        try:
            return _attempt(url, file, target, part)
        except _Broken as e:
            fruitless = 0 if _size(part) > longest else fruitless + 1
            longest = max(longest, _size(part))
            if fruitless == _ATTEMPTS:
                raise _Failure(str(e)) from e
        time.sleep(_PAUSE * 2 ** max(fruitless - 1, 0))


def _attempt(url: str, file: Download, target: Path, part: Path) -> Path:
    """Complete the part and put it in its place. Raises _Broken or _Failure."""
    n_before = _transfer(url, file, part)
    digest = sha256_of_file(part)
    if file.sha256 not in (None, digest):
        _discard(part)
        reason = "the download has a wrong sha256"
        raise (_Broken if n_before else _Failure)(reason)  # what was there before may be of another version
    if file.sha256 is None:
        write_file(_beside(target, ".sha256"), f"{digest}  {target.name}\n".encode())
    with writing(target):
        os.replace(part, target)
        _beside(part, ".json").unlink(missing_ok=True)
    return target


def _transfer(url: str, file: Download, part: Path) -> int:
    """Bring the rest of a file into its part. Returns how many bytes were there before and have been kept."""
    n_there = _size(part)
    headers = _resume_headers(url, file, part) if n_there else {}
    request = urllib.request.Request(url, headers={"User-Agent": "classiclm", "Accept-Encoding": "identity", **headers})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as e:
        if e.code == 416 and headers and e.headers.get("Content-Range") == f"bytes */{n_there}":
            return n_there  # the part is the whole file
        if e.code == 416:
            _discard(part)
        raise (_Broken if e.code in (*_PASSING, 416) else _Failure)(f"{e.code} {e.reason}") from e
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        passing = isinstance(reason, TimeoutError | ConnectionResetError | http.client.HTTPException)
        raise (_Broken if passing else _Failure)(str(reason) or type(reason).__name__) from e
    with response:
        n_kept = n_there if response.status == 206 else 0
        _receive(response, url, file, part, n_kept)
    return n_kept


def _receive(response: Any, url: str, file: Download, part: Path, n_kept: int) -> None:
    """Append an answer to the first `n_kept` bytes of a part."""
    chunks = _chunks(response)
    first = next(chunks, b"")
    if _is_page(response, first, n_kept) and not file.place.endswith((".html", ".htm")):
        raise _Failure("a web page came instead of the file")
    if n_kept and not response.headers.get("Content-Range", "").startswith(f"bytes {n_kept}-"):
        _discard(part)
        raise _Broken("the server sent another part than asked for")
    if not n_kept:
        _discard(part)
        write_file(_beside(part, ".json"), json.dumps({"url": url, "mark": _mark(response)}).encode())
    length = response.headers.get("Content-Length")
    total = None if length is None else n_kept + int(length)
    n = n_kept
    report = _Report(file.place, n, total)
    with writing(part), part.open("ab") as out:
        out.write(first)
        n += len(first)
        for chunk in chunks:
            out.write(chunk)
            n += len(chunk)
            report.show(n)
        out.flush()
        os.fsync(out.fileno())
    if total is not None and n != total:
        raise _Broken(f"the connection ended after {n} of {total} bytes")


def _chunks(response: Any) -> Iterator[bytes]:
    """What comes over the network, as it comes. Raises _Broken, so that no OSError of reading is taken for writing."""
    while True:
        try:
            chunk = response.read1(_MAX_READ)
        except (OSError, http.client.HTTPException) as e:
            raise _Broken(str(e) or type(e).__name__) from e
        if not chunk:
            return
        yield chunk


def _resume_headers(url: str, file: Download, part: Path) -> dict[str, str]:
    """How to ask for the rest of a part; empty if it may not be continued.

    It may be if the server vouches for the version, or if a known sha256 will tell in the end.
    """
    try:
        state = json.loads(_beside(part, ".json").read_bytes())
        mark = state["mark"] if state["url"] == url else None
    except (OSError, ValueError, KeyError, TypeError):
        mark = None
    if not mark and file.sha256 is None:
        return {}
    asked = {"Range": f"bytes={_size(part)}-"}
    return {**asked, "If-Range": mark} if mark else asked


def _mark(response: Any) -> str | None:
    """What the server calls this version of the file: its strong ETag, else its date."""
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def _is_page(response: Any, first: bytes, n_kept: int) -> bool:
    start = b"" if n_kept else first.lstrip()[:15].lower()
    kind = response.headers.get("Content-Type") or ""
    return kind.startswith("text/html") or start.startswith((b"<!doctype html", b"<html"))


def _discard(part: Path) -> None:
    with writing(part):
        part.unlink(missing_ok=True)
        _beside(part, ".json").unlink(missing_ok=True)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class _Report:
    """A line on stderr every few seconds, so that a short download is silent."""

    def __init__(self, place: str, n_before: int, total: int | None):
        self.place, self.n_before, self.total = place, n_before, total
        self.start = self.last = time.monotonic()

    def show(self, n: int) -> None:
        """`n` bytes are there now."""
        now = time.monotonic()
        if now - self.last < _REPORT_EVERY:
            return
        self.last = now
        of = f" of {self.total / 1e6:,.0f}" if self.total else ""
        speed = (n - self.n_before) / (now - self.start)
        _say(f"{self.place}: {n / 1e6:,.0f}{of} MB, {speed / 1e6:,.1f} MB/s")
