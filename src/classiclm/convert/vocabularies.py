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

from classiclm.data.tokenizer import check_bpe, reason, without_panic
from classiclm.data.tokenizers import END_OF_TEXT, GPT1BPE, ByteBPE, CharTokenizer, Tokenizer, WordPiece
from classiclm.data.wordpiece import SPECIAL
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
        (folder / TOKENIZER, lambda: _from_file(folder / TOKENIZER)),
        *((vocab, lambda vocab=vocab, merges=merges: _from_pair(vocab, merges)) for vocab, merges in pairs),
        (folder / VOCABULARY, lambda: _from_list(folder)),
    ]
    for path, reader in readers:
        if path.is_file():
            return _checked(path, reader)
    return None


def read_file(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, under whatever name. Raises Error (exit 3) for one that is not ours."""
    return _checked(path, lambda: _from_file(path))


def _checked(path: Path, reader: Callable[[], Tokenizer]) -> Tokenizer:
    try:
        with without_panic():
            return reader()
    except Exception as e:  # the library raises plain Exception for a malformed file
        fix = "name another with --tokenizer, or restore it from its origin"
        raise Error(path, f"is no tokenizer of ours ({reason(e)})", fix, BAD_INPUT) from e


def check_kind(tokenizer: Tokenizer, family: str, source: object) -> None:
    """Raises Error (exit 3) for a tokenizer without the special tokens of a family, or with those of another."""
    is_wordpiece = isinstance(tokenizer, WordPiece)
    if family == "bert" and not is_wordpiece:
        why, fix = "is no WordPiece, and BERT needs its [CLS], [SEP] and [MASK]", "--tokenizer bert"
    elif family == "transformer2017" and tokenizer.end_of_text is None:
        why, fix = f"has no {END_OF_TEXT}, with which a translation begins and ends", "the path of a byte-level BPE"
    elif family != "bert" and is_wordpiece:
        why, fix = f"is a WordPiece, which is BERT's, and the weights are of {family}", "--tokenizer gpt2 or gpt1"
    else:
        return
    raise Error(source, why, f"name the tokenizer that the model was trained with, such as {fix}", BAD_INPUT)


def _from_file(path: Path) -> Tokenizer:
    return _from_tree(json.loads(path.read_bytes()))


def _from_tree(tree: Tree) -> Tokenizer:
    """Raises any exception for a tree that is malformed, and ValueError for rules that are not ours."""
    model = tree["model"]
    kind = model["type"]
    if kind not in ("BPE", "WordPiece", "WordLevel"):
        raise ValueError(f"it is of the kind {kind}")
    added = [token["content"] for token in tree["added_tokens"]]
    tokens = _in_order(model["vocab"] | {token["content"]: token["id"] for token in tree["added_tokens"]})
    if kind == "WordPiece":
        return WordPiece.from_vocabulary(tokens, _lowercase(tree))
    if kind == "WordLevel":
        return CharTokenizer.from_ids({token: i for i, token in enumerate(tokens)})
    _check_bpe(model)
    merges = [_pair(merge) for merge in model["merges"]]
    if model.get("end_of_word_suffix"):
        if "ByteLevel" in _kinds(tree.get("pre_tokenizer")):
            raise ValueError(f"its BPE marks ends of words by {_END_OF_WORD} on bytes, which neither GPT does")
        return _gpt1(model["vocab"], merges)
    _check_byte_level(tree)
    return ByteBPE.from_merges(model["vocab"], merges, added)


def _gpt1(vocab: dict[str, int], merges: list[tuple[str, str]]) -> GPT1BPE:
    if not any(token.endswith(_END_OF_WORD) for token in vocab):
        raise ValueError(f"its BPE does not mark ends of words by {_END_OF_WORD}")
    if _GPT1_UNKNOWN not in vocab:
        raise ValueError(f"its BPE of words has no {_GPT1_UNKNOWN}, as GPT-1's has")
    return GPT1BPE.from_merges(vocab, merges)


def _check_bpe(model: Tree) -> None:
    check_bpe(model)
    if model.get("end_of_word_suffix") not in (None, "", _END_OF_WORD):
        raise ValueError(f"its BPE marks ends of words by {model['end_of_word_suffix']!r}")
    for key in ("dropout", "byte_fallback", "ignore_merges", "fuse_unk"):
        if model.get(key):
            raise ValueError(f"its BPE goes by {key}, which ours does not")


def _kinds(rules: Tree | None) -> set[str]:
    """The types of a pre-tokenizer or normalizer, and of all that a Sequence of them holds."""
    rules = rules or {"type": ""}
    steps = rules.get("pretokenizers") or rules.get("normalizers") or []
    return {rules["type"]}.union(*map(_kinds, steps))


def _check_byte_level(tree: Tree) -> None:
    rules = tree["pre_tokenizer"] or {}
    if rules.get("type") != "ByteLevel" or tree["normalizer"] is not None or not rules.get("use_regex", True):
        raise ValueError("its BPE is not GPT-2's, on bytes and without a normalizer")
    if rules.get("add_prefix_space"):
        raise ValueError("it puts a space before each text (add_prefix_space), which ours does not")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2:
        raise ValueError(f"its merge {merge!r} is no pair")
    return pair[0], pair[1]


def _in_order(ids: Mapping[str, int]) -> list[str]:
    """Tokens by id. Raises ValueError unless the ids are 0, 1, 2 and so on."""
    tokens = sorted(ids, key=ids.__getitem__)
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("its ids are not 0, 1, 2 and so on, once each")
    return tokens


def _lowercase(tree: Tree) -> bool:
    """Whether a WordPiece's text is lower-cased, by the library's rules of BERT or by ours.

    Raises ValueError, naming the rule, for any others.
    """
    model, normalizer, splits = tree["model"], tree["normalizer"], tree["pre_tokenizer"]
    for key, ours in (("continuing_subword_prefix", "##"), ("unk_token", "[UNK]")):
        if model.get(key, ours) != ours:
            raise ValueError(f"its {key} is {model[key]!r}, and BERT's is {ours!r}")
    for lowercase in (True, False):
        ours = json.loads(WordPiece.from_vocabulary(SPECIAL, lowercase).to_json())
        if (normalizer, splits) == (ours["normalizer"], ours["pre_tokenizer"]):
            return lowercase
    if normalizer is None or normalizer["type"] != "BertNormalizer":
        raise ValueError(f"its normalizer ({', '.join(sorted(_kinds(normalizer))) or 'none'}) is not BERT's")
    if splits is None or splits["type"] != "BertPreTokenizer":
        raise ValueError(f"its pre-tokenizer ({', '.join(sorted(_kinds(splits))) or 'none'}) is not BERT's")
    lowercase = normalizer["lowercase"]
    if normalizer.get("strip_accents") not in (None, lowercase) or not normalizer.get("handle_chinese_chars", True):
        raise ValueError("its rules for accents or Chinese characters are not BERT's")
    if not normalizer.get("clean_text", True):
        raise ValueError("it keeps control characters (clean_text), which BERT's removes")
    return bool(lowercase)


def _from_pair(vocab_file: Path, merges_file: Path) -> Tokenizer:
    if not merges_file.is_file():
        raise ValueError(f"{merges_file.name} beside it is missing")
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
    lowercase = settings.get("do_lower_case", True)
    if not isinstance(lowercase, bool):
        raise ValueError(f"{TOKENIZER_CONFIG} beside it has {lowercase!r} for do_lower_case, not true or false")
    return WordPiece.from_vocabulary(tokens, lowercase)


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
