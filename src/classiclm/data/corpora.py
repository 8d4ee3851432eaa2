"""Texts by name or path: what there is, and where it comes from.

A string with a separator in it is a path (a text file, a folder of .txt and .md files, or a pattern such as
"./letters/*.txt"), else a name.
"""

import glob
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from classiclm.config import Rate
from classiclm.data import plays
from classiclm.data.locate import Download, find, locate
from classiclm.errors import BAD_INPUT, USAGE, Error, did_you_mean
from classiclm.files import is_path

SHAKESPEARE = Download(
    "shakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
PLAYS_CHARACTERS = 1_000_000
PLAYS_SEED = 1
NAMES = ("plays", "shakespeare")
_TEXT_ENDINGS = (".txt", ".md")


@dataclass(frozen=True)
class Data:
    """The text to learn from."""

    SHORTHAND: ClassVar[str] = "name"

    name: str = "shakespeare"  # shakespeare, plays, a text file, a folder of texts, or a pattern like './*.txt'
    val_share: Annotated[Rate, Field(gt=0)] = 0.1  # the last part of the text, kept for validation
    errors: Literal["strict", "replace"] = "strict"  # what to do with bytes that are not UTF-8


def read_documents(data: Data) -> list[str]:
    """The texts of a corpus, one per file. Raises Error: exit 2 for an unknown name, 3 for what cannot be read."""
    if data.name == "plays":
        return [plays.generate(PLAYS_CHARACTERS, PLAYS_SEED)]
    if data.name == "shakespeare":
        return [_read(locate(SHAKESPEARE), data.errors)]
    if not is_path(data.name):
        hint = f"write ./{data.name} for the path" if Path(data.name).exists() else did_you_mean(data.name, NAMES)
        raise Error(data.name, "is no named corpus", hint, USAGE)
    return _read_path(Path(data.name), data.errors)


def default_corpus() -> str:
    """shakespeare if it is on this machine, else plays, which the package makes by itself."""
    return "shakespeare" if find(SHAKESPEARE) else "plays"


def entropy_floor(name: str) -> float | None:
    """Nats per character that no model can go below, where that is known exactly."""
    return plays.entropy_per_char() if name == "plays" else None


def _read_path(path: Path, errors: str) -> list[str]:
    if any(sign in str(path) for sign in "*?[") and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise Error(path, "matches no file", "correct the pattern; in a shell, put it in quotes", BAD_INPUT)
        return [_read(file, errors) for file in files]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _TEXT_ENDINGS and p.is_file())
        if not files:
            raise Error(path, "has no .txt or .md file", "name a folder with text files", BAD_INPUT)
        return [_read(file, errors) for file in files]
    return [_read(path, errors)]


def _read(path: Path, errors: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise Error(path, e.strerror or "cannot be read", "name a text file that exists", BAD_INPUT) from e
    if b"\0" in raw[:8192]:
        raise Error(path, "is a binary file", "name a text file", BAD_INPUT)
    try:
        return raw.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as e:
        fix = "convert it to UTF-8, or pass --data.errors replace"
        raise Error(path, f"is not UTF-8 at byte {e.start}", fix, BAD_INPUT) from e
