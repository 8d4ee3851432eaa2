"""classiclm tokenizer: `train KIND` learns one and writes its file; `show NAME` says what one is and does to a text.

Three measures of a text: bytes per token; fertility, tokens per word (Rust et al. 2021, section 3), here by script; and
whether decoding gives the text back.

A word is a run of letters of one script with their marks, and a Chinese character is a word of its own. A token with
letters of several words is divided between their scripts by its bytes of letters; one without letters is no one's.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tokenizers

from classiclm.commands.tables import show, table
from classiclm.config import NonNegative, Positional, parse_flags, validate
from classiclm.data.corpora import Data, is_pair_corpus, read_documents, read_sentences
from classiclm.data.ranked import bytes_of_characters
from classiclm.data.tokenizer import LibraryTokenizer, Tokenizer, pieces
from classiclm.data.tokenizers import GPT1BPE, ByteBPE, CharTokenizer, WordPiece, is_learnt, load_tokenizer
from classiclm.errors import BAD_INPUT, USAGE, Error, did_you_mean
from classiclm.files import is_path, make_folder, write_file
from classiclm.train.progress import say

KINDS: dict[type[Tokenizer], tuple[str, str]] = {
    CharTokenizer: ("char", "one token per character"),
    ByteBPE: ("bpe", "byte-level byte-pair encoding, as GPT-2's"),
    GPT1BPE: ("gpt1-bpe", "byte-pair encoding of words, as GPT-1's"),
    WordPiece: ("wordpiece", "WordPiece, as BERT's"),
}
SCRIPTS = ("Latin", "Cyrillic", "Greek", "Han", "Arabic", "Devanagari", "other")
_OURS = "name a tokenizer.json written by classiclm"
_N_LONGEST = 10
_NO_LETTER, _MARK = 0, -1  # labels of characters besides those of SCRIPTS, which count from 1
_HAN = 1 + SCRIPTS.index("Han")


@dataclass(frozen=True)
class TrainFlags:
    """Learn a tokenizer from the training part of a text, as `train --tokenizer KIND` does, for `--tokenizer OUT`."""

    kind: Annotated[str, Positional]  # char, bpe-N, gpt1-bpe-N or wordpiece-N
    out: str  # the file to write, or a folder for its tokenizer.json
    data: Data = Data()  # named corpus, text file or folder, or corpus of sentence pairs
    task: Literal["auto", "causal", "masked", "pairs"] = "auto"  # which training's split; auto: wordpiece has masked


@dataclass(frozen=True)
class Sample:
    """The text to show a tokenizer at work on; all of it."""

    SHORTHAND: ClassVar[str] = "name"

    name: str | None = None  # named corpus, text file or folder, or corpus of sentence pairs
    errors: Literal["strict", "replace"] = "strict"  # what to do with bytes that are not UTF-8
    source: str | None = None  # of a corpus of sentence pairs: one language, as in de
    target: str | None = None  # of a corpus of sentence pairs: the other one, as in en


@dataclass(frozen=True)
class ShowFlags:
    """Say what a tokenizer is, or what it makes of a text."""

    tokenizer: Annotated[str, Positional]  # gpt1, gpt2, bert, or the path of a tokenizer.json, its folder, or a run
    text: str | None = None  # the text to cut
    data: Sample = Sample()  # or a corpus
    rows: NonNegative = 100  # how many pieces to list at most
    json: bool = False  # as JSON


def main(argv: Sequence[str], prog: str) -> int:
    """`train` or `show`."""
    words = {"train": train, "show": show_tokenizer}
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: {prog} train KIND --out FILE_OR_FOLDER ...\n       {prog} show NAME_OR_PATH ...\n")
        print(f"`{prog} train --help` and `{prog} show --help` list the flags.")
        return 0
    word = argv[0] if argv else ""
    if word not in words:
        raise Error(word or "tokenizer", f"expected {prog} train or {prog} show", did_you_mean(word, words))
    return words[word](argv[1:], f"{prog} {word}")


def train(argv: Sequence[str], prog: str) -> int:
    """Learn one and write it; what it is, on stderr. Raises Error: exit 2 for a file of other content at `out`."""
    from classiclm.commands import tasks  # loads torch, which `show` does without

    flags = validate(TrainFlags, parse_flags(TrainFlags, argv, prog), "the command line")
    _check_kind(flags.kind)
    task = _task(flags)
    data = tasks.KINDS[task].prepare(flags.data, flags.kind)
    out = Path(flags.out)
    path = out if out.is_file() or (out.suffix == ".json" and not out.is_dir()) else out / "tokenizer.json"
    state = _write(path, data.tokenizer.to_json().encode())
    n_tokens, ratio = data.tokenizer.vocab_size, validation_bytes_per_token(task, data)
    part = "all" if flags.kind == "char" else "the training part"  # an alphabet is that of the whole text
    say(f"{path}: {state}; {flags.kind} from {part} of {flags.data.name}, cut as for {task} training")
    say(f"{n_tokens:,} tokens; {ratio:.3f} bytes per token on the validation part")
    say(f"fingerprint {data.tokenizer.fingerprint}")
    asked = flags.kind.rpartition("-")[2]
    if asked.isdecimal() and n_tokens < int(asked):
        say(f"note: {n_tokens:,} tokens, not {int(asked):,}: the text has no more pairs to merge")
    return 0


def _check_kind(kind: str) -> None:
    if is_learnt(kind):
        return
    if kind in ("gpt1", "gpt2", "bert") or is_path(kind):
        raise Error(kind, "is there to be used, not learnt", f"pass --tokenizer {kind} to classiclm train")
    near = did_you_mean(kind, ("char", "bpe-512", "bpe-8000", "gpt1-bpe-2048", "wordpiece-2048"))
    raise Error(kind, "is no kind of tokenizer that is learnt (char, bpe-N, gpt1-bpe-N, wordpiece-N)", near)


def _task(flags: TrainFlags) -> str:
    """Which training's split: as asked, else pairs for a corpus of them, masked for wordpiece, causal otherwise."""
    of_text = "masked" if flags.kind.startswith("wordpiece") else "causal"
    fitting = "pairs" if is_pair_corpus(flags.data.name) else of_text
    return fitting if flags.task == "auto" else flags.task


def _write(path: Path, data: bytes) -> str:
    """What happened, in words. Raises Error: exit 2 rather than lose a file, 4 if it cannot be written."""
    if path.is_file() and path.read_bytes() == data:
        return "is there already, the same"
    if path.exists():
        raise Error(path, "exists and is another file", "choose another --out, or remove it first", USAGE)
    make_folder(path.parent)
    write_file(path, data)
    return "written"


def validation_bytes_per_token(task: str, data: Any) -> float:
    """UTF-8 bytes per token of the validation part, end-of-text tokens left out; for pairs, of both sides."""
    val = data.val
    if task == "pairs":
        n_bytes = sum(len(side.encode()) for pair in val.texts for side in pair)
        return float(n_bytes / (len(val.source) + len(val.target) - 2 * len(val)))
    if task == "masked":
        return float(val.n_bytes / len(val.tokens))
    end = data.tokenizer.end_of_text
    n_ends = 0 if end is None else np.count_nonzero(val.tokens[1:] == end)
    return float(val.n_bytes / max(1, len(val.tokens) - 1 - n_ends))  # n_bytes leaves out the first token's


def show_tokenizer(argv: Sequence[str], prog: str) -> int:
    """What a tokenizer is, or what it makes of a text, on stdout. Raises Error (exit 3) for a text it cannot encode."""
    flags = validate(ShowFlags, parse_flags(ShowFlags, argv, prog), "the command line")
    if flags.text is not None and flags.data.name is not None:
        raise Error("--data", "and --text are two texts", "give one of them")
    tokenizer = load_tokenizer(flags.tokenizer)
    result: dict[str, Any] = {"tokenizer": flags.tokenizer, **describe(tokenizer)}
    if flags.text is not None or flags.data.name is not None:
        text = _read(flags.data) if flags.text is None else flags.text
        result["text"] = measure(tokenizer, text, flags.rows)
    if flags.json:
        print(json.dumps(result, indent=1))
    elif "text" in result:
        _print_text(result["text"])
    else:
        _print_tokenizer(result)
    return 0


def _read(sample: Sample) -> str:
    """A corpus as one text: files with a blank line between; sentences of all splits, a line each, sources first."""
    data = Data(str(sample.name), errors=sample.errors, source=sample.source, target=sample.target)
    if not is_pair_corpus(data.name):
        return "\n\n".join(read_documents(data))
    pairs = [pair for split in read_sentences(data).values() for pair in split.pairs]
    return "\n".join(sentence for side in zip(*pairs, strict=True) for sentence in side)


def describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Kind, sizes, special tokens, fingerprint, and the longest tokens in bytes of the text they stand for."""
    names, special = _vocabulary(tokenizer)
    texts = {i: _bytes_of(tokenizer, name) for i, name in names.items() if i not in special}
    longest = sorted(texts, key=lambda i: (-len(texts[i]), i))[:_N_LONGEST]
    return {
        "kind": KINDS[type(tokenizer)][0],
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": [{"id": i, "piece": names[i]} for i in sorted(special)],
        "end_of_text": tokenizer.end_of_text,
        "fingerprint": tokenizer.fingerprint,
        "longest": [{"id": i, "piece": readable(texts[i]), "bytes": len(texts[i])} for i in longest],
    }


def _vocabulary(tokenizer: Tokenizer) -> tuple[dict[int, str], set[int]]:
    """Id -> token as the file spells it, and the ids of those that stand for no text of their own, unknown included."""
    tree = json.loads(tokenizer.to_json())
    ids = tree["model"]["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]}
    special = {token["id"] for token in tree["added_tokens"]}
    unknown = tree["model"]["unk_token"]
    return {i: token for token, i in ids.items()}, special | ({ids[unknown]} if unknown in ids else set())


def _bytes_of(tokenizer: Tokenizer, token: str) -> bytes:
    """The UTF-8 text that a token stands for, without the marks of a word's inside (##) and end (</w>)."""
    if isinstance(tokenizer, ByteBPE):
        try:
            return bytes(bytes_of_characters()[character] for character in token)
        except KeyError as e:
            raise Error(f"token {token!r}", "is not of bytes as GPT-2 spells them", _OURS, BAD_INPUT) from e
    if isinstance(tokenizer, WordPiece):
        token = token.removeprefix("##") if len(token) > 2 else token
    return (token.removesuffix("</w>") if isinstance(tokenizer, GPT1BPE) else token).encode()


def readable(raw: bytes) -> str:
    """Bytes as text where they are whole characters, else as <0xE2>."""
    text = raw.decode(errors="surrogateescape")  # a byte that is no text becomes U+DC00 plus its value
    return re.sub("[\udc80-\udcff]", lambda match: f"<0x{ord(match[0]) - 0xDC00:02X}>", text)


def measure(tokenizer: Tokenizer, text: str, rows: int) -> dict[str, Any]:
    """Counts of a text, its first `rows` pieces, fertility by script, and what decoding does not give back.

    Raises Error (exit 3) for a text that the tokenizer cannot encode.
    """
    ids = tokenizer.encode(text)
    names, special = _vocabulary(tokenizer)
    raw, back = text.encode(), tokenizer.decode(ids)
    texts = [b"" if i in special else _bytes_of(tokenizer, names[i]) for i in ids]
    spans = _spans(tokenizer, text, texts)
    covers = [readable(raw[start:end]) for start, end in spans.tolist()]
    known = tokenizer.decode([i for i in ids if i not in special])
    unknown = [cover for i, cover in zip(ids, covers, strict=True) if i in special]
    # a byte-level piece is read as text; in the others one sees which are inside a word, or end it
    shown = [readable(t) for t in texts] if isinstance(tokenizer, ByteBPE) else [names[i] for i in ids]
    return {
        "tokens": len(ids),
        "characters": len(text),
        "bytes": len(raw),
        "bytes_per_token": len(raw) / len(ids) if ids else None,
        "fertility": fertility(text, spans),
        "lossless": back == text,
        "lost": {} if back == text else _lost(text, back, known, unknown),
        "first_difference": None if back == text else _first_difference(text, back),
        "pieces": [
            {"piece": shown[k], "id": i, "start": int(spans[k, 0]), "end": int(spans[k, 1]), "covers": covers[k]}
            for k, i in enumerate(ids[:rows])
        ],
    }


def _spans(tokenizer: Tokenizer, text: str, texts: list[bytes]) -> np.ndarray:
    """(N, 2): the bytes of the text that each token covers; a kind that rewrites the text may leave some out.

    texts: what the tokens themselves stand for, in bytes.
    """
    if not isinstance(tokenizer, LibraryTokenizer) or b"".join(texts) == text.encode():
        ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        return np.stack([ends[:-1], ends[1:]], axis=1)
    library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    library.encode_special_tokens = True
    found: list[tuple[int, int]] = []
    start = 0  # in characters
    for part in pieces(text, tokenizer.border):
        offsets = library.encode(part, add_special_tokens=False).offsets
        found += [(start + a, start + b) for a, b in offsets]
        start += len(part)
    places = np.concatenate([[0], np.cumsum(_widths(text))])  # character -> byte
    return places[np.array(found, dtype=np.int64).reshape(-1, 2)]


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _widths(text: str) -> np.ndarray:
    """(C,) int64: how many bytes each character has in UTF-8."""
    codes = _codes(text)
    return 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)


def _labels(text: str) -> np.ndarray:
    """(C,): for each character the number of its script from 1 on, _MARK, or _NO_LETTER."""
    codes, inverse = np.unique(_codes(text), return_inverse=True)
    labels = [_label(chr(code)) for code in codes]
    return np.array(labels, dtype=np.int64)[inverse]


def _label(character: str) -> int:
    """By the character's name in Unicode."""
    category, name = unicodedata.category(character), unicodedata.name(character, "")
    if category.startswith("M"):
        return _MARK
    if not category.startswith("L"):
        return _NO_LETTER
    if name.startswith(("CJK UNIFIED", "CJK COMPATIBILITY IDEOGRAPH")):
        return _HAN
    first = name.split(" ")[0].capitalize()
    return 1 + SCRIPTS.index(first if first in SCRIPTS else "other")


def fertility(text: str, spans: np.ndarray) -> dict[str, dict[str, float]]:
    """Words, tokens and tokens per word of each script in a text, whose tokens cover the bytes `spans`, (N, 2)."""
    if not text:
        return {}
    labels = _labels(text)
    is_mark = labels == _MARK
    base = np.maximum.accumulate(np.where(is_mark, 0, np.arange(len(labels))))  # a mark goes with its letter
    labels = np.maximum(labels[base], _NO_LETTER)
    before = np.concatenate([[_NO_LETTER], labels[:-1]])
    begins = (labels != _NO_LETTER) & ((labels != before) | (labels == _HAN)) & ~is_mark
    words = np.bincount(labels[begins], minlength=1 + len(SCRIPTS))
    of_bytes = np.repeat(labels, _widths(text))
    sums = np.zeros((len(SCRIPTS), len(of_bytes) + 1), dtype=np.int32)  # (scripts, bytes + 1)
    np.cumsum(of_bytes == 1 + np.arange(len(SCRIPTS))[:, None], axis=1, out=sums[:, 1:])
    covered = sums[:, spans[:, 1]] - sums[:, spans[:, 0]]  # (scripts, N): bytes of letters in each token
    tokens = (covered / np.maximum(covered.sum(axis=0), 1)).sum(axis=1)
    return {
        script: {"words": int(n), "tokens": float(tokens[s]), "tokens_per_word": float(tokens[s] / n)}
        for s, (script, n) in enumerate(zip(SCRIPTS, words[1:], strict=True))
        if n
    }


def _lost(text: str, back: str, known: str, unknown: list[str]) -> dict[str, Any]:
    """What of a text did not come back: counts of characters, or which. `known` came back but for unknown tokens."""
    there, hidden, same = (Counter(unicodedata.normalize("NFD", part)) for part in (text, "".join(unknown), known))
    gone = there - hidden - same
    upper = {character for character in gone if character != character.lower()}
    accents = {character for character in gone if unicodedata.category(character) == "Mn"}
    lost = {
        "upper_case": sum(gone[character] for character in upper),
        "accents": sum(gone[character] for character in accents),
        "white_space": re.findall(r"\s+", text) != re.findall(r"\s+", back),
        "unknown": sorted(set(unknown)),
        "others": sorted(character for character in gone.keys() - upper - accents if not character.isspace()),
    }
    return {name: value for name, value in lost.items() if value}


def _first_difference(text: str, back: str) -> dict[str, Any]:
    """Where two texts part, in characters, and how they go on."""
    shorter = min(len(text), len(back))
    at = next((i for i in range(shorter) if text[i] != back[i]), shorter)
    return {"at": at, "text": text[at : at + 20], "decoded": back[at : at + 20]}


def _print_tokenizer(result: dict[str, Any]) -> None:
    special = ", ".join(f"{token['piece']} = {token['id']}" for token in result["special_tokens"])
    print(f"{result['tokenizer']}: {dict(KINDS.values())[result['kind']]}")
    print(f"{result['vocab_size']:,} tokens; special: {special or 'none'}")
    print(f"fingerprint {result['fingerprint']}")
    made = table(["longest tokens"], ["id", "bytes"])
    for token in result["longest"]:
        made.add_row(repr(token["piece"]), str(token["id"]), str(token["bytes"]))
    show(made)


def _print_text(text: dict[str, Any]) -> None:
    made = table(["piece", "covers"], ["id", "from byte", "bytes"])
    for p in text["pieces"]:
        made.add_row(repr(p["piece"]), repr(p["covers"]), str(p["id"]), str(p["start"]), str(p["end"] - p["start"]))
    if text["pieces"]:
        show(made)
    if len(text["pieces"]) < text["tokens"]:
        print(f"and {text['tokens'] - len(text['pieces']):,} more\n")
    ratio = "" if text["bytes_per_token"] is None else f": {text['bytes_per_token']:.3f} bytes per token"
    print(f"{text['tokens']:,} tokens, {text['characters']:,} characters, {text['bytes']:,} bytes{ratio}")
    for script, row in text["fertility"].items():
        counts = f"{row['tokens']:,.1f} tokens for {row['words']:,} words"
        print(f"{script}: {row['tokens_per_word']:.3f} tokens per word ({counts})")
    print("lossless: decoding gives the text back" if text["lossless"] else f"lost: {_in_words(text)}")


def _in_words(text: dict[str, Any]) -> str:
    """As in "upper case 8, white space, others '—'; first at character 0: ..."."""
    parts = []
    for name, value in text["lost"].items():
        what = name.replace("_", " ")
        shown = " ".join(map(repr, value[:10])) if isinstance(value, list) else f"{value:,}"
        parts.append(what if value is True else f"{what} {shown}")
    first = text["first_difference"]
    what = ", ".join(parts) or "how characters are composed"
    return f"{what}; first at character {first['at']}: {first['text']!r} came back as {first['decoded']!r}"
