"""Corpora -> token shards, in two stages.

Map: blocks of documents are cleaned and tokenised, each by itself, in as many processes as there are cores; each leaves
a piece in OUT/.pieces. Reduce, in one process and in the documents' order: duplicates go, each document goes to
training or validation by its content, shards are written, meta.json last of all.

What is in a block depends on the sources alone, what is in a piece on the block, and what is in the shards on the
pieces. So nothing that is killed and started again can come out differently: it only finds more pieces there.
"""

import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from classiclm.data.cleaning import DUPLICATE_STEPS, Cleaning, Step, make_steps
from classiclm.data.documents import Document
from classiclm.data.duplicates import Near, content_key
from classiclm.data.pieces import Block, read_piece
from classiclm.data.readers import Notes
from classiclm.data.sources import Origin
from classiclm.data.tokenizer import Tokenizer
from classiclm.data.tokenizers import from_json, is_learnt, make_tokenizer
from classiclm.data.workers import Pool
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import make_folder, write_file

BLOCK_CHARS = 4 << 20  # characters of text that a worker gets at once
LEARNT_FROM = 32 << 20  # characters that a tokenizer is learnt from at most
_SAY_EVERY = 10.0  # seconds
_ORIGINS = "origins.json"


@dataclass(frozen=True)
class Job:
    """What to prepare, and how."""

    origins: tuple[Origin, ...]
    out: Path
    tokenizer: str  # a name or a path, as in `make_tokenizer`
    cleaning: Cleaning
    near: Near
    weights: tuple[float, ...] | None  # of the origins in training; None = as much as there is of each
    val_share: float  # of the documents, for validation
    shard_tokens: int
    workers: int
    limit: int | None  # documents to take of each origin; None = all

    @property
    def pieces(self) -> Path:
        """Where the work of the map stage is kept until the end."""
        return self.out / ".pieces"

    def steps(self, origin: Origin) -> list[Step]:
        """The cleaning steps of an origin that look at one document at a time."""
        return make_steps([name for name in origin.steps if name not in DUPLICATE_STEPS], self.cleaning)

    def near_of(self, origin: Origin) -> Near | None:
        """The settings of near-duplicates, None if the origin does not ask for them."""
        return self.near if "near" in origin.steps else None


Say = Callable[[str], None]


def first_training_key(val_share: float) -> int:
    """Documents with a smaller key are for validation: their content decides, so an equal document goes to the same
    split, here and in any other run."""
    return int(val_share * (1 << 64))


def map_stage(job: Job, say: Say) -> Tokenizer:
    """Make all pieces that are not there yet; returns the tokenizer.

    Raises Error: exit 3 for input that cannot be read or is not what it was when the work began, 4 if a worker dies.
    """
    make_folder(job.pieces)
    _check_origins(job)
    tokenizer = _tokenizer(job, say)
    progress = _Progress(say)
    with Pool(job.workers, tokenizer, job.pieces / "tokenizer.json") as pool:
        for i, origin, block in _missing(job):
            pool.submit(piece_path(job, i, block.number), block, job.steps(origin), job.near_of(origin))
            progress.add(origin.name, block)
    return tokenizer


def piece_path(job: Job, origin: int, block: int) -> Path:
    """The file of one piece."""
    return job.pieces / f"{origin:03d}-{block:07d}.safetensors"


def piece_paths(job: Job, origin: int) -> list[Path]:
    """All pieces of one origin, in the order of its documents."""
    return sorted(job.pieces.glob(f"{origin:03d}-*.safetensors"))


def saved_origins(job: Job) -> list[dict[str, Any]]:
    """What each source was when the work began."""
    return json.loads((job.pieces / _ORIGINS).read_text(encoding="utf-8"))


def _check_origins(job: Job) -> None:
    """Keep what the sources are, and compare with what they were when the work began."""
    path = job.pieces / _ORIGINS
    text = json.dumps([origin.describe() for origin in job.origins], indent=1)
    if not path.is_file():
        write_file(path, text.encode())
    elif path.read_text(encoding="utf-8") != text:
        fix = "restore the sources as they were, or choose another --out"
        raise Error(job.out, "was begun with other content of the sources", fix, BAD_INPUT)


def _tokenizer(job: Job, say: Say) -> Tokenizer:
    """The tokenizer, learnt from the training documents if it is one to be learnt; kept for the next start."""
    path = job.pieces / "tokenizer.json"
    if path.is_file():
        return from_json(path.read_text(encoding="utf-8"), path)
    text = ""
    if is_learnt(job.tokenizer):
        say(f"learning {job.tokenizer} from the first documents of each source")
        texts = _texts_to_learn_from(job)
        text = "".join(sorted(_alphabet(texts))) if job.tokenizer == "char" else "\n\n".join(texts)
    tokenizer = make_tokenizer(job.tokenizer, text)
    write_file(path, tokenizer.to_json().encode())
    return tokenizer


def _alphabet(texts: Iterable[str]) -> set[str]:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    return characters


def _texts_to_learn_from(job: Job) -> Iterator[str]:
    """Cleaned training documents from the start of each origin, in the weights' proportion; all texts for `char`, whose
    alphabet has to hold every character."""
    weights = job.weights or (1.0,) * len(job.origins)
    for origin, weight in zip(job.origins, weights, strict=True):
        documents = itertools.islice(origin.read(None, Notes()), job.limit)
        texts = (_cleaned(document.text, job.steps(origin)) for document, _ in documents)
        if job.tokenizer == "char":
            yield from (text + "\n" for text in texts)
        else:
            yield from _first(texts, LEARNT_FROM * weight / sum(weights), first_training_key(job.val_share))


def _first(texts: Iterable[str], n_chars: float, first_key: int) -> Iterator[str]:
    """Training texts until there are so many characters."""
    for text in texts:
        if n_chars <= 0:
            return
        if text and content_key(text) >= first_key:
            yield text
            n_chars -= len(text)


def _cleaned(text: str, steps: Sequence[Step]) -> str:
    """The text behind all steps, empty if one of them removes it."""
    for step in steps:
        edited = step.edit(text)
        if not isinstance(edited, str):
            return ""
        text = edited
    return text


def _missing(job: Job) -> Iterator[tuple[int, Origin, Block]]:
    """The blocks of all origins whose pieces are not there."""
    for i, origin in enumerate(job.origins):
        for block in _blocks(origin, _begun(job, i), job.limit):
            if not piece_path(job, i, block.number).is_file():
                yield i, origin, block


def _begun(job: Job, i: int) -> Block | None:
    """The last of the first blocks of an origin whose pieces are there, without its documents."""
    last = None
    for number in itertools.count():
        path = piece_path(job, i, number)
        if not path.is_file():
            return last
        last = Block([], **read_piece(path, ())["about"]["block"])
    return None


def _blocks(origin: Origin, last: Block | None, limit: int | None) -> Iterator[Block]:
    """Documents in order, BLOCK_CHARS characters at a time, behind the block `last`; the final one may have none."""
    if last is not None and last.is_last:
        return
    number, position, n_read = (last.number + 1, last.position, last.n_read) if last else (0, None, 0)
    notes, seen = Notes(), Counter[str]()
    documents: list[Document] = []
    size, start = 0, position
    for document, position in itertools.islice(origin.read(start, notes), None if limit is None else limit - n_read):
        documents.append(document)
        size, n_read = size + len(document.text), n_read + 1
        if size >= BLOCK_CHARS:
            yield Block(documents, number, position, n_read, False, dict(notes.counts - seen))
            documents, size, seen, number = [], 0, Counter(notes.counts), number + 1
    yield Block(documents, number, position, n_read, True, dict(notes.counts - seen))


class _Progress:
    """Says every few seconds how far reading is."""

    def __init__(self, say: Say):
        self._say, self._began = say, time.monotonic()
        self._next, self._chars, self._documents = self._began + _SAY_EVERY, 0, 0

    def add(self, name: str, block: Block) -> None:
        self._chars += sum(len(document.text) for document in block.documents)
        self._documents += len(block.documents)
        now = time.monotonic()
        if now >= self._next:
            speed = self._chars / 1e6 / (now - self._began)
            self._say(f"{name}: {self._documents:,} documents, {self._chars / 1e6:,.0f} M characters, {speed:.1f} M/s")
            self._next = now + _SAY_EVERY


def remove_pieces(job: Job) -> None:
    """Delete the work of the map stage: the shards hold it all."""
    shutil.rmtree(job.pieces, ignore_errors=True)
