"""Data sets of the Hugging Face hub as streams of documents (extra `data`): no set is downloaded as a whole.

A stream is read from any document on: a position is the state of the stream behind some row, and belongs to one commit
of the set. Rows that stand together and have an equal value in the column `group` make one document.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from classiclm.data.documents import Document
from classiclm.data.readers import MAX_CHARS, Notes, Reading
from classiclm.errors import BAD_INPUT, Error
from classiclm.extras import need

_COMMIT = re.compile(r"[0-9a-f]{40}")
# Packages that a stream goes through: what they raise is about the hub or its files, and no bug of ours.
_THEIRS = {"datasets", "huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "aiohttp", "fsspec", "pyarrow"}
_BUILT_IN = (OSError, RuntimeError, ValueError)
_NO_TEXT = "records without text"
_TOO_LONG = "documents cut because they are too long"
_BLANK_LINE = "\n\n"

_Position = dict[str, Any]  # rows read, state of the stream behind them, pieces read of the document that comes
_Row = Mapping[str, Any]


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, as `datasets.load_dataset` names it."""

    id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None  # a commit, branch or tag; None is the newest commit


@dataclass(frozen=True)
class _Joined:
    """The text of some neighbouring rows."""

    text: str
    row: int  # number of the first row with text, from 1
    before: _Position
    behind: _Position
    n_without: int  # records without text between the two positions


def commit_of(hub: HubSet, name: str) -> str:
    """The commit that the revision stands for. Raises Error (exit 3) if the hub cannot be asked."""
    if hub.revision and _COMMIT.fullmatch(hub.revision):
        return hub.revision
    api = need("huggingface_hub", "data").HfApi()
    with _explaining(hub, name):
        return str(api.dataset_info(hub.id, revision=hub.revision).sha)


def open_stream(hub: HubSet, name: str, alternatives: Sequence[str]) -> Any:
    """The set as a `datasets.IterableDataset`. Raises Error (exit 3) that says what to do instead."""
    datasets = need("datasets", "data")
    if "torch" not in sys.modules:
        datasets.config.TORCH_AVAILABLE = False  # a stream imports it wherever it is, for nothing but 180 MB
    with _explaining(hub, name, alternatives):
        return datasets.load_dataset(hub.id, hub.config, split=hub.split, revision=hub.revision, streaming=True)


def read_rows(
    stream: Any, hub: HubSet, reading: Reading, name: str, position: Any | None, notes: Notes
) -> Iterator[tuple[Document, Any]]:
    """The documents of a stream behind a position, each with the JSON-able position right behind it.

    A document that is too long comes in pieces; behind all but the last, the position is that of its first row and the
    number of pieces read, and `notes` is not told before the last: so nothing is counted twice, wherever one goes on.
    Raises Error (exit 3) for a missing column, naming those there are, and when the stream breaks.
    """
    start = position or {"row": 0, "state": None, "pieces": 0}
    skip = start["pieces"]
    with _explaining(hub, name):
        for found in _joined(_rows(stream, hub, reading, start), reading, start):
            pieces = [Document(text, f"{name}:{found.row}") for text in _cut(found.text)]
            for i, piece in enumerate(pieces[skip:-1], start=skip + 1):
                yield piece, {**found.before, "pieces": i}
            _count(notes, _NO_TEXT, found.n_without)
            _count(notes, _TOO_LONG, int(len(pieces) > 1))
            if pieces:
                yield pieces[-1], found.behind
            skip = 0


def _rows(stream: Any, hub: HubSet, reading: Reading, start: _Position) -> Iterator[tuple[_Row, _Position]]:
    """The rows behind a position, each with the position behind it."""
    columns = [reading.text] if reading.group is None else [reading.text, reading.group]
    known = stream.column_names  # None where only the rows themselves can tell, as with JSON
    if known is not None:
        _check_columns(known, columns, hub)
        stream = stream.select_columns(columns)
    if start["state"] is not None:
        stream.load_state_dict(start["state"])
    for n, row in enumerate(stream, start=start["row"] + 1):
        if known is None:
            _check_columns(row, columns, hub)
        yield row, {"row": n, "state": stream.state_dict(), "pieces": 0}


def _joined(rows: Iterable[tuple[_Row, _Position]], reading: Reading, start: _Position) -> Iterator[_Joined]:
    """Neighbouring rows of a group made one; without a group each row alone.

    A group that grows beyond MAX_CHARS is closed there. The last one may have no text, only records without it.
    """
    before = behind = {**start, "pieces": 0}
    texts: list[str] = []
    first = n_chars = n_without = 0
    group = None
    for row, after in rows:
        text = row[reading.text]
        if not isinstance(text, str) or not text:
            n_without, behind = n_without + 1, after
            continue
        value = None if reading.group is None else row[reading.group]
        same = reading.group is not None and value == group and n_chars + len(text) <= MAX_CHARS
        if texts and not same:
            yield _Joined(_BLANK_LINE.join(texts), first, before, behind, n_without)
            before, texts, n_chars, n_without = behind, [], 0, 0
        first = first if texts else after["row"]
        texts.append(text.replace("\r\n", "\n"))
        n_chars, group, behind = n_chars + len(text), value, after
    yield _Joined(_BLANK_LINE.join(texts), first, before, behind, n_without)


def _cut(text: str) -> Iterator[str]:
    """The text in pieces of at most MAX_CHARS, behind a line break where there is one; of no text none."""
    start = 0
    while start < len(text):
        end = start + MAX_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _count(notes: Notes, what: str, n: int) -> None:
    if n:
        notes.counts[what] = notes.counts.get(what, 0) + n


def _check_columns(there: Iterable[str], needed: Sequence[str], hub: HubSet) -> None:
    for column in needed:
        if column not in there:
            flag = "text" if column == needed[0] else "group"
            why = f"has no column {column!r}; there are {', '.join(there)}"
            raise Error(hub.id, why, f"name the right one by --{flag}", BAD_INPUT)


@contextmanager
def _explaining(hub: HubSet, name: str, alternatives: Sequence[str] = ()) -> Iterator[None]:
    """Turns what goes wrong at the hub into an Error (exit 3) that says how to get the text elsewhere."""
    try:
        yield
    except Exception as e:
        if isinstance(e, Error) or not (isinstance(e, _BUILT_IN) or type(e).__module__.partition(".")[0] in _THEIRS):
            raise
        fix = f"fetch its files elsewhere (hf download --repo-type dataset {hub.id} --local-dir DIR), pass {name}=DIR"
        fix += f"; such text is also in {' and '.join(alternatives)}" if alternatives else ""
        raise Error(f"{name}: {hub.id}", _reason(e), fix, BAD_INPUT) from e


def _reason(e: Exception) -> str:
    """In words why a set cannot be read."""
    text = " ".join(str(e).split()).rstrip(".") or type(e).__name__
    if "scripts are no longer supported" in text:
        return "is made by a script, which is not run"
    if isinstance(e, FileNotFoundError) or type(e).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError"):
        return f"is not on the hub, or not for everyone ({text})"
    if isinstance(e, OSError) or type(e).__module__.startswith("http"):
        return f"cannot be reached ({text})"
    return f"cannot be read ({text})"
