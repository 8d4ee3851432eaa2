"""Cleaning: small pure steps over documents, each with a count of what it did and a first example of every effect.

A step edits one document at a time, so steps run in any number of processes and their effects add up to the same sums.
Steps that compare documents with each other ("exact", "near") are in duplicates.py.

    steps = make_steps(["unicode", "whitespace", "short"], Cleaning())
    documents, effects = clean(documents, steps)
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from classiclm.config import NonNegative
from classiclm.data.boilerplate import gutenberg, news
from classiclm.data.documents import Document, Edit, Removal
from classiclm.data.mail import forwards, mail, replies, signatures
from classiclm.data.quality import Gopher, gopher
from classiclm.errors import Error, did_you_mean
from classiclm.extras import need

_SHOWN = 200  # characters of a text that an example shows
_BEFORE = 60  # of these, how many in front of the place that changed

# What may need repair: a character that is not listed here, or two that could be one, decoded wrongly. UTF-8 needs at
# least two bytes above 127 for that (the second may have become a blank or a question mark), so an accented letter
# among ASCII is itself. Typographic marks, next to each other, never are such bytes in an encoding that ftfy knows.
_LETTER = "À-ÖØ-öø-ıĴ-ňŊ-ž"  # without the ligatures among them
_MARK = "“”‘’–—…"
_ASCII_SUSPECT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f&]")  # the same for ASCII alone, four times as fast
_SUSPECT = re.compile(rf"[^\n\t -%'-~{_LETTER}{_MARK}]|[{_LETTER}][^\n\t!->@-~]|[{_MARK}][{_LETTER}]")


@dataclass(frozen=True)
class Cleaning:
    """What cleaning does."""

    SHORTHAND: ClassVar[str] = "steps"

    steps: str | None = None  # names of steps, joined by commas; null = those of the source
    min_chars: NonNegative = 200  # documents with fewer characters go (step short)
    gopher: Gopher = Gopher()  # thresholds of the quality rules (step gopher)


@dataclass(frozen=True)
class Step:
    """A named edit. The edit is a pure function of the text and can be sent to another process."""

    name: str
    edit: Edit


@dataclass
class Effects:
    """What one step did to the documents that went through it. Characters are code points.

    `examples` holds the first case of each reason of removal, and of "changed": {"document", "before", "after"}.
    """

    name: str
    documents_in: int = 0
    documents_out: int = 0
    characters_in: int = 0
    characters_out: int = 0
    changed: int = 0  # documents that stayed with another text
    removed: dict[str, int] = field(default_factory=dict)  # reason -> documents
    examples: dict[str, dict[str, str]] = field(default_factory=dict)

    def enter(self, document: Document) -> None:
        """Count a document that comes in."""
        self.documents_in += 1
        self.characters_in += len(document.text)

    def keep(self, document: Document, text: str) -> None:
        """Count a document that stays, with its text from now on."""
        self.documents_out += 1
        self.characters_out += len(text)
        if text != document.text:
            self.changed += 1
            self._show("changed", document, text)

    def remove(self, document: Document, reason: str, after: str = "") -> None:
        """Count a document that goes. `after` stands in its example (for a duplicate: the name of the original)."""
        self.removed[reason] = self.removed.get(reason, 0) + 1
        self._show(reason, document, after)

    def _show(self, case: str, document: Document, after: str) -> None:
        if case in self.examples:
            return
        start = max(0, _first_difference(document.text, after) - _BEFORE) if case == "changed" else 0
        before, after = (text[start : start + _SHOWN] for text in (document.text, after))
        shown = {"document": document.name, "before": before, "after": after}
        # Raw mail and odd file names carry bytes that are no text; a report is UTF-8.
        self.examples[case] = {key: text.encode("utf-8", "replace").decode() for key, text in shown.items()}

    def merge(self, other: "Effects") -> None:
        """Add what the same step did to later documents; the earlier example of each case stays.

        Raises ValueError for another step's effects.
        """
        if other.name != self.name:
            raise ValueError(f"effects of {other.name!r} cannot be added to those of {self.name!r}")
        self.documents_in += other.documents_in
        self.documents_out += other.documents_out
        self.characters_in += other.characters_in
        self.characters_out += other.characters_out
        self.changed += other.changed
        for reason, n in other.removed.items():
            self.removed[reason] = self.removed.get(reason, 0) + n
        self.examples = other.examples | self.examples

    def to_json(self) -> dict[str, Any]:
        """A tree that json can write; cases are sorted, so equal effects give equal bytes."""
        tree = dataclasses.asdict(self)
        return tree | {key: dict(sorted(tree[key].items())) for key in ("removed", "examples")}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "Effects":
        """The effects that `to_json` wrote."""
        return cls(**tree)


def _first_difference(a: str, b: str) -> int:
    """The number of characters that both begin with, by bisection: slices compare fast, single characters do not."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def run_step(step: Step, documents: Iterable[Document], effects: Effects) -> Iterator[Document]:
    """The documents that a step keeps, as it edits them; one left with white space only goes, as "empty"."""
    for document in documents:
        effects.enter(document)
        result = step.edit(document.text)
        if isinstance(result, str) and (not result or result.isspace()):
            result = Removal("empty")
        if isinstance(result, Removal):
            effects.remove(document, result.reason)
        else:
            effects.keep(document, result)
            yield Document(result, document.name)


def clean(documents: Iterable[Document], steps: Sequence[Step]) -> tuple[Iterator[Document], list[Effects]]:
    """The documents through all steps, lazily, and what each step did: complete once the documents are used up."""
    effects = [Effects(step.name) for step in steps]
    stream = iter(documents)
    for step, effect in zip(steps, effects, strict=True):
        stream = run_step(step, stream, effect)
    return stream, effects


def unicode(text: str) -> str:
    """Repair wrongly decoded text ("donâ€™t"), HTML entities and control characters with ftfy; NFC; curly quotes stay.

    ftfy works line by line, and lines in which it could find nothing are not sent through it. Raises Error (exit 4) if
    a line needs ftfy and it is not installed.
    """
    if not _is_suspect(text):
        return text
    fix = _fixer("<" not in text)  # in a text with tags an entity may be meant
    return "".join(fix(line) if _is_suspect(line) else line for line in _lines(text))


def _is_suspect(text: str) -> bool:
    return (_ASCII_SUSPECT if text.isascii() else _SUSPECT).search(text) is not None


def _lines(text: str) -> list[str]:
    """The lines with their ends; only a line feed ends one, as in ftfy."""
    *lines, last = text.split("\n")
    return [*(line + "\n" for line in lines), last]


@functools.cache
def _fixer(unescape_html: bool) -> Callable[[str], str]:
    ftfy = need("ftfy", "data")
    config = ftfy.TextFixerConfig(uncurl_quotes=False, normalization="NFC", unescape_html=unescape_html, explain=False)
    return functools.partial(ftfy.fix_text, config=config)


_BLANK_LINES = re.compile(r"\n{3,}")


def whitespace(text: str) -> str:
    """Line ends as line feeds, no blanks at the end of a line, no byte order marks, at most one blank line in a row and
    none at the start and end. Blanks inside lines stay: in code and tables they mean something."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    text = "\n".join(map(str.rstrip, text.split("\n")))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def short(text: str, min_chars: int) -> str | Removal:
    """Texts with fewer characters go."""
    return Removal("short") if len(text) < min_chars else text


_STEPS: dict[str, Callable[[Cleaning], Edit]] = {
    "unicode": lambda settings: unicode,
    "mail": lambda settings: mail,
    "forwards": lambda settings: forwards,
    "replies": lambda settings: replies,
    "signatures": lambda settings: signatures,
    "gutenberg": lambda settings: gutenberg,
    "news": lambda settings: news,
    "whitespace": lambda settings: whitespace,
    "short": lambda settings: functools.partial(short, min_chars=settings.min_chars),
    "gopher": lambda settings: functools.partial(gopher, rules=settings.gopher),
}
DUPLICATE_STEPS = ("exact", "near")  # these compare documents with each other: duplicates.py
STEP_NAMES = (*_STEPS, *DUPLICATE_STEPS)


def make_steps(names: Sequence[str], settings: Cleaning) -> list[Step]:
    """The steps by name, in the given order. Raises Error (exit 2) for an unknown name.

    Those of DUPLICATE_STEPS have no edit of a single document: the caller takes them out first.
    """
    for name in names:
        if name not in _STEPS:
            raise Error(name, "unknown cleaning step", did_you_mean(name, STEP_NAMES))
    return [Step(name, _STEPS[name](settings)) for name in names]
