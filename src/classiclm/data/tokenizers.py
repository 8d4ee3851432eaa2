"""Text <-> token ids: the kinds of tokenizer by name. Every one is one `tokenizer.json`, in the `tokenizers` format.

Learnt from the training text: `char`, one token per character, as in the ladder; `bpe-N`, GPT-2's byte-level BPE with
N tokens; `gpt1-bpe-N`, GPT-1's BPE of words; `wordpiece-N`, BERT's. Published: `gpt1`, `gpt2` and `bert`.
"""

import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from classiclm.data.byte_bpe import END_OF_TEXT, GPT2_FILES, ByteBPE
from classiclm.data.gpt1_bpe import GPT1_FILES, GPT1BPE
from classiclm.data.tokenizer import Tokenizer, check_bpe, check_unicode, reason, without_panic
from classiclm.data.wordpiece import BERT_FILE, WordPiece
from classiclm.errors import BAD_INPUT, Error, did_you_mean
from classiclm.files import is_path

__all__ = [
    "BERT_FILE",
    "END_OF_TEXT",
    "GPT1BPE",
    "GPT1_FILES",
    "GPT2_FILES",
    "ByteBPE",
    "CharTokenizer",
    "Tokenizer",
    "WordPiece",
    "file_of",
    "from_json",
    "load_tokenizer",
    "make_tokenizer",
]


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

    @classmethod
    def from_ids(cls, ids: Mapping[str, int]) -> "CharTokenizer":
        """The tokenizer with these ids. Raises ValueError if a token is no character, or the ids are not 0, 1, 2..."""
        tokens = sorted(ids, key=ids.__getitem__)
        if any(len(token) != 1 for token in tokens):
            raise ValueError("its tokens are words, not characters")
        if [ids[token] for token in tokens] != list(range(len(tokens))):
            raise ValueError("its ids are not 0, 1, 2 and so on, once each")
        "".join(tokens).encode()  # raises for half a character, of which no file can be written
        return cls(tokens)

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

    @property
    def beginning(self) -> list[int]:
        return [self._ids["\n"]] if "\n" in self._ids else []

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.characters[i] for i in ids)

    def to_json(self) -> str:
        model = models.WordLevel(vocab=self._ids, unk_token="")
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        return tokenizer.to_str()


_PUBLISHED: dict[str, Callable[[], Tokenizer]] = {
    "bert": WordPiece.published_bert,
    "gpt1": GPT1BPE.published_gpt1,
    "gpt2": ByteBPE.published_gpt2,
}
_LEARNT: dict[str, Callable[[str, int], Tokenizer]] = {
    "bpe": ByteBPE.train,
    "gpt1-bpe": GPT1BPE.train,
    "wordpiece": WordPiece.train,
}
# Runs that are no words and teach nothing, over which the trainers would sit for hours.
_GIANTS = re.compile(r"\w{5000,}|[^\w\s]{5000,}|\s{5000,}")
_NAME_A_FILE = "name a tokenizer.json written by classiclm, its folder, or a run"
_EXAMPLES = (*_PUBLISHED, "char", *(f"{kind}-{size}" for kind in _LEARNT for size in (512, 2048)))


def from_json(text: str, source: object) -> Tokenizer:
    """The tokenizer in a tokenizer.json. Raises Error (exit 3) if it is not one of our kinds."""
    try:
        model = json.loads(text)["model"]
        kind = model["type"]
        if kind == "WordLevel":
            return CharTokenizer.from_ids(model["vocab"])
        if kind == "WordPiece":
            return WordPiece(_by_library(text))
        if kind == "BPE":
            check_bpe(model)
            of_words = bool(model.get("end_of_word_suffix"))  # transformers writes "" for GPT-2
            return (GPT1BPE if of_words else ByteBPE)(_by_library(text))
    except Exception as e:  # the library raises plain Exception for a malformed file
        why = f"is not a readable tokenizer ({reason(e)})"
        raise Error(source, why, "name a tokenizer.json written by classiclm", BAD_INPUT) from e
    raise Error(source, f"holds a {kind} tokenizer", "name a char, BPE or WordPiece tokenizer.json", BAD_INPUT)


def _by_library(text: str) -> tokenizers.Tokenizer:
    """Raises any Exception for a malformed file."""
    with without_panic():
        return tokenizers.Tokenizer.from_str(text)


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """A published tokenizer by name ("gpt1", "gpt2", "bert"), or any by path.

    The path is that of a tokenizer.json, of a folder with one, or of a run, whose newest checkpoint has one.
    Raises Error: exit 2 for an unknown name, exit 3 for a file that is missing or no tokenizer of ours.
    """
    if name_or_path in _PUBLISHED:
        return _PUBLISHED[name_or_path]()
    if not is_path(name_or_path):
        why = "is learnt from a text, in training" if is_learnt(name_or_path) else "is no published tokenizer"
        fix = f"{did_you_mean(name_or_path, _PUBLISHED)}, or give the path of a tokenizer.json, its folder, or a run"
        raise Error(name_or_path or "''", why, f"{fix}{_path_hint(name_or_path)}")
    path = file_of(name_or_path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise Error(path, f"cannot be read ({reason(e)})", _NAME_A_FILE, BAD_INPUT) from e
    return from_json(text, path)


def make_tokenizer(name_or_path: str, training_text: str) -> Tokenizer:
    """As `load_tokenizer`, and the kinds learnt from the training text: char, bpe-N, gpt1-bpe-N and wordpiece-N.

    Raises Error (exit 3) if that text is not Unicode.
    """
    if is_learnt(name_or_path):
        check_unicode(training_text)
        kind, _, size = name_or_path.rpartition("-")
        if not kind:
            return CharTokenizer.train(training_text)
        return _LEARNT[kind](_GIANTS.sub("", training_text), int(size))
    if name_or_path in _PUBLISHED or is_path(name_or_path):
        return load_tokenizer(name_or_path)
    note = "char, bpe-N, gpt1-bpe-N and wordpiece-N are learnt from the text"
    fix = f"{did_you_mean(name_or_path, _EXAMPLES)}{_path_hint(name_or_path)}; {note}"
    raise Error(name_or_path or "''", "is no tokenizer", fix)


def is_learnt(name: str) -> bool:
    """Whether a name is that of a kind that is learnt from a text: char, bpe-N, gpt1-bpe-N, wordpiece-N."""
    kind, _, size = name.rpartition("-")
    return name == "char" or (kind in _LEARNT and size.isascii() and size.isdecimal())


def _path_hint(name: str) -> str:
    """What else may have been meant by a name that no tokenizer has."""
    return f", or write ./{name} for the path" if name and Path(name).exists() else ""


def file_of(name: str) -> Path:
    """The tokenizer.json that a path stands for: a file, its folder, or a run. Raises Error (exit 3) if none."""
    path = Path(name)
    if path.is_dir():
        own = path / "tokenizer.json"
        steps = sorted(path.glob("checkpoints/step-*/tokenizer.json"), key=lambda file: (len(file.parts[-2]), file))
        path = own if own.is_file() or not steps else steps[-1]
    if path.is_file():
        return path
    if Path(name).is_dir():
        raise Error(name, "has no tokenizer.json", _NAME_A_FILE, BAD_INPUT)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {str(path.parent / near[0])!r}; " if near else ""
    raise Error(name, "does not exist", f"{hint}{_NAME_A_FILE}", BAD_INPUT)
