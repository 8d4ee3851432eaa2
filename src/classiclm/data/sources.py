"""Where text comes from: the known corpora as a table, and origins that read their documents from any place on.

A string on the command line names an origin (`resolve`):

    wikipedia                   a known corpus: $CLASSICLM_DATA/wikipedia, else the hub; small ones: a download
    wikipedia@3b31bf0           the same at one commit of the hub
    wikipedia=./dumps/*.parquet local files, read and cleaned as that corpus is
    ./letters                   local files as they are: no cleaning but what was asked for

Sizes and licences are those that the publishers state. A licence is of the collection; the texts of crawled pages and
articles remain their authors'.
"""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from classiclm.data import plays
from classiclm.data.corpora import MULTI30K, PLAYS_CHARACTERS, PLAYS_SEED, SHAKESPEARE
from classiclm.data.documents import Document
from classiclm.data.hub import HubSet, commit_of, open_stream, read_rows
from classiclm.data.locate import Download, cache_folder, locate
from classiclm.data.opening import check_file
from classiclm.data.readers import Notes, Reading, list_files, read_file
from classiclm.errors import BAD_INPUT, USAGE, Error, did_you_mean
from classiclm.files import is_path, make_folder, sha256_of_file, write_file

_LISTED = 1000  # files that a description names one by one; of more it gives a sum over all


@dataclass(frozen=True)
class Source:
    """A known corpus: where it is, how it is read and cleaned, and what to expect of it."""

    name: str
    about: str
    licence: str
    reading: Reading
    steps: tuple[str, ...]  # names of cleaning steps, in order
    size: int  # bytes of the download
    tokens: int | None  # of GPT-2's tokenizer, before cleaning
    hub: HubSet | None = None
    files: tuple[Download, ...] = ()
    note: str = ""
    alternatives: tuple[str, ...] = ()  # other sets of the hub with such text


def _steps(names: str) -> tuple[str, ...]:
    return tuple(names.split(","))


# Expected tokens are size / 4.5, the usual bytes of English per GPT-2 token, unless a comment says that they were
# counted. A set that the hub keeps as compressed parquet has more text, and so more tokens, than its size tells.
_ALL = (
    Source(
        "cnn",
        "CNN news articles, 2011-2022",
        "articles: copyright CNN, for research",  # as commonly stated; the set's own card names no owner
        Reading(text="text"),
        _steps("unicode,news,whitespace,short,gopher,exact,near"),
        size=179_000_000,
        tokens=40_000_000,
        hub=HubSet("AyoubChLin/CNN_News_Articles_2011-2022"),
        note="the alternative has its text in the column article",
        alternatives=("abisee/cnn_dailymail",),
    ),
    Source(
        "enron",
        "e-mail of Enron's employees, about 1999-2002",
        "public record, released by the US Federal Energy Regulatory Commission",  # as commonly stated
        Reading(text="text", format="mail"),
        _steps("mail,unicode,forwards,replies,signatures,whitespace,short,exact,near"),
        size=1_100_000_000,
        tokens=240_000_000,
        hub=HubSet("snoop2head/enron_aeslc_emails"),
        note="the maildir of enron_mail_20150507.tar.gz, unpacked, can be given as enron=./maildir",
        alternatives=("corbt/enron-emails",),
    ),
    Source(
        "gutenberg",
        "books of Project Gutenberg",
        "public domain in the USA; Project Gutenberg's name is a trademark",
        Reading(text="paragraph", group="book_name"),  # one row per paragraph
        _steps("unicode,gutenberg,whitespace,short,exact,near"),
        size=36_000_000_000,
        tokens=8_000_000_000,
        hub=HubSet("Navanjana/Gutenberg_books"),
        note="the alternative has whole books in the column TEXT",
        alternatives=("sedthh/gutenberg_english",),
    ),
    Source(
        "openwebtext",
        "web pages that Reddit users recommended: the open copy of GPT-2's WebText",
        "CC0 for the packaging; the texts remain their authors'",
        Reading(text="text"),
        _steps("unicode,whitespace,short,gopher,exact,near"),
        size=38_000_000_000,
        tokens=9_040_017_095,  # counted for nanoGPT: 9,035,582,198 of its train.bin + 4,434,897 of its val.bin
        hub=HubSet("vietgpt/openwebtext_en"),
        alternatives=("Skylion007/openwebtext",),
    ),
    Source(
        "wikipedia",
        "English Wikipedia",
        "CC BY-SA 4.0 and GFDL",
        Reading(text="maintext"),
        _steps("unicode,whitespace,short,exact,near"),
        size=11_000_000_000,
        tokens=2_400_000_000,
        hub=HubSet("lucadiliello/english_wikipedia"),
        note="the alternative, config 20231101.en, has its text in the column text",
        alternatives=("wikimedia/wikipedia",),
    ),
    Source(
        "edu",
        "TransWeb-Edu: educational web pages, the English part",
        "ODC-BY",  # that of FineWeb-Edu, from which it was made; as commonly stated
        Reading(text="text"),  # the column's name was not confirmed: if it differs, the error lists those there are
        _steps("unicode,whitespace,short,gopher,exact,near"),
        size=267_000_000_000,
        tokens=59_000_000_000,
        hub=HubSet("britllm/TransWeb-Edu-English"),
        note="the alternative has a sample of ten billion tokens as config sample-10BT",
        alternatives=("HuggingFaceFW/fineweb-edu",),
    ),
    Source(
        "shakespeare",
        "tiny Shakespeare: 40,000 lines of the plays",
        "public domain",
        Reading(documents="block"),
        (),
        size=1_115_394,
        tokens=338_025,  # counted for nanoGPT: 301,966 + 36,059
        files=(SHAKESPEARE,),
    ),
    Source(
        "plays",
        "rhymed scenes that the package writes itself, of known entropy",
        "MIT, as the package",
        Reading(documents="block"),
        (),
        size=PLAYS_CHARACTERS,
        tokens=None,
        note="made on this machine: needs no network",
    ),
    Source(
        "wikitext2",
        "WikiText-2: good articles of Wikipedia, in words, the training part",
        "CC BY-SA 3.0",
        Reading(documents="block"),
        ("whitespace",),
        size=10_800_000,
        tokens=2_400_000,
        files=(
            Download(
                "wikitext2/train.txt",
                "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2/train.txt",
            ),
        ),
        note="valid.txt and test.txt are left for evaluation",
    ),
    Source(
        "multi30k",
        "Multi30k: captions of pictures, the German and the English training sentences",
        "CC BY-NC-SA 4.0; the pictures are Flickr's",  # as commonly stated
        Reading(documents="line", format="text"),
        ("whitespace",),
        size=1_205_973,
        tokens=870_000,  # of 3,911,636 bytes unpacked
        files=tuple(file for file in MULTI30K if "/train." in file.place),
        note="the validation and test sentences are left for evaluation",
    ),
)
SOURCES: dict[str, Source] = {source.name: source for source in _ALL}


class Origin(Protocol):
    """Documents in a fixed order, to be read from any place on."""

    @property
    def name(self) -> str:
        """How the origin is called in reports and weights."""

    @property
    def source(self) -> Source | None:
        """The known corpus that it is; None for files that are just files."""

    @property
    def reading(self) -> Reading:
        """How its files or rows are read."""

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of its cleaning steps."""

    def describe(self) -> dict[str, Any]:
        """What was read, for the manifest: equal for equal content, on any machine."""

    def read(self, position: Any | None, notes: Notes) -> Iterator[tuple[Document, Any]]:
        """The documents behind a position (None: all), each with the JSON-able position right behind it."""


@dataclass(frozen=True)
class LocalFiles:
    """The documents of some files, one file after the other. A position is {"file": i, "document": n}."""

    name: str
    source: Source | None
    reading: Reading
    steps: tuple[str, ...]
    files: tuple[tuple[str, Path], ...]  # (name for reports, place)

    def describe(self) -> dict[str, Any]:
        """Names, sizes and sha256 sums. Reads every byte. Raises Error (exit 3)."""
        rows = [_row(name, path) for name, path in self.files]
        lines = "".join(f"{row['sha256']}  {row['name']}\n" for row in rows)
        return {
            "licence": self.source.licence if self.source else None,
            "reading": dataclasses.asdict(self.reading),
            "n_files": len(rows),
            "size": sum(row["size"] for row in rows),
            "sha256": hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest(),  # as of sha256sum's output
            "files": rows if len(rows) <= _LISTED else None,
        }

    def read(self, position: Any | None, notes: Notes) -> Iterator[tuple[Document, Any]]:
        """See `Origin.read`. The part of a file that is passed over is read again, but not counted again in `notes`."""
        first, n_read = (position["file"], position["document"]) if position else (0, 0)
        for i, (name, path) in enumerate(self.files[first:], start=first):
            skip = n_read if i == first else 0
            for n, document in enumerate(self._documents(path, name, skip, notes), start=skip + 1):
                yield document, {"file": i, "document": n}

    def _documents(self, path: Path, name: str, skip: int, notes: Notes) -> Iterator[Document]:
        """The documents of a file but the first `skip`; `notes` gets what is counted behind those alone."""
        counted = Notes()
        documents = read_file(path, self.reading, name, counted)
        for _ in islice(documents, skip):
            pass
        before = dict(counted.counts)
        for document in documents:
            before = _transfer(counted, before, notes)
            yield document
        _transfer(counted, before, notes)


def _row(name: str, path: Path) -> dict[str, Any]:
    check_file(path)  # a pipe would keep whoever opens it waiting
    try:
        return {"name": name, "size": path.stat().st_size, "sha256": sha256_of_file(path)}
    except OSError as e:
        raise Error(path, e.strerror or "cannot be read", "name files that exist and may be read", BAD_INPUT) from e


def _transfer(counted: Notes, before: Mapping[str, int], notes: Notes) -> dict[str, int]:
    """Add what was counted since `before` to `notes`; returns the counts as they are now."""
    now = dict(counted.counts)
    for what, n in now.items():
        if n > before.get(what, 0):
            notes.counts[what] = notes.counts.get(what, 0) + n - before.get(what, 0)
    return now


@dataclass(frozen=True)
class HubRows:
    """The documents of a data set of the hub, streamed; see `hub.read_rows` for what a position is."""

    name: str
    source: Source
    reading: Reading
    steps: tuple[str, ...]
    hub: HubSet  # with the commit that is read as its revision

    def describe(self) -> dict[str, Any]:
        """The set and the commit of it."""
        return {
            "licence": self.source.licence,
            "reading": dataclasses.asdict(self.reading),
            **dataclasses.asdict(self.hub),
        }

    def read(self, position: Any | None, notes: Notes) -> Iterator[tuple[Document, Any]]:
        """See `Origin.read`."""
        stream = open_stream(self.hub, self.source.name, self.source.alternatives)
        return read_rows(stream, self.hub, self.reading, self.source.name, position, notes)


def resolve(
    argument: str,
    overrides: Mapping[str, Any] | None = None,
    steps: Sequence[str] | None = None,
    revision: str | None = None,
) -> Origin:
    """What a string of the command line stands for: NAME, NAME@REVISION, NAME=PATH or a path.

    `overrides`: fields of Reading that shall differ from the source's own; `steps`: cleaning steps in place of its own.
    `revision`: the commit of the hub to take (that of a manifest, to continue what it describes). Looks for files and
    downloads them, and asks the hub for its newest commit. Raises Error: exit 2 for an unknown name or a revision of
    what has none, 3 for what is not there.
    """
    name, equals, path = argument.partition("=")
    if equals and name in SOURCES:
        return _configured(_local(name, SOURCES[name], path), overrides, steps)
    if equals and not is_path(name) and not Path(argument).exists():
        raise Error(name, "is no known source", f"{did_you_mean(name, SOURCES)}, or give the path alone", USAGE)
    if is_path(argument):
        return _configured(_local(_name_of(argument), None, argument), overrides, steps)
    name, _, at = argument.partition("@")
    if name not in SOURCES:
        hint = f"write ./{argument} for the path" if Path(argument).exists() else did_you_mean(name, SOURCES)
        raise Error(argument, "is no known source", hint, USAGE)
    return _configured(_known(SOURCES[name], revision or at or None), overrides, steps)


def _configured(
    origin: LocalFiles | HubRows, overrides: Mapping[str, Any] | None, steps: Sequence[str] | None
) -> Origin:
    reading = dataclasses.replace(origin.reading, **(overrides or {}))
    return dataclasses.replace(origin, reading=reading, steps=origin.steps if steps is None else tuple(steps))


def _known(source: Source, revision: str | None) -> LocalFiles | HubRows:
    """A known corpus: its own files, those of the data folder, or the hub's."""
    if source.hub is None and revision:
        raise Error(f"{source.name}@{revision}", "has no revisions", f"write {source.name}", USAGE)
    if source.hub is None:
        files = tuple((file.place, locate(file)) for file in source.files) or (_written_plays(),)
        return LocalFiles(source.name, source, source.reading, source.steps, files)
    path = None if revision else _in_data_folder(source.name)
    if path is not None:
        return _local(source.name, source, path)
    hub = dataclasses.replace(source.hub, revision=revision)
    hub = dataclasses.replace(hub, revision=commit_of(hub, source.name))
    return HubRows(source.name, source, source.reading, source.steps, hub)


def _in_data_folder(name: str) -> str | None:
    """$CLASSICLM_DATA/NAME, or the pattern of the files NAME.* there; None if there is neither."""
    root = os.environ.get("CLASSICLM_DATA")
    if not root:
        return None
    if (Path(root) / name).exists():
        return str(Path(root) / name)
    pattern = f"{glob.escape(root)}/{name}.*"
    return pattern if glob.glob(pattern) else None


def _written_plays() -> tuple[str, Path]:
    """The generated corpus as a file of the cache, for it is then read like any other."""
    place = f"plays/{PLAYS_CHARACTERS}-{PLAYS_SEED}.txt"
    path, data = cache_folder() / place, plays.generate(PLAYS_CHARACTERS, PLAYS_SEED).encode()
    if not path.is_file() or path.read_bytes() != data:
        make_folder(path.parent)
        write_file(path, data)
    return place, path


def _local(name: str, source: Source | None, path: str) -> LocalFiles:
    """The files at a path, each named by its place below the folder that holds them all."""
    files = list_files(path)
    base = Path(path) if Path(path).is_dir() else Path(os.path.commonpath([file.parent for file in files]))
    named = tuple((file.relative_to(base).as_posix(), file) for file in files)
    if source is None:
        return LocalFiles(name, None, Reading(), (), named)
    reading = source.reading
    if all(_tells_format(file) for file in files):
        reading = dataclasses.replace(reading, format="auto")
    return LocalFiles(name, source, reading, source.steps, named)


def _tells_format(file: Path) -> bool:
    """Whether a file's ending says more than the corpus does: enron is mail, but may be given as a table of mails."""
    suffixes = [suffix for suffix in file.suffixes if suffix not in (".gz", ".zst")]
    return bool(suffixes) and suffixes[-1] in (".jsonl", ".csv", ".tsv", ".parquet", ".mbox", ".eml")


def _name_of(path: str) -> str:
    """A short name for a path: the file's or folder's, without endings; for a pattern that of its folder."""
    plain = [part for part in Path(path).parts if not glob.has_magic(part)]
    last = Path(*plain).resolve().name if plain else Path.cwd().name
    name = last.partition(".")[0] or last or "text"
    return name.encode("utf-8", "replace").decode()  # a file's name may be no text
