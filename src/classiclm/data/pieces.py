"""Pieces: what a worker makes of a block of documents, on disk until all blocks are done.

A piece depends on its documents and the settings alone, so it does not matter which process makes it, or how often. It
carries what the whole corpus has to be asked before shards are written: a key for exact duplicates and for the split, a
signature for near-duplicates, and counts of what cleaning did.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from classiclm.data.cleaning import Effects, Step, clean
from classiclm.data.documents import Document
from classiclm.data.duplicates import Near, content_key, signature
from classiclm.data.tokenizer import Tokenizer
from classiclm.data.wordpiece import WordPiece
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import write_file

_BLANK_LINE = "\n\n"  # behind each document, for tokenizers without an end-of-text token


@dataclass(frozen=True)
class Block:
    """Documents that go through cleaning and tokenising together."""

    documents: list[Document]
    number: int  # of the block in its source
    position: Any  # of the source behind them, JSON-able
    n_read: int  # documents of the source up to here
    is_last: bool
    notes: dict[str, int]  # what the reader's policies did meanwhile

    def about(self) -> dict[str, Any]:
        """All but the documents."""
        return {name: value for name, value in vars(self).items() if name != "documents"}


@dataclass(frozen=True)
class Piece:
    """D documents as tokens, in S sequences: a document is one, or for BERT one for each of its sentences."""

    tokens: np.ndarray  # (N,) uint16 or int32
    lengths: np.ndarray  # (S,) int32, tokens of each sequence
    sequences: np.ndarray  # (D,) int32, sequences of each document
    keys: np.ndarray  # (D,) uint64, equal for documents with equal words
    n_chars: np.ndarray  # (D,) int64
    n_bytes: np.ndarray  # (D,) int64, in UTF-8
    signatures: np.ndarray  # (D, n_perm) uint32; (D, 0) unless near-duplicates are asked for
    names: list[str]  # of the documents
    effects: list[Effects]  # of the cleaning steps
    block: dict[str, Any]  # Block.about, with what became of the notes


_ARRAYS = ("tokens", "lengths", "sequences", "keys", "n_chars", "n_bytes", "signatures")


def make_piece(block: Block, steps: Sequence[Step], near: Near | None, tokenizer: Tokenizer) -> Piece:
    """Clean and tokenise a block. Raises Error for a text that the tokenizer cannot encode, naming its document."""
    stream, effects = clean(block.documents, steps)
    documents, sequences, notes = [], [], Counter(block.notes)
    kept = list(stream)
    for document, parts in zip(kept, _encode(kept, tokenizer), strict=True):
        if parts:
            documents.append(document)
            sequences.append(parts)
        else:
            notes["documents without a token"] += 1
    flat = [part for parts in sequences for part in parts]
    texts = [document.text for document in documents]
    return Piece(
        tokens=np.concatenate([*flat, np.empty(0, tokenizer.dtype)]).astype(tokenizer.dtype, copy=False),
        lengths=np.array([len(part) for part in flat], np.int32),
        sequences=np.array([len(parts) for parts in sequences], np.int32),
        keys=np.array([content_key(text) for text in texts], np.uint64),
        n_chars=np.array([len(text) for text in texts], np.int64),
        n_bytes=np.array([len(text.encode()) for text in texts], np.int64),
        signatures=_signatures(texts, near),
        names=[document.name for document in documents],
        effects=effects,
        block={**block.about(), "notes": dict(notes)},
    )


def separator(tokenizer: Tokenizer) -> list[int]:
    """What stands behind each document: the end-of-text token, else a blank line."""
    return tokenizer.encode(_BLANK_LINE) if tokenizer.end_of_text is None else [tokenizer.end_of_text]


def _encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[np.ndarray]]:
    """The sequences of each document: for BERT its lines, without special tokens; else itself and the separator."""
    try:
        if isinstance(tokenizer, WordPiece):
            lines = ([line.strip() for line in document.text.split("\n")] for document in documents)
            encoded = (tokenizer.encode_documents([line for line in part if line]) for part in lines)
            return [[sentence for sentence in part if len(sentence)] for part in encoded]
        end: np.ndarray = np.array(separator(tokenizer), tokenizer.dtype)
        return [[np.append(part, end)] for part in tokenizer.encode_documents([d.text for d in documents])]
    except Error as e:
        raise _named(documents, tokenizer, e) from e


def _named(documents: Sequence[Document], tokenizer: Tokenizer, e: Error) -> Error:
    """The error with the document over which it was raised, found by trying each."""
    for document in documents:
        try:
            tokenizer.encode(document.text)
        except Error as own:
            return Error(f"{document.name}: {own.what}", own.why, own.fix, own.code)
    return e


def _signatures(texts: Sequence[str], near: Near | None) -> np.ndarray:
    rows = [] if near is None else [signature(text, near) for text in texts]
    return np.stack(rows) if rows else np.empty((len(texts), 0), np.uint32)


def write_piece(path: Path, piece: Piece) -> None:
    """Write a piece, whole or not at all. Raises Error (exit 4)."""
    about = {
        "names": piece.names,
        "effects": [effects.to_json() for effects in piece.effects],
        "block": piece.block,
    }
    text = json.dumps(about, ensure_ascii=True)  # odd file names are escaped
    write_file(path, save({name: getattr(piece, name) for name in _ARRAYS}, {"about": text}))


def read_piece(path: Path, names: Sequence[str] = _ARRAYS) -> dict[str, Any]:
    """The named arrays of a piece, and `about`: names, effects, block. Raises Error (exit 3)."""
    try:
        with safe_open(path, "np") as file:
            about = json.loads(file.metadata()["about"])
            return {"about": about, **{name: file.get_tensor(name) for name in names}}
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
        fix = f"delete {path}; the same command makes it again"
        raise Error(path, f"is a damaged piece of work ({e})", fix, BAD_INPUT) from e
