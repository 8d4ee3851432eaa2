"""Where a published file is: under $CLASSICLM_DATA, in the cache, or fetched once into the cache and verified."""

import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from classiclm.errors import BAD_INPUT, Error
from classiclm.files import make_folder, sha256, sha256_of_file, write_file

_TIMEOUT = 20  # seconds


@dataclass(frozen=True)
class Download:
    """A published file: its place below the data folder, where it comes from, and its sha256."""

    place: str
    url: str
    sha256: str


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

    Raises Error (exit 3): for a file that is not the published one, and without a network, naming where to place it.
    """
    found = find(file)
    if found is None:
        return _download(file)
    if sha256_of_file(found) != file.sha256:
        fix = "replace it by the published file, or give the path itself if another text is meant"
        raise Error(found, f"is not the published {file.place}: its sha256 differs", fix, BAD_INPUT)
    return found


def _download(file: Download) -> Path:
    target = cache_folder() / file.place
    fix = f"download {file.url} yourself and place it at {target}, or set CLASSICLM_DATA to a folder with {file.place}"
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        raise Error(file.place, f"is not on this machine and cannot be downloaded ({reason})", fix, BAD_INPUT) from e
    if sha256(data) != file.sha256:
        page = data.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html"))
        why = "a web page came instead of the file" if page else "the download has a wrong sha256"
        raise Error(file.place, why, fix, BAD_INPUT)
    make_folder(target.parent)
    write_file(target, data)
    return target
