"""Text -> a training and a validation split of token ids, and what is needed to name and compare them."""

import hashlib
from dataclasses import dataclass

import numpy as np

from classiclm.data.corpora import Data, read_documents
from classiclm.data.tokenizers import Tokenizer, make_tokenizer
from classiclm.errors import BAD_INPUT, Error

_DOCUMENT_BREAK = "\n\n"  # between files, for tokenizers without an end-of-text token


@dataclass(frozen=True)
class Split:
    """The token ids of one split, how much text they stand for, and a sum that names them."""

    tokens: np.ndarray  # (N,)
    n_chars: int  # of the text behind tokens[1:], the ones that are predicted
    n_bytes: int  # likewise, in UTF-8
    fingerprint: str  # sha256 of the tokens and the tokenizer


@dataclass(frozen=True)
class TextData:
    """A corpus, cut in two and tokenised."""

    name: str
    tokenizer: Tokenizer
    train: Split
    val: Split

    def split(self, name: str) -> Split:
        """The split by name. Raises Error (exit 2)."""
        if name not in ("train", "val"):
            raise Error(name, "is no split", "choose from train, val")
        return self.train if name == "train" else self.val


def prepare_text(data: Data, tokenizer: str | Tokenizer) -> TextData:
    """Read, cut, learn the tokenizer from the training part if it is one to be learnt, encode.

    The cut is at a character: the first 1 - val_share of the text is for training. Raises Error (exit 3) if there is
    too little text to fill both.
    """
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
    return TextData(data.name, tokenizer, *splits)


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
        parts = [tokenizer.encode_array(documents[0])]
    else:
        end: np.ndarray = np.asarray([tokenizer.end_of_text], dtype=tokenizer.dtype)
        parts = [part for text in documents for part in (tokenizer.encode_array(text), end)]
    tokens = np.concatenate(parts)
    first = len(tokenizer.decode(tokens[:1].tolist()))
    digest = hashlib.sha256(tokens.tobytes() + tokenizer.fingerprint.encode()).hexdigest()
    n_bytes = sum(len(text.encode()) for text in documents) - len(documents[0][:first].encode())
    return Split(tokens, sum(map(len, documents)) - first, n_bytes, digest)
