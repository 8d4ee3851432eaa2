"""Byte-level BPE at seven times the speed: tiktoken, where it provably gives the ids that the vocabulary's merges give.

The `tokenizers` library joins the pairs that its list of merges names. tiktoken knows no such list: it joins any two
neighbours that together are a token, the lowest id first. The two agree on every text if
(1) ids ascend along the merges, and no two merges make the same token;
(2) every token, cut to its bytes, is put together again by the merges.
For suppose that on some text the steps agree so far, and now tiktoken joins x and y to a token t. No token has ever
crossed the borders of t, so within them the same happened as to t alone, in the same order; by (2) that order ends with
the one merge that makes t, by (1) the only one, so this merge is x + y. Both conditions are checked here.
"""

import functools
import json
from typing import Any

import numpy as np
import tokenizers

# GPT-2's way to cut a text (openai/gpt-2, src/encoder.py), as `ByteLevel` of the tokenizers library has it. Possessive
# forms ("++") cut the same places and never go back over what they have read.
_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class RankedBPE:
    """tiktoken's encoder over a vocabulary; `make_ranked` checks whether there may be one."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        self._encoding = tiktoken.Encoding("bytes", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """The ids of a text, uint32."""
        return self._encoding.encode_to_numpy(text, disallowed_special=())


def make_ranked(tokenizer: tokenizers.Tokenizer) -> RankedBPE | None:
    """The fast encoder of a byte-level BPE, or None: tiktoken is missing, or might give other ids."""
    try:
        import tiktoken  # noqa: F401  of the extra "data"
    except ImportError:
        return None
    ranks = equal_ranks(tokenizer)
    return None if ranks is None else RankedBPE(ranks)


def equal_ranks(tokenizer: tokenizers.Tokenizer) -> dict[bytes, int] | None:
    """Bytes of a token -> its id, special tokens left out; None unless ids alone say what the merges say."""
    rules = json.loads(tokenizer.to_str())
    model = rules["model"]
    added = rules["added_tokens"]
    if not _is_plain(rules) or not _ascends(model) or not all(token["special"] for token in added):
        return None
    special = {token["content"] for token in added}
    byte_of = bytes_of_characters()
    ranks: dict[bytes, int] = {}
    for token, i in model["vocab"].items():
        if token in special:
            continue
        if not set(token) <= byte_of.keys():
            return None
        ranks[bytes(byte_of[character] for character in token)] = i
    whole = all(len(ranked) == 1 or _is_whole(tokenizer, token) for ranked, token in _spelled(ranks, model, special))
    has_all_bytes = all(bytes([byte]) in ranks for byte in range(256))
    return ranks if whole and has_all_bytes else None


def _spelled(ranks: dict[bytes, int], model: dict[str, Any], special: set[str]) -> zip:
    return zip(ranks, (token for token in model["vocab"] if token not in special), strict=True)


def _is_plain(rules: dict[str, Any]) -> bool:
    """Whether a tokenizer.json cuts a text as GPT-2 does, and does no more."""
    cut = rules["pre_tokenizer"] or {}
    is_gpt2s = cut.get("type") == "ByteLevel" and cut.get("use_regex") and not cut.get("add_prefix_space")
    model = rules["model"]
    extras = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return bool(is_gpt2s) and rules["normalizer"] is None and not any(model.get(key) for key in extras)


def _ascends(model: dict[str, Any]) -> bool:
    """Condition (1)."""
    made = [model["vocab"].get(left + right, -1) for left, right in model["merges"]]
    return all(a < b for a, b in zip([-1, *made], made, strict=False))


def _is_whole(tokenizer: tokenizers.Tokenizer, token: str) -> bool:
    """Condition (2) for one token."""
    return len(tokenizer.model.tokenize(token)) == 1


@functools.cache
def bytes_of_characters() -> dict[str, int]:
    """The visible character that stands for each byte in a byte-level vocabulary -> that byte.

    Printable Latin-1 stands for itself, the rest for U+0100, U+0101, ... (openai/gpt-2, src/encoder.py).
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
