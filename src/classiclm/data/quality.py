"""The rules by which Gopher's makers kept web pages: "Scaling Language Models" (Rae et al. 2021), section A.1.1.

The paper leaves some things open. Here a word is what stands between white space; a line is one with something in it,
without the white space around it; a paragraph is what stands between blank lines; and shares of characters are shares
of those in all words, lines or paragraphs. A character that several n-grams cover counts once, as the paper asks, and
an n-gram that occurs once is no repetition.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from classiclm.config import NonNegative, PositiveFloat, Share
from classiclm.data.documents import Removal
from classiclm.data.words import Words, runs, single_blanks

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
BULLETS = ("•", "‣", "◦", "▪", "-", "*")
ELLIPSES = ("...", "…")


@dataclass(frozen=True)
class Gopher:
    """The thresholds of the Gopher rules: the paper's own, from the text of section A.1.1 and from Table A1."""

    min_words: NonNegative = 50  # fewest words
    max_words: NonNegative = 100_000  # most words
    min_word_length: PositiveFloat = 3.0  # smallest mean length of a word, in characters
    max_word_length: PositiveFloat = 10.0  # largest mean length of a word, in characters
    symbols: Share = 0.1  # most '#' per word, and most ellipses per word
    bullet_lines: Share = 0.9  # largest share of lines that begin with a bullet
    ellipsis_lines: Share = 0.3  # largest share of lines that end with an ellipsis
    alphabetic: Share = 0.8  # smallest share of words with an alphabetic character
    stop_words: NonNegative = 2  # fewest different ones of: the, be, to, of, and, that, have, with
    duplicate_lines: Share = 0.3  # largest share of lines that stood before
    duplicate_paragraphs: Share = 0.3  # largest share of paragraphs that stood before
    duplicate_line_characters: Share = 0.2  # largest share of characters in lines that stood before
    duplicate_paragraph_characters: Share = 0.2  # largest share of characters in paragraphs that stood before
    top_2_grams: Share = 0.2  # largest share of characters in the most frequent 2-gram
    top_3_grams: Share = 0.18  # largest share of characters in the most frequent 3-gram
    top_4_grams: Share = 0.16  # largest share of characters in the most frequent 4-gram
    duplicate_5_grams: Share = 0.15  # largest share of characters in 5-grams that stood before
    duplicate_6_grams: Share = 0.14  # largest share of characters in 6-grams that stood before
    duplicate_7_grams: Share = 0.13  # largest share of characters in 7-grams that stood before
    duplicate_8_grams: Share = 0.12  # largest share of characters in 8-grams that stood before
    duplicate_9_grams: Share = 0.11  # largest share of characters in 9-grams that stood before
    duplicate_10_grams: Share = 0.1  # largest share of characters in 10-grams that stood before

    @property
    def top_grams(self) -> dict[int, float]:
        """n -> the largest share of the most frequent n-gram."""
        return {2: self.top_2_grams, 3: self.top_3_grams, 4: self.top_4_grams}

    @property
    def duplicate_grams(self) -> dict[int, float]:
        """n -> the largest share of n-grams that stood before."""
        return {
            5: self.duplicate_5_grams, 6: self.duplicate_6_grams, 7: self.duplicate_7_grams,
            8: self.duplicate_8_grams, 9: self.duplicate_9_grams, 10: self.duplicate_10_grams,
        }  # fmt: skip


def gopher(text: str, rules: Gopher) -> str | Removal:
    """The text, or the first rule that it breaks, as in Removal("gopher: mean word length"). Cheap rules come first."""
    broken = next(_broken(text, rules), None)
    return text if broken is None else Removal(f"gopher: {broken}")


def _broken(text: str, rules: Gopher) -> Iterator[str]:
    """The names of the broken rules. A text that breaks the first ones may have no words to look at."""
    joined = single_blanks(text)
    n_words = joined.count(" ") + 1 if joined else 0
    if not rules.min_words <= n_words <= rules.max_words or not n_words:
        yield "words"
        return
    if not rules.min_word_length <= (len(joined) - n_words + 1) / n_words <= rules.max_word_length:
        yield "mean word length"
    if text.count("#") / n_words > rules.symbols:
        yield "hashes per word"
    if sum(map(text.count, ELLIPSES)) / n_words > rules.symbols:
        yield "ellipses per word"
    if _stop_words(text, rules.stop_words) < rules.stop_words:
        yield "stop words"
    yield from _broken_by_lines(text, rules)
    words = Words.of(joined)
    if _alphabetic(words) < rules.alphabetic:
        yield "words with a letter"
    yield from _broken_by_grams(words, rules)


_STOP_WORD = re.compile(rf"\b(?:{'|'.join(STOP_WORDS)})\b", re.IGNORECASE | re.ASCII)


def _stop_words(text: str, enough: int) -> int:
    """How many different stop words the text has; no more are looked for than are enough."""
    found: set[str] = set()
    matches = _STOP_WORD.finditer(text)
    while len(found) < enough and (match := next(matches, None)):
        found.add(match[0].lower())
    return len(found)


_BLANK_LINES = re.compile(r"\n\s*\n")


def _broken_by_lines(text: str, rules: Gopher) -> Iterator[str]:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    if sum(line.startswith(BULLETS) for line in lines) / len(lines) > rules.bullet_lines:
        yield "lines with a bullet"
    if sum(line.endswith(ELLIPSES) for line in lines) / len(lines) > rules.ellipsis_lines:
        yield "lines with an ellipsis"
    number, characters = duplicates(lines)
    if number > rules.duplicate_lines:
        yield "duplicate lines"
    if characters > rules.duplicate_line_characters:
        yield "characters in duplicate lines"
    number, characters = duplicates([part.strip() for part in _BLANK_LINES.split(text.strip())])
    if number > rules.duplicate_paragraphs:
        yield "duplicate paragraphs"
    if characters > rules.duplicate_paragraph_characters:
        yield "characters in duplicate paragraphs"


def duplicates(parts: Sequence[str]) -> tuple[float, float]:
    """The share of parts that equal an earlier one, and the share of all characters that they hold."""
    different = set(parts)
    characters, once = sum(map(len, parts)), sum(map(len, different))
    return (len(parts) - len(different)) / len(parts), (characters - once) / characters


@functools.cache
def _letters() -> np.ndarray:
    """(1114112,) of 0 and 1: which code points are letters."""
    return np.fromiter((chr(code).isalpha() for code in range(0x110000)), np.uint8, 0x110000)


def _alphabetic(words: Words) -> float:
    """The share of words with a letter."""
    before = np.zeros(len(words.codes) + 1, np.int64)
    np.cumsum(_letters()[words.codes], out=before[1:])
    return float((before[words.ends] > before[words.starts]).mean())


def _broken_by_grams(words: Words, rules: Gopher) -> Iterator[str]:
    hashes, lengths = words.hashes(), words.lengths
    for n, most in rules.top_grams.items():
        if top_share(hashes, lengths, n) > most:
            yield f"top {n}-gram"
    for n, most in rules.duplicate_grams.items():
        share = duplicate_share(hashes, lengths, n)
        if share > most:
            yield f"duplicate {n}-grams"
        if share <= min(rules.duplicate_grams.values()):  # longer n-grams cover no more
            return


def top_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """The share of characters in the most frequent n-gram, 0.0 if each is there once.

    hashes and lengths (W,) are of the words in their order. Of equally frequent n-grams it is the longest.
    """
    grams = runs(hashes, n)
    ordered = np.sort(grams)
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))  # of each group of equal ones
    counts = np.diff(ends, prepend=-1)
    if counts.max(initial=1) == 1:
        return 0.0
    most = np.flatnonzero(np.isin(grams, ordered[ends[counts == counts.max()]]))
    before = np.concatenate(([0], np.cumsum(lengths)))  # characters in front of each word
    longest = most[np.argmax(before[most + n] - before[most])]
    return _covered(grams == grams[longest], lengths, n)


def duplicate_share(hashes: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """The share of characters in n-grams that stood before in the text; arguments as in top_share."""
    grams = runs(hashes, n)
    ordered = np.sort(grams)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0.0
    first = np.unique(grams, return_index=True)[1]
    again = np.ones(len(grams), bool)
    again[first] = False
    return _covered(again, lengths, n)


def _covered(grams: np.ndarray, lengths: np.ndarray, n: int) -> float:
    """(W - n + 1,) which n-grams -> the share of the characters of all words that they hold, each counted once."""
    changes = np.zeros(len(lengths) + 1, np.int64)
    changes[: len(grams)] += grams
    changes[n : n + len(grams)] -= grams
    return float(lengths[np.cumsum(changes[:-1]) > 0].sum() / lengths.sum())
