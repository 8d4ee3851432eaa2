"""Pieces -> shards: the second stage of `prepare`, in one process and in the documents' order.

First all keys are looked at: a document whose words came before goes, and what is left is split by its key. Then the
pieces are read once more, for training and for validation, and their tokens written to shards.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from classiclm.data.cleaning import Effects
from classiclm.data.dataset_meta import SPLITS, shard_stem
from classiclm.data.documents import Document
from classiclm.data.duplicates import EXACT, NEAR, NearIndex
from classiclm.data.pieces import read_piece
from classiclm.data.prepare import Job, Say, first_training_key, piece_paths
from classiclm.data.shards import write_shard
from classiclm.data.tokenizer import Tokenizer
from classiclm.data.wordpiece import WordPiece
from classiclm.errors import BAD_INPUT, Error


@dataclass
class Corpus:
    """One origin's pieces, and what becomes of each of their documents."""

    name: str
    pieces: list[Path]
    ends: np.ndarray  # documents up to the end of each piece
    keys: np.ndarray  # (D,) uint64
    kept: np.ndarray  # (D,) bool
    effects: list[Effects]
    notes: dict[str, int]
    val: np.ndarray = field(default_factory=lambda: np.empty(0, bool))  # (D,)

    def chosen(self, piece: int, split: str) -> np.ndarray:
        """Which documents of a piece belong to a split."""
        here = slice(int(self.ends[piece - 1]) if piece else 0, int(self.ends[piece]))
        return self.kept[here] & (self.val[here] if split == "val" else ~self.val[here])


def reduce_stage(job: Job, tokenizer: Tokenizer, say: Say) -> tuple[list[Corpus], list[dict[str, Any]]]:
    """Drop duplicates, split, write the shards; the corpora and what meta.json says of each shard.

    Raises Error (exit 3) if a source has too few documents for both splits.
    """
    corpora = [_read_corpus(job, i) for i in range(len(job.origins))]
    _drop_exact(job, corpora, tokenizer)
    _drop_near(job, corpora, tokenizer, say)
    # A masked model takes a segment that does not follow another from another document.
    _split(job, corpora, fewest=2 if isinstance(tokenizer, WordPiece) else 1)
    return corpora, list(_shards(job, corpora))


def _read_corpus(job: Job, i: int) -> Corpus:
    paths, keys, notes = piece_paths(job, i), [], Counter[str]()
    effects = [Effects(step.name) for step in job.steps(job.origins[i])]
    for path in paths:
        piece = read_piece(path, ["keys"])
        keys.append(piece["keys"])
        notes.update(piece["about"]["block"]["notes"])
        for total, part in zip(effects, piece["about"]["effects"], strict=True):
            total.merge(Effects.from_json(part))
    joined = np.concatenate(keys)
    ends = np.cumsum([len(part) for part in keys])
    return Corpus(job.origins[i].name, paths, ends, joined, np.ones(len(joined), bool), effects, dict(notes))


def _drop_exact(job: Job, corpora: Sequence[Corpus], tokenizer: Tokenizer) -> None:
    """A document goes if one with the same key came before, in its own or an earlier corpus that asks for this step."""
    asking = [i for i, origin in enumerate(job.origins) if "exact" in origin.steps]
    if not asking:
        return
    keys = np.concatenate([corpora[i].keys for i in asking])
    firsts = np.unique(keys, return_index=True)[1]
    kept = np.zeros(len(keys), bool)
    kept[firsts] = True
    start = 0
    for i in asking:
        corpus = corpora[i]
        corpus.kept &= kept[start : start + len(corpus.keys)]
        start += len(corpus.keys)
        gone, everything = np.flatnonzero(~corpus.kept), np.ones(len(corpus.keys), bool)
        _count_removed(
            corpus, gone, Effects("exact"), EXACT, _first_with(corpora, gone[:1], corpus), tokenizer, everything
        )


def _drop_near(job: Job, corpora: Sequence[Corpus], tokenizer: Tokenizer, say: Say) -> None:
    """A document goes if it is nearly the same as one that stays, of the corpora that ask for this step."""
    index = NearIndex(job.near)
    for origin, corpus in zip(job.origins, corpora, strict=True):
        if "near" not in origin.steps:
            continue
        found = [_near_in_piece(corpus, j, index) for j in range(len(corpus.pieces))]
        gone = np.array([number for part in found for number in part], np.int64)
        original = next((name for part in found for name in part.values()), "")
        before = corpus.kept.copy()
        corpus.kept[gone] = False
        _count_removed(corpus, gone, Effects("near"), NEAR, original, tokenizer, before)
        say(f"{corpus.name}: {len(gone):,} of {before.sum():,} documents are near-duplicates")


def _near_in_piece(corpus: Corpus, j: int, index: NearIndex) -> dict[int, str]:
    """The near-duplicates among the documents of a piece that are left, each with the name of what it is like."""
    piece = read_piece(corpus.pieces[j], ["signatures"])
    first = int(corpus.ends[j - 1]) if j else 0
    left = np.flatnonzero(corpus.kept[first : corpus.ends[j]])
    names = [f"{corpus.name}: {name}" for name in piece["about"]["names"]]
    found = {first + int(k): index.add(names[k], piece["signatures"][k]) for k in left}
    return {number: name for number, name in found.items() if name is not None}


def _first_with(corpora: Sequence[Corpus], number: np.ndarray, corpus: Corpus) -> str:
    """Corpus and name of the first document with the same key as this one; empty for no document."""
    for other in corpora if len(number) else ():
        same = np.flatnonzero(other.keys == corpus.keys[number])
        if len(same):
            piece, k = _place(other, int(same[0]))
            return f"{other.name}: {read_piece(piece, ())['about']['names'][k]}"
    return ""


def _count_removed(
    corpus: Corpus,
    gone: np.ndarray,
    effects: Effects,
    reason: str,
    original: str,
    tokenizer: Tokenizer,
    before: np.ndarray,
) -> None:
    """Count what a step did that removed the documents `gone` of those in `before`; the first is its example."""
    chars = np.concatenate([read_piece(path, ["n_chars"])["n_chars"] for path in corpus.pieces])
    if len(gone):
        effects.remove(_document(corpus, int(gone[0]), tokenizer), reason, original)
        effects.removed[reason] = len(gone)
    effects.documents_in, effects.characters_in = int(before.sum()), int(chars[before].sum())
    effects.documents_out = effects.documents_in - len(gone)
    effects.characters_out = effects.characters_in - int(chars[gone].sum())
    corpus.effects.append(effects)


def _place(corpus: Corpus, number: int) -> tuple[Path, int]:
    """The piece that a document is in, and its place there."""
    i = int(np.searchsorted(corpus.ends, number, side="right"))
    return corpus.pieces[i], number - (int(corpus.ends[i - 1]) if i else 0)


def _document(corpus: Corpus, number: int, tokenizer: Tokenizer) -> Document:
    """A document by its number, with the text that its tokens stand for."""
    path, k = _place(corpus, number)
    piece = read_piece(path)
    ends = _document_ends(piece)
    start = int(ends[k - 1]) if k else 0
    return Document(tokenizer.decode(piece["tokens"][start : ends[k]].tolist()), piece["about"]["names"][k])


def _document_ends(piece: dict[str, Any]) -> np.ndarray:
    """(D,) where each document of a piece ends in its tokens."""
    return np.cumsum(piece["lengths"], dtype=np.int64)[np.cumsum(piece["sequences"]) - 1]


def _split(job: Job, corpora: Sequence[Corpus], fewest: int) -> None:
    """By key, the same in all corpora; each split of each corpus gets `fewest` different documents at least.

    In a small corpus, where the keys alone may leave fewer, those with the smallest are for validation, or those with
    the largest for training. Raises Error (exit 3) if there are too few for both.
    """
    border = np.uint64(first_training_key(job.val_share))
    to_val, to_train = (np.empty(0, np.uint64), np.empty(0, np.uint64))
    for corpus in corpora:
        keys = np.unique(corpus.keys[corpus.kept])  # sorted
        _check_enough(corpus, len(keys), 2 * fewest)
        n_val = int((keys < border).sum())
        to_val = np.append(to_val, keys[:fewest] if n_val < fewest else [])
        to_train = np.append(to_train, keys[-fewest:] if len(keys) - n_val < fewest else [])
    for corpus in corpora:
        corpus.val = ((corpus.keys < border) | np.isin(corpus.keys, to_val)) & ~np.isin(corpus.keys, to_train)
        for part in (corpus.val, ~corpus.val):  # another corpus may have claimed what this one needs
            _check_enough(corpus, len(np.unique(corpus.keys[corpus.kept & part])), fewest)


def _check_enough(corpus: Corpus, n: int, needed: int) -> None:
    if n < needed:
        why = f"has {n} different documents after cleaning, where a training and a validation split need {needed}"
        fix = "give more text; or cut text files into more documents, as with --documents block"
        raise Error(corpus.name, why, fix, BAD_INPUT)


def _shards(job: Job, corpora: Sequence[Corpus]) -> Iterator[dict[str, Any]]:
    """Write all shards in order, as what meta.json says of them."""
    for split in SPLITS:
        number = 0
        for corpus in corpora:
            for parts in _portions(corpus, split, job.shard_tokens):
                yield _write(job.out, shard_stem(split, number), split, corpus.name, parts)
                number += 1


def _portions(corpus: Corpus, split: str, shard_tokens: int) -> Iterator[list[dict[str, np.ndarray]]]:
    """The chosen documents of successive pieces, as many together as make a shard."""
    parts: list[dict[str, np.ndarray]] = []
    size = 0
    for i, path in enumerate(corpus.pieces):
        part = _chosen(read_piece(path), corpus.chosen(i, split))
        parts.append(part)
        size += len(part["tokens"])
        if size >= shard_tokens:
            yield parts
            parts, size = [], 0
    if size:
        yield parts


def _chosen(piece: dict[str, Any], chosen: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a piece for some of its documents."""
    of_sequences = np.repeat(chosen, piece["sequences"])
    of_tokens = np.repeat(of_sequences, piece["lengths"])
    return {
        "tokens": piece["tokens"][of_tokens],
        "lengths": piece["lengths"][of_sequences],
        **{name: piece[name][chosen] for name in ("sequences", "n_chars", "n_bytes")},
    }


def _write(out: Path, stem: str, split: str, source: str, parts: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """One shard, and its entry in meta.json."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    parts.clear()  # a shard is large: no longer twice in memory than for this
    documents = np.cumsum(joined["sequences"], dtype=np.int64)
    about = write_shard(out, stem, joined["tokens"], joined["lengths"], np.concatenate([[0], documents]))
    sizes = {"text_bytes": int(joined["n_bytes"].sum()), "chars": int(joined["n_chars"].sum())}
    return {**about, "split": split, "source": source, **sizes}
