"""BERT's WordPiece (Devlin et al. 2018, section 3; the released `tokenization.py`), published or learnt from a text.

A text is cleaned, lower-cased and stripped of its accents, split at white space and around punctuation and Chinese
characters; then each word is cut greedily into the longest pieces of the vocabulary, those inside a word written with
"##" in front. A word that cannot be cut, or of more than 200 characters, is [UNK] as a whole.

The rules are spelt out here instead of taken from the library's BertNormalizer and BertPreTokenizer, because those
delete private-use characters, join 256 Chinese ones (U+2B820 to U+2B91F) to words and keep to an old Unicode table.
What then still differs from the released code under Python 3.11 is Unicode itself: U+11938, which the library does
not decompose, U+1171E, and the characters that came after Python's table, which are letters to it, and marks or
punctuation here.
"""

import re
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from classiclm.data.locate import Download, locate
from classiclm.data.tokenizer import LibraryTokenizer, check_size, pieces, reason
from classiclm.errors import BAD_INPUT, Error

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_FILE = Download(
    "tokenizers/bert-base-uncased-vocab.txt",
    "https://huggingface.co/google-bert/bert-base-uncased/resolve/main/vocab.txt",
    "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
)
_INSIDE = "##"
_LONGEST_WORD = 200  # max_input_chars_per_word of the released code; transformers has 100

# In these patterns every character beyond ASCII is escaped, as the library cannot print a tokenizer otherwise.
_REMOVED = r"[\x{0}-\x{8}\x{b}\x{c}\x{e}-\x{1f}\x{7f}-\x{9f}\x{fffd}\p{Cf}]"  # control and format characters
_ACCENTS = r"\p{Mn}"
_FINAL_SIGMA = r"(?<=\p{Cased}\p{Case_Ignorable}*)\x{3a3}(?!\p{Case_Ignorable}*\p{Cased})"
_CHINESE = (
    r"\x{4e00}-\x{9fff}\x{3400}-\x{4dbf}\x{20000}-\x{2a6df}\x{2a700}-\x{2ceaf}\x{f900}-\x{faff}\x{2f800}-\x{2fa1f}"
)
_WORD_OF_ITS_OWN = rf"[!-/:-@\[-`{{-~\p{{P}}{_CHINESE}]"  # all ASCII but letters and digits counts as punctuation


class WordPiece(LibraryTokenizer):
    """Greedy longest pieces of words; `pad`, `unk`, `cls`, `sep` and `mask` are the ids of the special tokens.

    `encode` gives the pieces alone, without [CLS] and [SEP]. `decode` puts a space between words and shows special
    tokens; case, accents and the original spacing are lost.
    """

    border = re.compile("[ \n]")

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        super().__init__(tokenizer)
        self.pad, self.unk, self.cls, self.sep, self.mask = (_id(tokenizer, token) for token in SPECIAL)

    @classmethod
    def from_vocabulary(cls, vocabulary: Sequence[str], lowercase: bool = True) -> "WordPiece":
        """The tokenizer with these pieces, in the order of their ids. A cased one keeps case and accents.

        Raises Error (exit 3) for a piece that comes twice, or if a special token is not among them.
        """
        ids = {piece: i for i, piece in enumerate(vocabulary)}
        missing = [token for token in SPECIAL if token not in ids]
        if missing or len(ids) != len(vocabulary):
            why = f"lacks {', '.join(missing)}" if missing else "has a piece twice"
            raise Error("vocabulary", why, "give BERT's vocab.txt, one piece per line", BAD_INPUT)
        model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=_LONGEST_WORD)
        tokenizer = _with_rules(model, lowercase)
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.post_processor = (
            processors.TemplateProcessing(  # for others that read the file; encode() goes without
                single="[CLS] $A [SEP]",
                pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
            )
        )
        return cls(tokenizer)

    @classmethod
    def published_bert(cls) -> "WordPiece":
        """The 30,522 lower-case pieces of BERT-base and BERT-large, from Google's vocab.txt."""
        path = locate(BERT_FILE)
        try:
            return cls.from_vocabulary(path.read_text(encoding="utf-8").split("\n")[:-1])
        except (UnicodeDecodeError, Error) as e:
            fix = "restore the file as Google published it"
            raise Error(path, f"is not BERT's vocabulary ({reason(e)})", fix, BAD_INPUT) from e

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "WordPiece":
        """Lower-case pieces learnt from the text: its characters, then the pairs of pieces that are most frequent.

        BERT's own learner was never released (it was internal C++); its description is that of BPE on words, with
        likelihood in place of frequency. This is the `tokenizers` library's, which goes by frequency.
        Raises Error (exit 2) if the special tokens and the characters of the text are more than vocab_size.
        """
        parts = pieces(text, cls.border)
        tokenizer = _with_rules(models.WordPiece(unk_token="[UNK]"), lowercase=True)
        symbols = [*SPECIAL, *_characters(tokenizer, parts)]
        check_size(
            f"wordpiece-{vocab_size}",
            vocab_size,
            len(symbols),
            "five special tokens and the characters of the text",
            "wordpiece-2048",
        )
        # given as special tokens, the characters get their ids in order; else in that of a hash table, by chance
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=symbols, show_progress=False)
        tokenizer.train_from_iterator(parts, trainer)
        ids = tokenizer.get_vocab()
        return cls.from_vocabulary(sorted(ids, key=ids.__getitem__))


def _id(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise Error("vocabulary", f"lacks {token}", "give BERT's vocab.txt, one piece per line", BAD_INPUT)
    return found


def _with_rules(model: models.WordPiece, lowercase: bool) -> tokenizers.Tokenizer:
    """The released BasicTokenizer as normalizers and splits."""
    tokenizer = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [_replace(_REMOVED, "")]
    if lowercase:
        steps += [_replace(_FINAL_SIGMA, "\u03c2"), normalizers.Lowercase(), normalizers.NFD(), _replace(_ACCENTS, "")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    alone = pre_tokenizers.Split(tokenizers.Regex(_WORD_OF_ITS_OWN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), alone])
    tokenizer.decoder = decoders.WordPiece(prefix=_INSIDE, cleanup=False)
    return tokenizer


def _replace(pattern: str, content: str) -> normalizers.Replace:
    return normalizers.Replace(tokenizers.Regex(pattern), content)


def _characters(tokenizer: tokenizers.Tokenizer, parts: list[str]) -> list[str]:
    """The characters of the text, then again with ## those that can be inside a word; in code point order."""
    words: set[str] = set()
    for part in parts:
        cleaned = tokenizer.normalizer.normalize_str(part)
        words |= {word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(cleaned)}
    characters = set("".join(words))
    inside = {character for word in words if len(word) > 1 for character in word}
    inside |= set(filter(str.isalnum, characters))  # so that a new arrangement of known letters is not unknown
    return [*sorted(characters), *(_INSIDE + character for character in sorted(inside))]
