"""GPT-2's byte-level byte-pair encoding (GPT-2, section 2.2), learnt from a text or as OpenAI published it."""

import functools
import json
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from classiclm.data.locate import Download, locate
from classiclm.data.ranked import RankedBPE, make_ranked
from classiclm.data.tokenizer import LibraryTokenizer, check_size, check_unicode, pieces, reason, without_panic
from classiclm.errors import BAD_INPUT, Error

END_OF_TEXT = "<|endoftext|>"
_LONG = 1 << 16  # characters from which on the fast encoder, which takes half a second to set up, pays

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


class ByteBPE(LibraryTokenizer):
    """Byte-level byte-pair encoding (GPT-2, section 2.2): no text is unknown, and decoding gives it back exactly."""

    # Behind a single line break between words GPT-2's pattern always cuts. (In a run of white space it cuts before the
    # last character, which it finds by what follows.)
    border = re.compile(r"\S\n(?=\S)")

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        super().__init__(tokenizer)
        self.end_of_text = tokenizer.token_to_id(END_OF_TEXT)

    @functools.cached_property
    def ranked(self) -> RankedBPE | None:
        """The fast encoder, which gives the same ids; None if there is none for this vocabulary on this machine."""
        return make_ranked(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        if len(text) < _LONG or self.ranked is None:
            return super().encode(text)
        check_unicode(text)
        return self.ranked.encode(text)

    def encode_array(self, text: str) -> np.ndarray:
        if len(text) < _LONG or self.ranked is None:
            return super().encode_array(text)
        check_unicode(text)
        return self.ranked.encode_array(text).astype(self.dtype)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self.ranked is None:
            return super().encode_documents(texts)
        for text in texts:
            check_unicode(text)
        return [self.ranked.encode_array(text).astype(self.dtype) for text in texts]

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "ByteBPE":
        """Merge the most frequent pairs of the text until there are vocab_size tokens (256 bytes and one special)."""
        check_size(f"bpe-{vocab_size}", vocab_size, 257, "256 bytes and one special token", "bpe-512")
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(pieces(text, cls.border), trainer)
        return cls(tokenizer)

    @classmethod
    def from_merges(
        cls, vocab: dict[str, int], merges: list[tuple[str, str]], special: Sequence[str] = (END_OF_TEXT,)
    ) -> "ByteBPE":
        """The tokenizer of a vocabulary, token -> id, and its merges in order. `special` tokens are never text."""
        tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
        tokenizer.add_special_tokens(list(special))
        return cls(tokenizer)

    @classmethod
    def published_gpt2(cls) -> "ByteBPE":
        """The 50,257 tokens of GPT-2, from OpenAI's two files."""
        tokenizer = _byte_level(published_bpe(GPT2_FILES, "GPT-2's"))
        tokenizer.add_special_tokens([END_OF_TEXT])
        return cls(tokenizer)


def published_bpe(files: tuple[Download, Download], whose: str, **options: str) -> models.BPE:
    """The model in OpenAI's pair of files, ids and merges. Raises Error (exit 3) if they do not fit together."""
    vocab_file, merges_file = (locate(file) for file in files)
    try:
        vocab = json.loads(vocab_file.read_bytes())
        lines = merges_file.read_text(encoding="utf-8").splitlines()[1:]  # the first line is "#version: 0.2"
        merges = [(a, b) for a, b in (line.split(" ") for line in lines if line)]
        with without_panic():
            return models.BPE(vocab=vocab, merges=merges, **options)
    except Exception as e:  # the library raises plain Exception for merges that do not fit
        why = f"and {merges_file.name} are not {whose} vocabulary ({reason(e)})"
        raise Error(vocab_file, why, "restore both files as OpenAI published them", BAD_INPUT) from e


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # splits by GPT-2's pattern
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
