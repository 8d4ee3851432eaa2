"""Text -> documents -> sentences, tokenised: what BERT's pre-training draws its pairs of segments from (section 3.1).

A document is a block of lines without a blank line inside, or a whole file that has none; a sentence is a line, which
need not be one to a linguist (appendix A.2).
"""

import hashlib
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from classiclm.data.corpora import Data, read_documents
from classiclm.data.dataset import Dataset
from classiclm.data.splits import is_prepared, open_for
from classiclm.data.tokenizers import Tokenizer, make_tokenizer
from classiclm.data.wordpiece import WordPiece
from classiclm.errors import BAD_INPUT, Error

Document = list[str]  # its sentences
_FEWEST = 2  # documents in a split: a segment that does not follow another comes from another document


@dataclass(frozen=True)
class Sentences:
    """The sentences of one split: all tokens end to end, and where sentences and documents end in them."""

    tokens: Any  # (N,) ids, without special tokens: an array, or `Tokens` on disk
    sentence_ends: np.ndarray  # (S,) int64: sentence i is tokens[sentence_ends[i - 1] : sentence_ends[i]]
    document_ends: np.ndarray  # (D,) int64: document i has sentences document_ends[i - 1] to document_ends[i] - 1
    n_bytes: int  # of the sentences' text in UTF-8, without line breaks
    fingerprint: str  # sha256 of tokens, both arrays of ends and the tokenizer


@dataclass(frozen=True)
class SentenceData:
    """A corpus of sentences, cut in two and tokenised."""

    name: str
    tokenizer: WordPiece
    train: Sentences
    val: Sentences

    def split(self, name: str) -> Sentences:
        """The split by name. Raises Error (exit 2)."""
        if name not in ("train", "val"):
            raise Error(name, "is no split", "choose from train, val")
        return self.train if name == "train" else self.val


def prepare_sentences(data: Data, tokenizer: str | Tokenizer) -> SentenceData:
    """Read, cut between documents, learn the tokenizer from the training part if it is one to be learnt, encode.

    The last documents, with about val_share of the characters, are for validation. A dataset of `classiclm prepare` is
    cut and tokenised already. Raises Error: exit 2 for a tokenizer without BERT's special tokens, exit 3 if there are
    not two documents with a word in each part.
    """
    if is_prepared(data.name):
        return _of_dataset(data, open_for(data, tokenizer, "sentences"))
    documents = [document for text in read_documents(data) for document in _documents(text)]
    train, val = _cut(documents, data.val_share)
    _check(data.name, len(train), len(val))
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, "\n\n".join(map("\n".join, train)))
    wordpiece = _wordpiece(tokenizer)
    splits = [_encode(part, wordpiece) for part in (train, val)]
    _check(data.name, *(len(split.document_ends) for split in splits))
    return SentenceData(data.name, wordpiece, *splits)


def _wordpiece(tokenizer: Tokenizer) -> WordPiece:
    if isinstance(tokenizer, WordPiece):
        return tokenizer
    why = "has no [CLS], [SEP] and [MASK], which a masked model needs"
    raise Error("--tokenizer", why, "use wordpiece-2048 or bert, or the tokenizer.json of such a one")


def _of_dataset(data: Data, dataset: Dataset) -> SentenceData:
    if data.weights is not None or dataset.meta.weights is not None:
        say_so = "prepare it without --weights; a masked model sees all there is of each source, once an epoch"
        raise Error(data.name, "is a weighted mixture, which masked models do not take", say_so)
    splits = [_of_shards(dataset, name) for name in ("train", "val")]
    _check(data.name, *(len(split.document_ends) for split in splits))
    return SentenceData(data.name, _wordpiece(dataset.tokenizer), *splits)


def _of_shards(dataset: Dataset, name: str) -> Sentences:
    shards = dataset.split(name)
    document_ends = np.searchsorted(shards.sequence_ends, shards.document_ends) + 1  # in sentences
    return Sentences(shards.tokens, shards.sequence_ends, document_ends, shards.n_bytes, shards.fingerprint)


def _documents(text: str) -> list[Document]:
    lines = [line.strip() for line in text.splitlines()]
    return [list(block) for has_words, block in itertools.groupby(lines, key=bool) if has_words]


def _cut(documents: list[Document], val_share: float) -> tuple[list[Document], list[Document]]:
    """The cut between documents that is nearest to 1 - val_share of the characters and leaves enough on either side."""
    ends = np.cumsum([sum(map(len, document)) for document in documents])
    if len(documents) < 2 * _FEWEST:
        return documents, []
    nearest = int(np.abs(ends - (1 - val_share) * ends[-1]).argmin()) + 1
    place = min(max(nearest, _FEWEST), len(documents) - _FEWEST)
    return documents[:place], documents[place:]


def _check(name: str, *n_documents: int) -> None:
    if min(n_documents) < _FEWEST:
        why = f"has too few documents ({sum(n_documents)}): training and validation need {_FEWEST} each"
        raise Error(name, why, "give more text, in files of their own or in blocks with blank lines between", BAD_INPUT)


def _encode(documents: list[Document], tokenizer: WordPiece) -> Sentences:
    """Sentences of which no piece is left vanish, and so do documents of which no sentence is."""
    texts = list(itertools.chain.from_iterable(documents))
    ids = [tokenizer.encode(text) for text in texts]
    tokens: np.ndarray = np.fromiter(itertools.chain.from_iterable(ids), dtype=tokenizer.dtype)
    lengths = np.array([len(sentence) for sentence in ids], dtype=np.int64)
    kept = lengths > 0
    sentence_ends = np.cumsum(lengths[kept])
    # np.unique: a document without a sentence ends where the one before it does, or at 0
    ends = np.unique(np.cumsum(kept)[np.cumsum([len(document) for document in documents]) - 1])
    document_ends = ends[ends > 0]
    digest = hashlib.sha256(tokenizer.fingerprint.encode())
    for part in (tokens, sentence_ends, document_ends):
        digest.update(len(part).to_bytes(8, "big") + part.tobytes())
    n_bytes = sum(len(text.encode()) for text, is_kept in zip(texts, kept, strict=True) if is_kept)
    return Sentences(tokens, sentence_ends, document_ends, n_bytes, digest.hexdigest())
