"""GPT-1's byte-pair encoding of words (Radford et al. 2018, section 4.1; the released `text_utils.py`).

The released code repairs a text with ftfy, standardises it, splits it with spaCy's English tokenizer, lower-cases the
words and encodes each by its merges, the last symbol of a word marked by "</w>". An unknown symbol has id 0.

Here all of that is a chain of replacements in one tokenizer.json: each step inserts spaces where spaCy would cut, and
the words are what lies between them. Neither ftfy nor spaCy is needed. Against both (ftfy 6.3, spaCy 3.8, the rules of
a blank English pipeline) the ids are equal on every line of WikiText-2's validation split and of tiny Shakespeare.
What is left out: ftfy's repair of wrongly decoded text, HTML entities, full-width and half-width forms and rare
ligatures; spaCy's faces of punctuation alone (">.<"), its protection of web addresses with capitals inside
("www.Example.com"), and its units and currencies beyond the common ones.
"""

import json
import re

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from classiclm.data.byte_bpe import published_bpe
from classiclm.data.locate import Download
from classiclm.data.tokenizer import LibraryTokenizer, check_size, pieces

GPT1_FILES = (
    Download(
        "tokenizers/gpt1-encoder_bpe_40000.json",
        "https://raw.githubusercontent.com/openai/finetune-transformer-lm/master/model/encoder_bpe_40000.json",
        "fdf49b19e7de236852091da09b84a7a3cd5e7b0e79916376cf45f6b8127b8078",
    ),
    Download(
        "tokenizers/gpt1-vocab_40000.bpe",
        "https://raw.githubusercontent.com/openai/finetune-transformer-lm/master/model/vocab_40000.bpe",
        "0ea9b51ae695073cd871e0358f7016311d671a7ff3963e367d5236522f294725",
    ),
)
_UNKNOWN, _WORD_END = "<unk>", "</w>"
_OPTIONS = {"unk_token": _UNKNOWN, "end_of_word_suffix": _WORD_END}


# The characters that matter, as the inside of [...]. In these patterns every character beyond ASCII is escaped, as the
# library cannot print a tokenizer otherwise.
_QUOTES = r"'`\u00ab\u00bb\u3008-\u3011\u3014\u3015"
_MARKS = r":&#<>\u00a1\u00b7\u00bf\u060c\u061b\u061f\u066a\u06d4\u0964\u3001\u3002"
_CURRENCIES = r"$\u00a3\u00a5\u0e3f\u20a0-\u20bf"
_OPENING = rf"{_QUOTES}{_MARKS}{_CURRENCIES}\u00a7%="  # what is cut off in front of a word
_ALONE = r'!"?;,()*+_\[\]{}\p{So}'  # always a word by itself, wherever it stands
_LOWER, _UPPER = r"\p{Ll}\p{Lo}", r"\p{Lu}\p{Lo}"  # spaCy counts letters without case as both
_UNITS = (
    r"[kdcmn\u00b5]?m|[kdcm]?m[\u00b2\u00b3]|ha|yd|in|ft|[km\u00b5]?g|t|lb|oz|kmh|mph|h?Pa|mbar|m?b|MB|k[bB]|KB|[gt]b"
    r"|[GT]B|[TGMK%]"
)
_START, _END = r"(?<!\S)", r"(?!\S)"

# Words that keep a final period, a final apostrophe, or one in front.
_ABBREVIATIONS = (
    "a.m p.m e.g E.g i.e I.e v.s vs Mr Mrs Ms Messrs Dr Prof Rev St Mt Jr Adm Gen Gov Rep Sen Bros co Co Corp Inc Ltd"
    " Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Ak Ala Ariz Ark Calif Colo Conn Del Fla Ga Ia Id Ill Ind Kan"
    " Kans Ky La Mass Md Mich Minn Miss Mo Mont Neb Nebr Nev Okla Ore Pa Tenn Va Wash Wis"
)
_ABBREVIATED = rf"(?:1[0-2]|[1-9])[ap]\.m|[a-z\u00e4\u00f6\u00fc]|{'|'.join(map(re.escape, _ABBREVIATIONS.split()))}"
_CLIPPED = "[Oo]l|[DdGg]oin|[Ll]ovin|[Hh]avin|[Nn]othin|[Nn]uthin|[Ss]omethin"
_APOSTROPHE_FIRST = "'(?:em|ll|nuff|[sS]|re|[Cc]ause|[Cc]o[sz]|[Cc]uz|bout|d)"
_FACES = r":[DOPXopx013>]|=[D3]|<3{1,3}"

# spaCy's contractions: stems, in lower case or with a capital, and what is cut off behind them.
_PERSONS = "i you he she it we they"
_QUESTIONS = "who what when where why how there that this these those"
_HELPERS = "ca could do does did had may might must need ought sha should wo would"
_CONTRACTIONS = (
    (f"{_PERSONS} {_QUESTIONS}", "'?ll|'?d|'ll've|llve|'d've|dve"),
    ("i you we they who what when where why how there these those", "'?ve"),
    ("you we they who what when where why how there these those", "'?re"),
    ("he she it who what when where why how there that this", "'?s"),
    ("i", "'?ma?"),
    (f"{_HELPERS} ai are is was were have has dare", "n'?t"),
    (_HELPERS, "n't've|ntve"),
    ("could might must should would not", "'?ve"),
    ("can", "not"),
    ("gon", "na"),
    ("got", "ta"),
    ("let", "'s"),
    ("c'm", "on"),
    ("how", "'d'y"),
)
_NO_CONTRACTIONS = "ill its hell shell shed were well whore"


def _either(words: str) -> str:
    """ "he she" -> a pattern for he, He, she and She."""
    return "(?:" + "|".join(f"[{word[0].upper()}{word[0]}]{word[1:]}" for word in words.split()) + ")"


def _standing_apart() -> str:
    """Where the standardisation, or spaCy after it, cuts whatever the word: around _ALONE, runs, dots and degrees."""
    runs = "|".join(rf"(?<={c})(?=[^\s{c}])|(?<=[^\s{c}])(?={c})" for c in (r"\-", "~", "/", r"\|"))
    dots = r"(?<=\.\.)(?=[^\s.])|(?<=[^\s.])(?=\.\.)"
    degrees = r"(?<=\u00b0[CFKcfk])(?=\.(?!\w))"
    return rf"(?<=[{_ALONE}])(?=\S)|(?<=\S)(?=[{_ALONE}])|{runs}|{dots}|{degrees}"


def _affixes() -> str:
    """Where spaCy cuts punctuation off the front and the end of a word, and units and currencies off a number.

    It peels one off after the other; here that is one pattern for up to six in front and four at the end.
    """
    whole = rf"(?:^|\s)[{_OPENING}]{{0,3}}"  # from here on the word is whole
    sentence_end = rf"(?<=[0-9{_LOWER}%\u00b2{_QUOTES}{_MARKS}]|[{_UPPER}]{{2}})\."
    not_ours = rf"(?<!{whole}(?:{_ABBREVIATED})|[0-9][mgt]|[\p{{L}}0-9][:<>=][a-z])"
    tail = rf"(?:'[sS]|(?<!{whole}(?:{_CLIPPED}))'|[{_QUOTES[1:]}{_MARKS}]|{not_ours}{sentence_end}(?!\.))"
    pair = rf"(?!(?<=[^']'|^')'(?!'|{_APOSTROPHE_FIRST[1:]}{tail}{{0,4}}{_END}))"  # '' is one mark
    kept = rf"(?!(?:{_APOSTROPHE_FIRST}|{_FACES}){tail}{{0,4}}{_END})"
    front = rf"{kept}[{_OPENING}]\K(?=\S)(?<=(?:^|\s)[{_OPENING}]{{1,6}}){pair}|(?<=(?:^|\s)(?:US|[AC])\$)(?=\S)"
    near_end = rf"(?<=\S)(?=[{_QUOTES}{_MARKS}.])(?=(?>\S{{1,10}})(?!\S))"  # only for speed
    end = rf"{near_end}{pair}(?={tail}{{1,4}}{_END})"
    number = rf"(?<=[0-9])(?=(?:(?:{_UNITS})\.?|[{_CURRENCIES}]){tail}{{0,4}}{_END})"
    return f"{front}|{end}|{number}"


def _contractions() -> str:
    r"""Where spaCy cuts a contraction, a whole word from its table. (\K: the match, which is empty, starts here.)"""
    rules = [rf"{_either(stems)}\K(?=(?:{endings}){_END})" for stems, endings in _CONTRACTIONS]
    rules += [rf"y'?\K(?=all{_END})", rf"(?:1[0-2]|[1-9])\K(?=[ap](?:m|\.m\.){_END})"]
    first = rf"{_START}(?!{_either(_NO_CONTRACTIONS)}{_END})(?:{'|'.join(rules)})"
    have = rf"(?='?ve{_END})(?<=(?:^|\s)(?:{_either(f'{_PERSONS} {_QUESTIONS}')}'?(?:ll|d)|{_either(_HELPERS)}n'?t))"
    return rf"{first}|{have}|(?=a{_END})(?<=(?:^|\s)[Ii](?:'m|m))|(?='y{_END})(?<=[Hh]ow'd)"


def _infixes() -> str:
    """Where spaCy cuts inside a word: powers, a period before a capital (not Ph.D.), and : < > = before a letter."""
    power = r"(?=\^[0-9-])(?<=[0-9])|(?<=[0-9]\^)(?=[0-9-])"
    before, after = rf"[{_LOWER}{_QUOTES}]", rf"[{_UPPER}{_QUOTES}]"
    period = rf"(?=\.{after})(?<={before})(?<!\sPh|^Ph)|(?<={before}\.)(?<!\sPh\.|^Ph\.)(?={after})"
    faces = rf"(?!(?<=:)[DOPXopx]\W{{0,4}}{_END}|(?<==)D\W{{0,4}}{_END})"
    sign = rf"(?=[:<>=]\p{{L}})(?<=[\p{{L}}0-9])|(?<=[\p{{L}}0-9][:<>=])(?=\p{{L}}){faces}"
    return f"{power}|{period}|{sign}"


def _rules() -> list[normalizers.Normalizer]:
    """Text -> lower-case words with single spaces in between, in the order of the released code."""
    control = r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]"
    ligatures = (("\ufb00", "ff"), ("\ufb01", "fi"), ("\ufb02", "fl"), ("\ufb03", "ffi"), ("\ufb04", "ffl"))
    ftfy = [
        *(normalizers.Replace(joined, letters) for joined, letters in ligatures),
        _replace(r"[\u02bc\u2018-\u201b\u00b4]", "'"),  # U+00B4 by text_standardize
        _replace(r"[\u201c-\u201f]", '"'),
        _replace(r"\r\n?|[\u2028\u2029]", "\n"),
        _replace(control, ""),
        normalizers.NFC(),
    ]
    text_standardize = [
        _replace(r"[\u2013-\u2015]", "-"),
        _replace(r"[\u2026\u0085]", "..."),  # U+0085 is Windows' ellipsis, says ftfy
        _replace(_standing_apart(), " "),
        _replace(r"[^\S\n]+", " "),
        _replace(r"\s*\n\s*", " \n "),
        normalizers.Strip(),
    ]
    spacy = [_replace(pattern, " ") for pattern in (_affixes(), _contractions(), _infixes())]
    final_sigma = _replace(r"(?<=\p{L})\u03a3(?!\p{L})", "\u03c2")
    return [*ftfy, *text_standardize, *spacy, final_sigma, normalizers.Lowercase()]


def _replace(pattern: str, content: str) -> normalizers.Replace:
    return normalizers.Replace(tokenizers.Regex(pattern), content)


def _with_rules(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(_rules())
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="removed")
    tokenizer.decoder = decoders.BPEDecoder(suffix=_WORD_END)
    return tokenizer


def _plain(trained: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same vocabulary and merges without special tokens."""
    model = json.loads(trained.to_str())["model"]
    merges = [(first, second) for first, second in model["merges"]]
    return _with_rules(models.BPE(vocab=model["vocab"], merges=merges, **_OPTIONS))


class GPT1BPE(LibraryTokenizer):
    """Byte-pair encoding of lower-case words (GPT-1, section 4.1).

    Decoding puts a space behind every word; case and spacing are lost, and an unknown symbol is "<unk>".
    """

    # A space between two ASCII letters or digits, where no rule looks across.
    border = re.compile("[0-9A-Za-z] (?=[0-9A-Za-z])")

    @classmethod
    def train(cls, text: str, vocab_size: int) -> "GPT1BPE":
        """Learn the merges from a text, standardised and split as GPT-1's was.

        The ids are laid out as in the published vocabulary: <unk>, the characters, the characters that end a word,
        the merges; only the line break is one of the characters and not the last token.
        Raises Error (exit 2) if the characters of the text are more than vocab_size.
        """
        tokenizer = _with_rules(models.BPE(**_OPTIONS))
        parts = pieces(text, cls.border)
        alphabet = sorted(set("".join(tokenizer.normalizer.normalize_str(part) for part in parts)) - {" "})
        symbols = [_UNKNOWN, *alphabet, *(c + _WORD_END for c in alphabet)]
        name, made_of = f"gpt1-bpe-{vocab_size}", "<unk> and the characters of the text, inside words and at their ends"
        check_size(name, vocab_size, len(symbols), made_of, "gpt1-bpe-2048")
        # given as special tokens, the characters get their ids in order; else in that of a hash table, by chance
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=symbols, end_of_word_suffix=_WORD_END, show_progress=False
        )
        tokenizer.train_from_iterator(parts, trainer)
        return cls(_plain(tokenizer))

    @classmethod
    def from_merges(cls, vocab: dict[str, int], merges: list[tuple[str, str]]) -> "GPT1BPE":
        """The tokenizer of a vocabulary, token -> id, and its merges in order."""
        return cls(_with_rules(models.BPE(vocab=vocab, merges=merges, **_OPTIONS)))

    @classmethod
    def published_gpt1(cls) -> "GPT1BPE":
        """The 40,478 tokens of GPT-1, from OpenAI's two files."""
        return cls(_with_rules(published_bpe(GPT1_FILES, "GPT-1's", **_OPTIONS)))

    @property
    def beginning(self) -> list[int]:
        """The line break between two lines; `encode` has none for a line break at an end of its text."""
        line_break = self._tokenizer.token_to_id("\n" + _WORD_END)
        return [] if line_break is None else [line_break]
