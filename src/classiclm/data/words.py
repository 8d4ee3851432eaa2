"""The words of a text as arrays: where they stand, and a 64-bit hash of each. All in NumPy, no loop over words."""

import functools
import hashlib
from dataclasses import dataclass

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # of characters in a word; odd, so that it has an inverse modulo 2^64
_STEP = 0xD1342543DE82EF95  # of words in a run
_WINDOW = 1 << 14  # characters hashed at a time: the arrays stay in the cache, and memory does not grow with the text
# What str.split() takes for white space, but for the blank itself.
_ASCII_SPACE = "\t\n\v\f\r\x1c\x1d\x1e\x1f"
_OTHER_SPACE = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


def single_blanks(text: str) -> str:
    """ " ".join(text.split()), without a list of the words: faster, and a long text takes no memory but its own."""
    for character in _ASCII_SPACE if text.isascii() else _ASCII_SPACE + _OTHER_SPACE:
        text = text.replace(character, " ")
    while "  " in text:
        text = text.replace("  ", " ")
    return text.strip(" ")


@dataclass(frozen=True)
class Words:
    """The words of a text whose words are parted by one blank each; W = 1, of length 0, for the empty text."""

    codes: np.ndarray  # (N,) uint32: the code points of the text
    starts: np.ndarray  # (W,) of each word in codes
    ends: np.ndarray  # (W,) one behind its last character

    @classmethod
    def of(cls, text: str) -> "Words":
        """Find the words of a text in which no white space stands but single blanks between words."""
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        blanks = np.flatnonzero(codes == ord(" "))
        return cls(codes, np.concatenate(([0], blanks + 1)), np.concatenate((blanks, [len(codes)])))

    @property
    def lengths(self) -> np.ndarray:
        """(W,) characters of each word."""
        return self.ends - self.starts

    def hashes(self) -> np.ndarray:
        """(W,) uint64: a polynomial in the code points of each word, modulo 2^64, well mixed."""
        result = np.empty(len(self.starts), np.uint64)
        first = 0
        while first < len(result):
            begin = int(self.starts[first])
            last = int(np.searchsorted(self.ends, begin + _WINDOW, side="right"))
            if last == first:  # one word longer than the window
                result[first] = _digest(self.codes[begin : self.ends[first]])
                last = first + 1
            else:
                codes = self.codes[begin : self.ends[last - 1]]
                result[first:last] = _polynomials(codes, self.starts[first:last] - begin, self.ends[first:last] - begin)
            first = last
        return _mix(result)


def _polynomials(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Σ_i codes[start + i] · _BASE^i of each word: a difference of running sums, shifted back. Overflow is meant."""
    powers, inverses = _powers()
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(codes * powers[: len(codes)], out=sums[1:])
    return (sums[ends] - sums[starts]) * inverses[starts]


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): the polynomial of a short word is a small number."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@functools.cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """_BASE^i and _BASE^-i modulo 2^64 for each place in a window, (_WINDOW + 1,) uint64."""
    powers = [np.full(_WINDOW + 1, base, np.uint64) for base in (_BASE, pow(_BASE, -1, 1 << 64))]
    for power in powers:
        power[0] = 1
        np.cumprod(power, out=power)
    return powers[0], powers[1]


def _digest(codes: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(codes.tobytes(), digest_size=8).digest(), "little")


def runs(hashes: np.ndarray, n: int) -> np.ndarray:
    """(W,) hashes of words -> (W - n + 1,) hashes of each run of n words."""
    result = hashes[: max(0, len(hashes) - n + 1)].copy()
    for i in range(1, n):
        result *= np.uint64(_STEP)
        result += hashes[i : i + len(result)]
    return result
