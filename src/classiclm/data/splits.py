"""Text -> a training and a validation split of token ids, and what is needed to name and compare them."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from classiclm.data.corpora import Data, Documents, read_documents
from classiclm.data.dataset import Dataset, is_dataset, open_dataset
from classiclm.data.tokenizers import Tokenizer, make_tokenizer
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.files import is_path

_DOCUMENT_BREAK = "\n\n"  # between files, for tokenizers without an end-of-text token


@dataclass(frozen=True)
class Split:
    """The token ids of one split, how much text they stand for, and a sum that names them."""

    tokens: Any  # (N,) an array, or `Tokens` on disk
    n_chars: int  # of the text behind tokens[1:], the ones that are predicted
    n_bytes: int  # likewise, in UTF-8
    fingerprint: str  # sha256 of the tokens and the tokenizer
    document_ends: np.ndarray | None = None  # (D,) int64, ascending; None where the tokens do not tell them
    ranges: tuple[tuple[str, int, int, float], ...] = ()  # a mixture: source, first token, end, weight


def n_targets(split: Split, documents: Documents) -> int:
    """How many tokens of a split are predicted if all of it is measured: all but the first, or all but the first of
    each document if windows keep documents apart."""
    apart = documents != "joined" and split.document_ends is not None
    return len(split.tokens) - (len(split.document_ends) if apart and split.document_ends is not None else 1)


@dataclass(frozen=True)
class TextData:
    """A corpus, cut in two and tokenised."""

    name: str
    tokenizer: Tokenizer
    train: Split
    val: Split
    documents: Documents = "joined"  # how windows treat them

    def split(self, name: str) -> Split:
        """The split by name. Raises Error (exit 2)."""
        if name not in ("train", "val"):
            raise Error(name, "is no split", "choose from train, val")
        return self.train if name == "train" else self.val


def prepare_text(data: Data, tokenizer: str | Tokenizer) -> TextData:
    """Read, cut, learn the tokenizer from the training part if it is one to be learnt, encode.

    The cut is at a character: the first 1 - val_share of the text is for training. A dataset of `classiclm prepare` is
    cut and tokenised already; a tokenizer's name has no say in it. Raises Error: exit 3 if there is too little text to
    fill both splits, or a dataset is damaged; exit 2 for a dataset of another tokenizer's tokens.
    """
    if is_prepared(data.name):
        return _of_dataset(data, open_for(data, tokenizer, "documents"))
    if data.weights is not None:
        raise Error("data.weights", "are for a dataset of several sources", "leave them out, or run classiclm prepare")
    documents = [text for text in read_documents(data) if text]
    n_chars = sum(map(len, documents))
    train, val = _cut(documents, int(n_chars * (1 - data.val_share)))
    too_short = Error(data.name, f"has only {n_chars} characters", "give more text", BAD_INPUT)
    if not train or not val:
        raise too_short
    if isinstance(tokenizer, str):
        # An alphabet is no parameter to be fitted: the validation text's characters belong to it, as in every
        # published character-level result, or that text could not be encoded at all.
        source = documents if tokenizer == "char" else train
        tokenizer = make_tokenizer(tokenizer, _DOCUMENT_BREAK.join(source))
    splits = [_encode(part, tokenizer) for part in (train, val)]
    if min(split.n_bytes for split in splits) < 1:  # nothing to predict
        raise too_short
    return TextData(data.name, tokenizer, splits[0], splits[1], data.documents)


def is_prepared(name: str) -> bool:
    """Whether a corpus is a dataset that `classiclm prepare` has written."""
    return is_path(name) and is_dataset(Path(name))


def open_for(data: Data, tokenizer: str | Tokenizer, sequences: str) -> Dataset:
    """The dataset in data.name, checked to be cut as it is needed: in "documents", or for masked models "sentences".

    Raises Error: exit 2 for one that is cut otherwise or by another tokenizer than the given one, 3 for a damaged one.
    """
    dataset = open_dataset(data.name)
    if dataset.meta.sequences != sequences:
        why = f"was cut into {dataset.meta.sequences}, and this model learns from {sequences}"
        fix = "prepare it with --tokenizer bert for masked models, with gpt2 or bpe-N for the others"
        raise Error(data.name, why, fix, USAGE)
    if isinstance(tokenizer, Tokenizer) and tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        why = "holds another tokenizer's tokens than this model knows"
        raise Error(data.name, why, "prepare the text again with --tokenizer RUN, the model's folder", USAGE)
    return dataset


def _of_dataset(data: Data, dataset: Dataset) -> TextData:
    weights = _weights(data, dataset)
    train, val = (_of_shards(dataset, name, weights) for name in ("train", "val"))
    return TextData(data.name, dataset.tokenizer, train, val, data.documents)


def _weights(data: Data, dataset: Dataset) -> dict[str, float] | None:
    """The weight of each source in training, as asked or as prepared; None = all there is of each, once an epoch."""
    if data.weights is None:
        return dataset.meta.weights
    names = [source.name for source in dataset.meta.sources]
    if len(data.weights) != len(names):
        why = f"are {len(data.weights)}, and the dataset has {len(names)} sources"
        raise Error("data.weights", why, f"give one for each of {', '.join(names)}")
    return dict(zip(names, data.weights, strict=True))


def _of_shards(dataset: Dataset, name: str, weights: dict[str, float] | None) -> Split:
    shards = dataset.split(name)
    first = dataset.tokenizer.decode(shards.tokens[:1].tolist())
    ranges = tuple((source, a, b, weights[source]) for source, a, b in shards.sources) if weights else ()
    mixed = [f"{source} {weight!r}" for source, _, _, weight in ranges]
    fingerprint = hashlib.sha256(" ".join([shards.fingerprint, *mixed]).encode()).hexdigest()
    n_chars, n_bytes = max(1, shards.n_chars - len(first)), max(1, shards.n_bytes - len(first.encode()))
    return Split(shards.tokens, n_chars, n_bytes, fingerprint, shards.document_ends, ranges)


def _cut(documents: list[str], position: int) -> tuple[list[str], list[str]]:
    """The documents before and behind a position in their concatenation; the one it falls into is cut in two."""
    before: list[str] = []
    for i, document in enumerate(documents):
        if position < len(document):
            halves = [document[:position], document[position:]]
            return [*before, *halves[:1]] if position else before, [halves[1], *documents[i + 1 :]]
        before.append(document)
        position -= len(document)
    return before, []


def _encode(documents: list[str], tokenizer: Tokenizer) -> Split:
    """One stream of tokens; end-of-text behind each document if the tokenizer has it, else a blank line between."""
    if tokenizer.end_of_text is None:
        documents = [_DOCUMENT_BREAK.join(documents)]
        parts, ends = [tokenizer.encode_array(documents[0])], None
    else:
        end: np.ndarray = np.asarray([tokenizer.end_of_text], dtype=tokenizer.dtype)
        parts = [part for text in documents for part in (tokenizer.encode_array(text), end)]
        ends = np.cumsum([len(part) for part in parts])[1::2]
    tokens = np.concatenate(parts)
    first = len(tokenizer.decode(tokens[:1].tolist()))
    digest = hashlib.sha256(tokens.tobytes() + tokenizer.fingerprint.encode()).hexdigest()
    n_bytes = sum(len(text.encode()) for text in documents) - len(documents[0][:first].encode())
    return Split(tokens, sum(map(len, documents)) - first, n_bytes, digest, ends)
