"""Tokenizers of foreign folders, read and written.

Read: tokenizer.json, the pairs of files that OpenAI published (ids and merges), and BERT's vocab.txt. Only the
vocabulary of a tokenizer.json is taken, and goes by the rules of its paper; one with rules of another kind is refused.

Written: tokenizer.json as ours, and tokenizer_config.json, which names the special tokens. Where a model expects it,
the file also says how a text is framed: a source of a translation ends with the end-of-text token, as in training.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from classiclm.data.tokenizers import END_OF_TEXT, GPT1BPE, ByteBPE, CharTokenizer, Tokenizer, WordPiece
from classiclm.errors import BAD_INPUT, Error

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
PAIRS = (("vocab.json", "merges.txt"), ("encoder_bpe_40000.json", "vocab_40000.bpe"), ("encoder.json", "vocab.bpe"))
VOCABULARY = "vocab.txt"
_SPACE = "Ġ"  # the byte of a space, in GPT-2's spelling of bytes; GPT-1's text is in lower case
_END_OF_WORD = "</w>"
_GPT1_UNKNOWN = "<unk>"

Tree = Mapping[str, Any]


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer of a folder, None if it has no file of one. Raises Error (exit 3) for one that is not ours."""
    pairs = [(folder / vocab, folder / merges) for vocab, merges in PAIRS]
    readers: list[tuple[Path, Callable[[], Tokenizer]]] = [
        (folder / TOKENIZER, lambda: _from_tree(json.loads((folder / TOKENIZER).read_bytes()))),
        *((vocab, lambda vocab=vocab, merges=merges: _from_pair(vocab, merges)) for vocab, merges in pairs),
        (folder / VOCABULARY, lambda: _from_list(folder)),
    ]
    for path, reader in readers:
        if path.is_file():
            try:
                return reader()
            except Exception as e:  # the library raises plain Exception for a malformed file
                fix = "name another with --tokenizer, or restore it from its origin"
                raise Error(path, f"is no tokenizer of ours ({' '.join(str(e).split())[:300]})", fix, BAD_INPUT) from e
    return None


def _from_tree(tree: Tree) -> Tokenizer:
    """Raises any exception for a tree that is malformed, and ValueError for rules that are not ours."""
    model = tree["model"]
    kind = model["type"]
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        raise ValueError(f"it is of the kind {kind}")
    added = [token["content"] for token in tree["added_tokens"]]
    tokens = _in_order(model["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]})
    if kind == "WordPiece":
        return WordPiece.from_vocabulary(tokens, _lowercase(tree["normalizer"]))
    if kind == "WordLevel":
        if any(len(token) != 1 for token in tokens):
            raise ValueError("its tokens are words, not characters")
        return CharTokenizer(tokens)
    merges = [_pair(merge) for merge in model["merges"]]
    if model.get("end_of_word_suffix"):
        return _gpt1(model["vocab"], merges)
    _check_byte_level(tree)
    return ByteBPE.from_merges(model["vocab"], merges, added)


def _gpt1(vocab: dict[str, int], merges: list[tuple[str, str]]) -> GPT1BPE:
    if not any(token.endswith(_END_OF_WORD) for token in vocab):
        raise ValueError(f"its BPE does not mark ends of words by {_END_OF_WORD}")
    return GPT1BPE.from_merges(vocab, merges)


def _check_byte_level(tree: Tree) -> None:
    rules = tree["pre_tokenizer"] or {}
    if rules.get("type") != "ByteLevel" or tree["normalizer"] is not None or not rules.get("use_regex", True):
        raise ValueError("its BPE is not GPT-2's, on bytes and without a normalizer")
    if rules.get("add_prefix_space"):
        raise ValueError("it puts a space before each text (add_prefix_space), which ours does not")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _in_order(ids: Mapping[str, int]) -> list[str]:
    """Tokens by id. Raises ValueError unless the ids are 0, 1, 2 and so on."""
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not 0, 1, 2 and so on, once each")
    return tokens


def _lowercase(normalizer: Tree) -> bool:
    """Whether a WordPiece's text is lower-cased, for the library's own normalizer of BERT and for ours."""
    if normalizer["type"] == "Sequence":
        return any(step["type"] == "Lowercase" for step in normalizer["normalizers"])
    lowercase = normalizer["lowercase"]
    if normalizer.get("strip_accents") not in (None, lowercase) or not normalizer.get("handle_chinese_chars", True):
        raise ValueError("its rules for accents or Chinese characters are not BERT's")
    return bool(lowercase)


def _from_pair(vocab_file: Path, merges_file: Path) -> Tokenizer:
    vocab = json.loads(vocab_file.read_bytes())
    lines = merges_file.read_text(encoding="utf-8").split("\n")
    merges = [_pair(line) for line in lines[lines[0].startswith("#version") :] if line]
    if _SPACE not in _in_order(vocab):
        return _gpt1(vocab, merges)
    return ByteBPE.from_merges(vocab, merges, [END_OF_TEXT] if END_OF_TEXT in vocab else [])


def _from_list(folder: Path) -> Tokenizer:
    tokens = (folder / VOCABULARY).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    config = folder / TOKENIZER_CONFIG
    settings = json.loads(config.read_bytes()) if config.is_file() else {}
    return WordPiece.from_vocabulary(tokens, bool(settings.get("do_lower_case", True)))


def special_ids(tokenizer: Tokenizer, translates: bool) -> dict[str, int | None]:
    """The ids of config.json. A translation begins with the end-of-text token, and is padded with it."""
    if isinstance(tokenizer, WordPiece):
        return {"pad_token_id": tokenizer.pad}
    end = tokenizer.end_of_text
    if translates:
        return {"bos_token_id": None, **dict.fromkeys(("eos_token_id", "pad_token_id", "decoder_start_token_id"), end)}
    return {"bos_token_id": end, "eos_token_id": end}


def contents(tokenizer: Tokenizer, n_ctx: int, translates: bool) -> dict[str, bytes]:
    """File name -> bytes of tokenizer.json and tokenizer_config.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": n_ctx,
        "clean_up_tokenization_spaces": False,
        **_special_tokens(tokenizer, translates),
    }
    text = tokenizer.to_json()
    if translates:
        framed = tokenizers.Tokenizer.from_str(text)
        end = (END_OF_TEXT, tokenizer.end_of_text)
        framed.post_processor = processors.TemplateProcessing(
            single=f"$A {END_OF_TEXT}", pair=f"$A $B {END_OF_TEXT}", special_tokens=[end]
        )
        text = framed.to_str()
    return {TOKENIZER: text.encode(), TOKENIZER_CONFIG: json.dumps(config, indent=2).encode()}


def _special_tokens(tokenizer: Tokenizer, translates: bool) -> dict[str, Any]:
    if isinstance(tokenizer, WordPiece):
        special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
        return {**special, "model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    if isinstance(tokenizer, GPT1BPE):
        return {"unk_token": _GPT1_UNKNOWN}
    if tokenizer.end_of_text is None:
        return {}
    names = ("eos_token", "unk_token", "pad_token" if translates else "bos_token")
    return dict.fromkeys(names, END_OF_TEXT)
