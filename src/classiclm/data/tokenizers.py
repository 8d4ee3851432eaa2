"""Text <-> token ids. Every tokenizer is one `tokenizer.json` in the format of the `tokenizers` library.

`char` has one token per character of the training text, as in the ladder. `bpe-N` is GPT-2's byte-level BPE with N
tokens (section 2.2), learnt from the training text. `gpt2` is the published one.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from classiclm.data.locate import Download, locate
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import is_path

END_OF_TEXT = "<|endoftext|>"
_MAX_VOCAB = 1_000_000
_PIECE = 1 << 20  # characters encoded at a time, so that memory does not grow with the text
_LINE_START = re.compile(r"\S\n(?=\S)")

GPT2_FILES = (
    Download(
        "tokenizers/gpt2-encoder.json",
        "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/encoder.json",
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    ),
    Download(
        "tokenizers/gpt2-vocab.bpe",
        "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/vocab.bpe",
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
)


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

    @property
    def dtype(self) -> type:
        """uint16 as long as it fits (Megatron's rule), else int32."""
        return np.uint16 if self.vocab_size < 65_500 else np.int32

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json: equal tokenizers have equal ones."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


class CharTokenizer(Tokenizer):
    """One token per character, in code point order."""

    def __init__(self, characters: Sequence[str]):
        self.characters = list(characters)
        self.vocab_size = len(self.characters)
        self._ids = {character: i for i, character in enumerate(self.characters)}

    @classmethod
    def train(cls, text: str) -> "CharTokenizer":
        """The characters that occur in the text."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """Raises Error (exit 3) for a character that the training text did not have."""
        try:
            return [self._ids[character] for character in text]
        except KeyError as e:
            unknown = e.args[0]
            raise Error(
                f"character {unknown!r} (U+{ord(unknown):04X})",
                f"is not among the {self.vocab_size} that this tokenizer knows",
                "leave it out, or train with --tokenizer bpe-512, which knows every byte",
                BAD_INPUT,
            ) from e

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def to_json(self) -> str:
        model = models.WordLevel(vocab=self._ids, unk_token="")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer.to_str()


class ByteBPE(Tokenizer):
    """Byte-level byte-pair encoding (GPT-2, section 2.2): no text is unknown, and decoding gives it back exactly."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "ByteBPE":
        """Merge the most frequent pairs of the text until there are vocab_size tokens (256 bytes and one special)."""
        if not 257 <= vocab_size <= _MAX_VOCAB:
            why = f"should have from 257 (256 bytes and one special token) to {_MAX_VOCAB:,} tokens"
            raise Error(f"bpe-{vocab_size}", why, "use bpe-512, or another number in between")
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_pieces(text), trainer)
        return cls(tokenizer)

    @classmethod
    def published_gpt2(cls) -> "ByteBPE":
        """The 50,257 tokens of GPT-2, from OpenAI's two files."""
        vocab_file, merges_file = (locate(file) for file in GPT2_FILES)
        try:
            vocab = json.loads(vocab_file.read_bytes())
            lines = merges_file.read_text(encoding="utf-8").splitlines()[1:]  # the first line is "#version: 0.2"
            merges = [(a, b) for a, b in (line.split(" ") for line in lines if line)]
            tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
        except Exception as e:  # the library raises plain Exception for merges that do not fit
            why = f"and {merges_file.name} are not GPT-2's vocabulary ({e})"
            raise Error(vocab_file, why, "restore both files as OpenAI published them", BAD_INPUT) from e
        tokenizer.add_special_tokens([END_OF_TEXT])
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        """Raises Error (exit 3) for half a character (a lone surrogate), which no UTF-8 text has."""
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise Error("text", "is not Unicode", "give it as UTF-8", BAD_INPUT) from e
        ids: list[int] = []
        for piece in _pieces(text):
            ids += self._tokenizer.encode(piece).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def to_json(self) -> str:
        return self._tokenizer.to_str()


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a user's text stays text
    return tokenizer


def _pieces(text: str) -> list[str]:
    """Cut behind a single line break between words, where GPT-2's pattern always cuts too; one piece if there is none.

    (In a run of white space it cuts before the last character, which it finds by what follows.)
    """
    pieces, start = [], 0
    while len(text) - start > _PIECE:
        place = _LINE_START.search(text, start + _PIECE - 2)
        if place is None:
            break
        pieces.append(text[start : place.end()])
        start = place.end()
    return [*pieces, text[start:]]


def from_json(text: str, source: object) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises Error (exit 3) if it is not one of our kinds."""
    try:
        kind = json.loads(text)["model"]["type"]
        if kind == "WordLevel":
            vocab = json.loads(text)["model"]["vocab"]
            return CharTokenizer(sorted(vocab, key=vocab.__getitem__))
        if kind == "BPE":
            tokenizer = tokenizers.Tokenizer.from_str(text)
            tokenizer.encode_special_tokens = True
            return ByteBPE(tokenizer)
    except Exception as e:  # the library raises plain Exception for a malformed file
        why = f"is not a readable tokenizer ({e})"
        raise Error(source, why, "name a tokenizer.json written by classiclm", BAD_INPUT) from e
    raise Error(source, f"holds a {kind} tokenizer", "name a char or BPE tokenizer.json", BAD_INPUT)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """A published tokenizer by name ("gpt2"), or any by the path of its tokenizer.json (or of the folder with it)."""
    if name_or_path == "gpt2":
        return ByteBPE.published_gpt2()
    if not is_path(name_or_path):
        hint = f"; write ./{name_or_path} for the path" if Path(name_or_path).exists() else ""
        fix = f"use gpt2 or the path of a tokenizer.json{hint}; char and bpe-N are learnt from a text, in training"
        raise Error(name_or_path, "is no published tokenizer", fix)
    path = Path(name_or_path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise Error(
            name_or_path, "does not exist", "name a tokenizer.json written by classiclm, or its folder", BAD_INPUT
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise Error(path, f"cannot be read ({e})", "name a tokenizer.json written by classiclm", BAD_INPUT) from e
    return from_json(text, path)


def make_tokenizer(name_or_path: str, training_text: str) -> Tokenizer:
    """As `load_tokenizer`, and the kinds that are learnt from the training text: "char" and "bpe-N"."""
    if name_or_path == "char":
        return CharTokenizer.train(training_text)
    kind, _, size = name_or_path.partition("-")
    if kind == "bpe" and size.isdecimal():
        return ByteBPE.train(training_text, int(size))
    return load_tokenizer(name_or_path)
