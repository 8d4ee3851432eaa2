"""Documents: what corpora are made of on their way from files to tokens."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it comes from."""

    text: str
    name: str  # the file and the place in it, as in "part-0.jsonl.zst:17": for messages and reports


@dataclass(frozen=True, slots=True)
class Removal:
    """Why a document goes; it stands in the report of what cleaning did."""

    reason: str


Edit = Callable[[str], str | Removal]  # a pure function: the text as it should be, or why the document goes
