"""What every tokenizer is, and what the kinds share: a check for real Unicode, and cutting a long text in pieces."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from classiclm.errors import BAD_INPUT, Error

MAX_VOCAB = 1_000_000
PIECE = 1 << 20  # characters encoded at a time, so that memory does not grow with the text


class Tokenizer(ABC):
    """encode: text -> ids; decode: ids -> text; `end_of_text` is the id that separates documents, if there is one."""

    vocab_size: int
    end_of_text: int | None = None

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text. Special tokens in it stay plain text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def to_json(self) -> str:
        """The text of tokenizer.json."""

    def encode_array(self, text: str) -> np.ndarray:
        """The ids as an array of the smallest fitting type, uint16 or int32."""
        return np.asarray(self.encode(text), dtype=self.dtype)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode_array` of each text, in the way that is fastest for many."""
        return [self.encode_array(text) for text in texts]

    @property
    def beginning(self) -> list[int]:
        """What a text of its own begins behind: the end of the document before, or else a line break.

        Empty if the vocabulary has neither.
        """
        return self.encode("\n") if self.end_of_text is None else [self.end_of_text]

    @property
    def dtype(self) -> type:
        """uint16 as long as it fits (Megatron's rule), else int32."""
        return np.uint16 if self.vocab_size < 65_500 else np.int32

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json: equal tokenizers have equal ones."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class LibraryTokenizer(Tokenizer):
    """A tokenizer that the `tokenizers` library runs as a whole: what tokenizer.json says is what it does.

    `border` matches where a long text may be cut without a change in its ids; a subclass sets it.
    """

    border: re.Pattern[str]

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" or "[MASK]" in a user's text stays text
        self.vocab_size = tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Raises Error (exit 3) for half a character (a lone surrogate), which no UTF-8 text has.

        And for rules in a foreign file over which the library breaks down once there is a text.
        """
        check_unicode(text)
        ids: list[int] = []
        for piece in pieces(text, self.border):
            ids += self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        try:
            with without_panic():  # the batch of one is for its speed: it keeps no offsets
                return self._tokenizer.encode_batch_fast([piece], add_special_tokens=False)[0].ids
        except MemoryError:
            raise
        except Exception as e:  # the library raises plain Exception, such as for an unknown word without [UNK]
            fix = "take a tokenizer.json written by classiclm"
            raise Error("this tokenizer", f"cannot encode the text ({reason(e)})", fix, BAD_INPUT) from e

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._tokenizer.to_str()


def check_unicode(text: str) -> None:
    """Raises Error (exit 3) for half a character (a lone surrogate), which no UTF-8 text has."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise Error("text", "is not Unicode", "give it as UTF-8", BAD_INPUT) from e


def check_bpe(model: Mapping[str, Any]) -> None:
    """Raises ValueError for the "model" of a tokenizer.json if it marks insides of words, as no BPE of ours does.

    To be called before the library reads it, which may break down (panic) over such marks.
    """
    prefix = model.get("continuing_subword_prefix")
    if prefix:
        raise ValueError(f"its BPE puts {prefix!r} before the pieces inside a word (continuing_subword_prefix)")


@contextmanager
def without_panic() -> Iterator[None]:
    """Turns a panic of the library into a ValueError: it is a BaseException, which `except Exception` misses."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise ValueError("the tokenizers library breaks down over it") from e


def reason(e: Exception) -> str:
    """Why a file is no tokenizer, in words and on one line, from what was raised over its content."""
    if isinstance(e, Error):
        return str(e).partition(". Fix: ")[0]
    if isinstance(e, OSError):
        return f"{Path(e.filename or '').name}: {(e.strerror or 'cannot be read').lower()}"
    if isinstance(e, KeyError):
        return f"it lacks {e.args[0]!r}"
    if isinstance(e, json.JSONDecodeError | RecursionError):
        return "it is not JSON, or nested too deeply"
    if isinstance(e, UnicodeError):
        return "it is not UTF-8"
    if isinstance(e, TypeError | AttributeError | IndexError):
        return "one of its parts is of another type than such a file has"
    return " ".join(str(e).split())[:300]


def check_size(name: str, vocab_size: int, smallest: int, why: str, example: str) -> None:
    """Raises Error (exit 2) for a vocabulary size that cannot be; `why` says what the smallest is made of."""
    if not smallest <= vocab_size <= MAX_VOCAB:
        why = f"should have from {smallest} ({why}) to {MAX_VOCAB:,} tokens"
        raise Error(name, why, f"use {example}, or another number in between")


def pieces(text: str, border: re.Pattern[str]) -> list[str]:
    """Cut behind a match of `border` whenever PIECE characters have come together; one piece if there is none.

    The border says where the tokenizer always cuts too, so that the ids of the pieces are those of the whole.
    """
    found, start = [], 0
    while len(text) - start > PIECE:
        place = border.search(text, start + max(PIECE - 2, 0))
        if place is None:
            break
        found.append(text[start : place.end()])
        start = place.end()
    return [*found, text[start:]]
