"""Duplicates: documents of the same words, and documents of nearly the same words (MinHash and its index).

How alike two documents are is the share of their runs of five words that both have (the Jaccard similarity of the two
sets of runs; Broder 1997). A signature is short and shows it: of each of `n_perm` random permutations of all possible
runs, the first one that the document has. Two signatures agree at a place with just the probability that the documents
are alike. The index finds similar ones without comparing all: signatures are cut into bands, and only documents with
an equal band are compared ("locality-sensitive hashing").

Permutations are h -> a h + b modulo 2^32, a odd, of well mixed h. That is the scheme "affine32" of the library
datasketch, so signatures can be handed to it. Its index takes 5.7 kB per document, the one here 0.9 kB.
"""

import functools
import hashlib
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from classiclm.config import Positive, Share
from classiclm.data.cleaning import Effects
from classiclm.data.documents import Document
from classiclm.data.words import Words, runs, single_blanks

EXACT, NEAR = "exact duplicate", "near-duplicate"  # reasons of removal

_WHITE = b" \t\n\v\f\r\x1c\x1d\x1e\x1f"  # ASCII's; NFKC makes blanks of nearly all others
_LOWER = bytes.maketrans(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ", b"abcdefghijklmnopqrstuvwxyz")
_BLOCK = 512  # runs permuted at a time: (512, 128) words of 32 bits stay in the cache
_SURE = 0.999  # chance that documents well above the threshold, halfway to equality, share a band


@dataclass(frozen=True)
class Near:
    """When two documents are near-duplicates."""

    threshold: Share = 0.8  # least share of their runs of words that both have, as estimated
    n_perm: Annotated[Positive, Field(ge=16, le=4096)] = 128  # places in a signature: estimates err by 0.5 / √n_perm
    shingle: Annotated[Positive, Field(le=100)] = 5  # words in a run


def normalised(text: str) -> str:
    """The text without what does not make two documents different: case, width and the kind of white space.

    Unicode's compatibility form (NFKC: a ligature is its letters, a full-width letter is the letter), casefolded, each
    run of white space one blank, none at the ends.
    """
    compatible = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return single_blanks(compatible.casefold())


def content_key(text: str) -> int:
    """64 bits of BLAKE2b of the text, equal for exact duplicates, on any machine: white space, the case of ASCII
    letters and what Unicode's compatibility form (NFKC) makes equal do not count.

    Every document of every corpus comes by here, so what is left out is what can be left out at the speed of memory.
    """
    compatible = text if text.isascii() else unicodedata.normalize("NFKC", text)
    content = compatible.encode("utf-8", "surrogatepass").translate(_LOWER, _WHITE)  # a byte that was not UTF-8 passes
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def shingles(text: str, words: int) -> np.ndarray:
    """(S,) uint32: hashes of the runs of so many words of the normalised text; of all of it if it has fewer words."""
    hashes = Words.of(normalised(text)).hashes()  # (W,)
    return (runs(hashes, min(words, len(hashes))) >> np.uint64(32)).astype(np.uint32)


def signature(text: str, settings: Near) -> np.ndarray:
    """(n_perm,) uint32: MinHash of the text's runs of words. Equal on every machine and in every process."""
    mixed = _mix(shingles(text, settings.shingle))
    a, b = _permutations(settings.n_perm)
    result = np.full(settings.n_perm, 2**32 - 1, np.uint32)
    for start in range(0, len(mixed), _BLOCK):
        permuted = mixed[start : start + _BLOCK, None] * a + b  # (up to 512, n_perm); overflow is the modulus
        np.minimum(result, permuted.min(axis=0), out=result)
    return result


@functools.cache
def _permutations(n: int) -> np.ndarray:
    """(2, n) uint32: the factors, odd, and the summands of n permutations of all 32-bit words."""
    random = hashlib.shake_128(b"classiclm.data.duplicates").digest(8 * n)  # no generator whose stream may change
    result = np.frombuffer(random, "<u4").astype(np.uint32).reshape(2, n)
    result[0] |= 1
    return result


def _mix(h: np.ndarray) -> np.ndarray:
    """MurmurHash3's finaliser (Appleby 2011), a permutation of 32-bit words that leaves no pattern in them."""
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def bands(settings: Near) -> tuple[int, int]:
    """How signatures are cut: (bands, places in each), (16, 8) unless set.

    The longest bands, for these let the fewest documents be compared in vain, with which two documents whose
    similarity lies halfway between the threshold and 1 are found with a probability of 99.9 %.
    """
    similarity = (settings.threshold + 1) / 2
    for places in range(settings.n_perm, 1, -1):
        n = settings.n_perm // places
        if 1 - (1 - similarity**places) ** n >= _SURE:
            return n, places
    return settings.n_perm, 1


class NearIndex:
    """The kept documents' names and signatures, and for each band a hash table of them with chained buckets.

    At the default settings a document takes 0.9 kB, its name included, however long it is.
    """

    def __init__(self, settings: Near):
        self.settings = settings
        self._bands = bands(settings)
        self._names: list[str] = []
        random = hashlib.shake_128(b"classiclm.data.duplicates/bands").digest(8 * self._bands[1])
        self._factors = np.frombuffer(random, "<u8").astype(np.uint64) | np.uint64(1)
        self._allocate(1024, np.empty((0, settings.n_perm), np.uint32))

    def __len__(self) -> int:
        return len(self._names)

    @property
    def n_bytes(self) -> int:
        """Bytes of its arrays, names not counted."""
        return self._signatures.nbytes + self._earlier.nbytes + self._latest.nbytes

    def add(self, name: str, signature: np.ndarray) -> str | None:
        """Add a document unless it is a near-duplicate of one that is there; then its name, of several the latest."""
        row = len(self._names)
        buckets = self._buckets(signature[None])[0]
        found = self._find(signature, buckets)
        if found is not None:
            return self._names[found]
        if row == len(self._signatures):
            self._allocate(2 * row, self._signatures)
            buckets = self._buckets(signature[None])[0]  # the tables have grown
        self._names.append(name)
        self._signatures[row] = signature
        self._link(row, buckets)
        return None

    def _find(self, signature: np.ndarray, buckets: np.ndarray) -> int | None:
        """The latest document in any of the buckets, one of each band, whose signature is similar enough."""
        band = np.arange(len(buckets))
        rows = self._latest[band, buckets]
        found = []
        while len(rows := rows[(there := rows >= 0)]):
            band = band[there]
            alike = (self._signatures[rows] == signature).mean(axis=1) >= self.settings.threshold
            found += rows[alike].tolist()
            rows = self._earlier[rows, band]
        return max(found, default=None)

    def _buckets(self, signatures: np.ndarray) -> np.ndarray:
        """(N, n_perm) signatures -> (N, bands) places in the hash tables (multiply-shift; Dietzfelbinger 1997)."""
        n, places = self._bands
        parts = signatures[:, : n * places].reshape(-1, n, places)
        bits = self._latest.shape[1].bit_length() - 1
        return ((parts * self._factors).sum(axis=2, dtype=np.uint64) >> np.uint64(64 - bits)).astype(np.int64)

    def _link(self, row: int, buckets: np.ndarray) -> None:
        band = np.arange(len(buckets))
        self._earlier[row] = self._latest[band, buckets]
        self._latest[band, buckets] = row

    def _allocate(self, capacity: int, signatures: np.ndarray) -> None:
        """Make room for so many documents (a power of two) and fill it with those that are there."""
        self._signatures = np.empty((capacity, self.settings.n_perm), np.uint32)
        self._signatures[: len(signatures)] = signatures
        self._earlier = np.empty((capacity, self._bands[0]), np.int32)  # -1: none
        self._latest = np.full((self._bands[0], capacity), -1, np.int32)
        for start in range(0, len(signatures), _BLOCK):
            for row, buckets in enumerate(self._buckets(signatures[start : start + _BLOCK]), start):
                self._link(row, buckets)


def exact(documents: Iterable[Document], effects: Effects) -> Iterator[Document]:
    """The documents without those whose normalised text an earlier one has; 0.2 kB of memory for each that stays."""
    seen: dict[int, str] = {}
    for document in documents:
        effects.enter(document)
        key = content_key(document.text)
        if key in seen:
            effects.remove(document, EXACT, seen[key])
        else:
            seen[key] = document.name
            effects.keep(document, document.text)
            yield document


def near(documents: Iterable[Document], settings: Near, effects: Effects) -> Iterator[Document]:
    """The documents without near-duplicates of earlier ones that stay; memory: see NearIndex."""
    index = NearIndex(settings)
    for document in documents:
        effects.enter(document)
        original = index.add(document.name, signature(document.text, settings))
        if original is None:
            effects.keep(document, document.text)
            yield document
        else:
            effects.remove(document, NEAR, original)
