"""Texts and sentence pairs by name or path: what there is, and where it comes from.

A string with a separator in it is a path (a text file, a folder of .txt and .md files, or a pattern such as
"./letters/*.txt"), else a name. Files that hold many documents (.jsonl, .csv, .parquet, .mbox ...) are read as
readers.py says, each record as a document. A folder with files like train.de and train.en is a corpus of sentence
pairs: line n of one file is the translation of line n of the other.
"""

import glob
import gzip
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from classiclm.config import PositiveFloat, Rate
from classiclm.data import plays
from classiclm.data.locate import Download, find, locate
from classiclm.data.opening import Notes, ending_of
from classiclm.data.readers import FORMATS, Reading, read_file
from classiclm.errors import BAD_INPUT, USAGE, Error, did_you_mean
from classiclm.files import is_path

SHAKESPEARE = Download(
    "shakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
# Multi30k, task 1, raw (Elliott et al. 2016): 29,000, 1,014 and 1,000 captions of pictures.
MULTI30K = tuple(
    Download(
        f"multi30k/{name}.gz",
        f"https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/{name}.gz",
        sha256,
    )
    for name, sha256 in {
        "train.de": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
        "train.en": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
        "val.de": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
        "val.en": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
        "test_2016_flickr.de": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
        "test_2016_flickr.en": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
    }.items()
)
PLAYS_CHARACTERS = 1_000_000
PLAYS_SEED = 1
NAMES = ("multi30k", "plays", "shakespeare")
_TEXT_ENDINGS = (".txt", ".md")
# train.de, val.en.gz, test_2016_flickr.pt-br: a split, a language of two or three letters, maybe a region.
_LANGUAGE = r"\.(?!txt|md|gz)([A-Za-z]{2,3}(?:[-_]\w+)?)(\.gz)?"
_PAIR_FILE = re.compile(rf"(train|val|test.*){_LANGUAGE}")
_OTHER_SPLIT = re.compile(rf"(valid\w*|dev\w*){_LANGUAGE}")  # what others call val

# How windows for a causal model treat documents:
# joined: they are cut out of the text as it stands, and a document may look at the ones before it in its window;
# masked: the same windows, but attention and positions stay inside a document;
# packed: likewise, and windows are made of whole documents (packing.py).
Documents = Literal["joined", "masked", "packed"]

_Files = dict[str, dict[str, Path]]  # split -> language -> file


@dataclass(frozen=True)
class Data:
    """The text to learn from."""

    SHORTHAND: ClassVar[str] = "name"

    name: str = "shakespeare"  # shakespeare, plays, multi30k, a text file, a folder, or a pattern like './*.txt'
    val_share: Annotated[Rate, Field(gt=0)] = 0.1  # the last part of the text, kept for validation
    errors: Literal["strict", "replace"] = "strict"  # what to do with bytes that are not UTF-8
    source: str | None = None  # language to translate from, of a corpus of sentence pairs, as in de
    target: str | None = None  # language to translate into, as in en
    weights: tuple[PositiveFloat, ...] | None = None  # of a prepared dataset's sources; null = as it was prepared
    documents: Documents = "joined"  # joined: windows run across them; masked: attention stays in each; packed: whole


@dataclass(frozen=True)
class SentencePairs:
    """The sentence pairs of one split, and how many were left out because a side is empty."""

    pairs: list[tuple[str, str]]
    n_empty: int


def read_documents(data: Data) -> list[str]:
    """The texts of a corpus: one per file, or per record of files that hold many.

    Raises Error: exit 2 for an unknown name, 3 for what cannot be read or is a corpus of sentence pairs.
    """
    if data.name == "plays":
        return [plays.generate(PLAYS_CHARACTERS, PLAYS_SEED)]
    if data.name == "shakespeare":
        return [_read(locate(SHAKESPEARE), data.errors)]
    if is_pair_corpus(data.name):
        fix = "train transformer2017-multi30k on it, or name a text"
        raise Error(data.name, "is a corpus of sentence pairs", fix, BAD_INPUT)
    if data.source or data.target:
        raise Error("data.source, data.target", "are for a corpus of sentence pairs", "leave them out", USAGE)
    if not is_path(data.name):
        raise _unknown(data.name)
    return _read_path(Path(data.name), data.errors)


def read_pairs(data: Data) -> dict[str, list[tuple[str, str]]]:
    """The (source, target) sentences of each split of a pair corpus: train, val, and those whose names begin with test.

    Without val files, the last val_share of the training pairs are val. White space around a sentence is left out, and
    so are pairs with an empty side. Raises Error: exit 2 for an unknown name or direction; 3 for a corpus that is no
    pair corpus, files that cannot be read, and files with unequal numbers of lines.
    """
    return {name: split.pairs for name, split in read_sentences(data).items()}


def read_sentences(data: Data) -> dict[str, SentencePairs]:
    """As `read_pairs`, with the number of pairs that were left out."""
    files = _files_of(data)
    source, target = _direction(data, files)
    splits = {}
    for name, sides in files.items():
        for_others = len(sides) > 1 and name.startswith("test") and not {source, target} <= set(sides)
        if {source, target} & set(sides) and not for_others:  # a test of two other languages is none of this direction
            splits[name] = _read_two(data, name, sides, source, target)
    if "train" not in splits:
        fix = f"add train.{source} and train.{target}"
        raise Error(data.name, f"has no training pairs from {source} to {target}", fix, BAD_INPUT)
    if "val" not in splits:
        splits |= _cut(data, splits["train"])
    return splits


def is_pair_corpus(name: str) -> bool:
    """Whether a name or path stands for sentence pairs. Raises Error (exit 3) for a folder of pairs that is none."""
    return name == "multi30k" or (is_path(name) and bool(_pair_files(Path(name))))


def default_corpus() -> str:
    """shakespeare if it is on this machine, else plays, which the package makes by itself."""
    return "shakespeare" if find(SHAKESPEARE) else "plays"


def entropy_floor(name: str) -> float | None:
    """Nats per character that no model can go below, where that is known exactly."""
    return plays.entropy_per_char() if name == "plays" else None


def _unknown(name: str) -> Error:
    hint = f"write ./{name} for the path" if Path(name).exists() else did_you_mean(name, NAMES)
    return Error(name, "is no named corpus", hint, USAGE)


def _files_of(data: Data) -> _Files:
    if data.name == "multi30k":
        return _by_split([locate(file) for file in MULTI30K])
    if data.name not in NAMES and not is_path(data.name):
        raise _unknown(data.name)
    if is_path(data.name) and not glob.has_magic(data.name) and not Path(data.name).exists():
        raise Error(data.name, "does not exist", "name multi30k or a folder with sentence pairs", BAD_INPUT)
    files = _pair_files(Path(data.name)) if is_path(data.name) else {}
    if not files:
        fix = "name multi30k, or a folder with train.de, train.en, val.de, val.en"
        raise Error(data.name, "has no sentence pairs", fix, BAD_INPUT)
    return files


def _pair_files(folder: Path) -> _Files:
    """The files of a pair corpus; none if no split is there in two languages."""
    paths = sorted(path for path in folder.glob("*") if path.is_file()) if folder.is_dir() else []
    files = _by_split(paths)
    if not any(len(sides) > 1 for sides in files.values()):
        return {}
    for path in paths:
        if _OTHER_SPLIT.fullmatch(path.name):
            raise Error(path, "belongs to no split", "rename it to val, train or test", BAD_INPUT)
    return files


def _by_split(paths: Sequence[Path]) -> _Files:
    files: _Files = {}
    for path in paths:
        match = _PAIR_FILE.fullmatch(path.name)
        if match is None:
            continue
        sides = files.setdefault(match[1], {})
        if match[2] in sides:
            raise Error(path, f"is there twice, also as {sides[match[2]].name}", "remove one of them", BAD_INPUT)
        sides[match[2]] = path
    return files


def _direction(data: Data, files: Mapping[str, Mapping[str, Path]]) -> tuple[str, str]:
    """From which language into which: as asked; the one of two that is left; for multi30k from German into English."""
    present = sorted({language for sides in files.values() for language in sides})
    source, target = data.source, data.target
    if data.name == "multi30k" and source is None and target is None:
        source, target = "de", "en"
    if len(present) == 2 and (source in present) != (target in present):
        source = source or next(language for language in present if language != target)
        target = target or next(language for language in present if language != source)
    if source is None or target is None or source == target or not {source, target} <= set(present):
        asked = f" Not from {source} to {target}:" if source and target else ""
        why = f"which way?{asked} there are {', '.join(present)}"
        raise Error(data.name, why, f"pass --data.source {present[0]} --data.target {present[1]}", USAGE)
    return source, target


def _read_two(data: Data, split: str, sides: Mapping[str, Path], source: str, target: str) -> SentencePairs:
    if not (source in sides and target in sides):
        there, missing = (source, target) if source in sides else (target, source)
        raise Error(sides[there], f"has no {split}.{missing} beside it", f"add {split}.{missing}", BAD_INPUT)
    a, b = (_lines(sides[language], data.errors) for language in (source, target))
    if len(a) != len(b):
        why = f"has {len(a)} lines and {sides[target].name} has {len(b)}"
        raise Error(sides[source], why, "give files whose lines are translations of each other", BAD_INPUT)
    pairs = [pair for pair in zip(a, b, strict=True) if all(pair)]
    if not pairs:
        raise Error(sides[source], f"and {sides[target].name} have no sentences", "give files with text", BAD_INPUT)
    return SentencePairs(pairs, len(a) - len(pairs))


def _lines(path: Path, errors: str) -> list[str]:
    text = _read(path, errors)
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []  # not at U+2028 and its like


def _cut(data: Data, train: SentencePairs) -> dict[str, SentencePairs]:
    """Training pairs and the last val_share of them as validation pairs."""
    position = int(len(train.pairs) * (1 - data.val_share))
    if not 0 < position < len(train.pairs):
        why = f"has {len(train.pairs)} training pairs, too few to keep some for validation"
        raise Error(data.name, why, "give more pairs, or files named val", BAD_INPUT)
    return {
        "train": SentencePairs(train.pairs[:position], train.n_empty),
        "val": SentencePairs(train.pairs[position:], 0),
    }


def _read_path(path: Path, errors: Literal["strict", "replace"]) -> list[str]:
    return [text for file in _files_at(path) for text in _texts(file, errors)]


def _files_at(path: Path) -> list[Path]:
    """A file; or those of a pattern; or a folder's .txt and .md files, or if it has none, those that hold records."""
    if any(sign in str(path) for sign in "*?[") and not path.exists():
        files = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not files:
            raise Error(path, "matches no file", "correct the pattern; in a shell, put it in quotes", BAD_INPUT)
        return files
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        files = [file for file in inside if file.suffix.lower() in _TEXT_ENDINGS] or list(filter(_has_records, inside))
        if not files:
            raise Error(path, "has no .txt or .md file", "name a folder with text files", BAD_INPUT)
        return files
    return [path]


def _has_records(path: Path) -> bool:
    """Whether a file is for readers.py: many documents in one, mail, or zstd."""
    format = FORMATS.get(ending_of(path))
    return format is not None and (format != "text" or path.suffix.lower() == ".zst")


def _texts(path: Path, errors: Literal["strict", "replace"]) -> list[str]:
    """The documents of a file. Raises Error (exit 3)."""
    if not _has_records(path):
        return [_read(path, errors)]
    try:
        return [document.text for document in read_file(path, Reading(errors=errors), path.name, Notes())]
    except Error as e:
        if "--" not in e.fix:  # a flag of `prepare`
            raise
        fix = "pass --data.errors replace, or run `classiclm prepare` on it, which can leave documents out"
        if "column" in e.why:
            fix = f"run `classiclm prepare` on it: {e.fix}"
        raise Error(e.what, e.why, fix, e.code) from e


def _read(path: Path, errors: str) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise Error(path, f"is damaged ({e})", "replace it by a whole .gz file", BAD_INPUT) from e
    except OSError as e:
        raise Error(path, e.strerror or "cannot be read", "name a text file that exists", BAD_INPUT) from e
    if b"\0" in raw[:8192]:
        raise Error(path, "is a binary file", "name a text file", BAD_INPUT)
    try:
        return raw.decode("utf-8-sig", errors=errors)
    except UnicodeDecodeError as e:
        fix = "convert it to UTF-8, or pass --data.errors replace"
        raise Error(path, f"is not UTF-8 at byte {e.start}", fix, BAD_INPUT) from e
