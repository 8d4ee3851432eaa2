"""Exact and near-duplicates: plain Python sets give the true similarity, datasketch the signatures and the index."""

import hashlib
import os
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.config import validate
from classiclm.data.cleaning import Effects
from classiclm.data.documents import Document
from classiclm.data.duplicates import (
    Near,
    NearIndex,
    _permutations,
    bands,
    content_key,
    exact,
    near,
    normalised,
    shingles,
    signature,
)
from classiclm.data.words import Words, runs, single_blanks
from classiclm.errors import Error

DEFAULT = Near()
ANY_TEXT = st.text(st.sampled_from("aAbß ﬁＡ\u00a0\t\n\u2003é\u0301\udc80日0")) | st.text()


def code_points():
    return map(chr, range(0x110000))


@given(ANY_TEXT)
def test_normalised_text_is_folded_with_single_blanks(text):
    assert normalised(text) == " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def test_every_white_space_of_python_is_one():
    spaces = "".join(filter(str.isspace, code_points()))
    assert single_blanks(f"a{spaces}b{spaces}") == "a b"
    assert single_blanks("".join(f"a{space}" for space in spaces)) == " ".join("a" * len(spaces))


def test_case_width_ligatures_and_white_space_make_no_difference():
    assert content_key("The ﬁrst\u00a0line.\r\n\r\nＴＷＯ") == content_key("  the first LINE.\n two ")
    assert content_key("Straße") == content_key("STRAßE") != content_key("Strasse")


@given(st.text("ab \n", max_size=8), st.text("ab \n", max_size=8))
def test_keys_are_equal_just_where_the_letters_are(a, b):
    assert (content_key(a) == content_key(b)) == ("".join(a.split()) == "".join(b.split()))


def test_the_key_is_64_bits_of_blake2b():
    digest = hashlib.blake2b(b"tobeornot", digest_size=8).digest()
    assert content_key(" To be,\tor not".replace(",", "")) == sum(byte << 8 * i for i, byte in enumerate(digest))
    assert content_key("\udc80") != content_key("\udc81")  # bytes that were no UTF-8


@given(st.lists(st.text("ab日é", min_size=1, max_size=4), max_size=12))
def test_words_are_found_and_told_apart_by_their_hashes(words):
    found = Words.of(" ".join(words))
    assert found.lengths.tolist() == ([len(word) for word in words] or [0])
    assert len(set(found.hashes().tolist())) == len(set(words or [""]))


def test_a_word_has_the_same_hash_anywhere_in_a_long_text():
    words = [random.Random(i).choice(["to", "be", "incomprehensibilities", "é" * 700]) for i in range(20_000)]
    hashes = Words.of(" ".join(words)).hashes()
    assert {word: {int(h) for h, w in zip(hashes, words, strict=True) if w == word} for word in set(words)} == {
        word: {int(Words.of(word).hashes()[0])} for word in set(words)
    }


def test_a_word_longer_than_any_window_is_told_from_one_that_ends_otherwise():
    long = "x" * 100_000
    a, b, c, d = Words.of(f"a {long}y {long}z {long}y").hashes().tolist()
    assert b == d
    assert len({a, b, c}) == 3


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 6))
def test_runs_are_equal_just_where_their_words_are(words, n):
    once = np.random.default_rng(0).integers(0, 2**63, 4).astype(np.uint64)
    found = runs(once[words], n).tolist()
    true = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(found) == len(true)
    assert len(set(zip(found, true, strict=True))) == len(set(found)) == len(set(true))


def text_of(seed, n=400, vocabulary=3000):
    generator = random.Random(seed)
    return [f"w{generator.randrange(vocabulary)}" for _ in range(n)]


def changed(words, n, seed):
    """The words with n of them replaced."""
    words, generator = list(words), random.Random(seed)
    for i in generator.sample(range(len(words)), n):
        words[i] = f"new{generator.random()}"
    return words


def jaccard(a, b, n=5):
    """The true similarity, from sets of tuples of words."""
    a, b = ({tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))} for words in (a, b))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 6, 5000])
def test_signatures_are_those_of_datasketch(n):
    datasketch = pytest.importorskip("datasketch")
    text = " ".join(text_of(n, n))
    theirs = datasketch.MinHash(128, hashfunc=int, permutations=_permutations(128), scheme="affine32")
    theirs.update_batch(shingles(text, 5).tolist())
    assert theirs.hashvalues.tolist() == signature(text, DEFAULT).tolist()
    assert len(shingles(text, 5)) == max(1, n - 4)


QUESTION = ["to", "be", "or", "not", "that", "is", "the", "question"]


@given(st.permutations(QUESTION))
def test_the_order_of_words_counts_and_their_case_does_not(words):
    found, original = (signature(text, DEFAULT) for text in (" \n".join(words).upper(), " ".join(QUESTION)))
    assert (found == original).all() == (words == QUESTION)


@given(st.integers(5, 300))
def test_how_often_a_run_comes_makes_no_difference(n):
    assert (signature("ha " * n, DEFAULT) == signature("ha " * 5, DEFAULT)).all()


def test_short_texts_are_alike_only_if_equal():
    texts = ["", "a", "b", "c", "a b", "b a", "to be", "to bee", *map(chr, range(0x4E00, 0x5000))]
    assert len({tuple(shingles(text, 5).tolist()) for text in texts}) == len(texts)
    assert (signature("to be", DEFAULT) != signature("to bee", DEFAULT)).mean() > 0.9
    assert (signature("To  be", DEFAULT) == signature("to be", DEFAULT)).all()


def test_estimates_have_the_error_that_theory_gives():
    errors, variances = [], []
    for i in range(200):
        a = text_of(i)
        b = changed(a, i % 60, i)
        true = jaccard(a, b)
        estimate = (signature(" ".join(a), DEFAULT) == signature(" ".join(b), DEFAULT)).mean()
        errors.append(estimate - true)
        variances.append(true * (1 - true) / 128)
    assert abs(np.mean(errors)) < 4 * np.sqrt(np.sum(variances)) / 200
    assert 0.75 < np.mean(np.square(errors)) / np.mean(variances) < 1.3


def found_share(edits, n=500):
    """The share of later versions that are taken for near-duplicates, all in one index, and the true similarities."""
    index = NearIndex(DEFAULT)
    found, true = 0, []
    for i in range(n):
        a = text_of(i)
        b = changed(a, edits, i)
        true.append(jaccard(a, b))
        assert index.add(f"a{i}", signature(" ".join(a), DEFAULT)) is None
        match = index.add(f"b{i}", signature(" ".join(b), DEFAULT))
        assert match in (None, f"a{i}")
        found += match is not None
    return found / n, true


def test_pairs_of_similarity_of_at_least_nine_tenths_are_found():
    share, true = found_share(4)
    assert min(true) >= 0.9
    assert share > 0.99


def test_pairs_of_similarity_below_one_half_are_not_found():
    share, true = found_share(50)
    assert 0.2 < min(true) < max(true) < 0.5
    assert share == 0


def versions(n, seed=0):
    """Signatures of texts of which many are later versions of earlier ones, near and less near."""
    generator = random.Random(seed)
    texts = []
    for i in range(n):
        edited = texts and generator.random() < 0.5
        texts.append(changed(generator.choice(texts), generator.randrange(12), i) if edited else text_of(i, 120))
    return [signature(" ".join(text), DEFAULT) for text in texts]


def test_the_index_finds_what_that_of_datasketch_finds():
    datasketch = pytest.importorskip("datasketch")
    theirs, ours, kept, removed = datasketch.MinHashLSH(num_perm=128, params=bands(DEFAULT)), NearIndex(DEFAULT), {}, 0
    for i, values in enumerate(versions(5000)):
        sketch = datasketch.MinHash(hashvalues=values, permutations=_permutations(128), scheme="affine32")
        near_ones = [key for key in theirs.query(sketch) if sketch.jaccard(kept[key]) >= 0.8]
        assert ours.add(str(i), values) == (str(max(near_ones)) if near_ones else None)
        removed += bool(near_ones)
        if not near_ones:
            kept[i] = sketch
            theirs.insert(i, sketch)
    assert len(ours) == len(kept) > 2048  # the tables have grown twice
    assert removed > 500


def test_the_index_takes_less_than_a_kilobyte_per_document():
    index = NearIndex(DEFAULT)
    for i, values in enumerate(np.random.default_rng(0).integers(0, 2**32, (4096, 128), dtype=np.uint32)):
        assert index.add(str(i), values) is None
    assert index.n_bytes / len(index) <= 640


def test_a_document_is_found_again_right_behind_any_growth():
    index = NearIndex(DEFAULT)
    for i, values in enumerate(np.random.default_rng(0).integers(0, 2**32, (2050, 128), dtype=np.uint32)):
        assert index.add(str(i), values) is None
        assert index.add("again", values) == str(i)


def test_bands_find_what_they_promise_at_any_threshold():
    assert bands(DEFAULT) == (16, 8)
    assert bands(Near(threshold=1)) == (1, 128)
    for threshold in (0, 0.3, 0.5, 0.9, 0.99, 1):
        n, places = bands(Near(threshold, n_perm=256))
        assert n * places <= 256
        assert 1 - (1 - ((1 + threshold) / 2) ** places) ** n >= 0.999


def test_a_document_near_to_a_removed_one_only_stays():
    settings = Near(n_perm=1024)  # estimates err by 0.01
    a = text_of(1)
    b, c = changed(a, 7, 2), changed(changed(a, 7, 2), 12, 4)
    assert jaccard(a, b) > 0.83
    assert jaccard(a, c) < 0.75
    documents = [Document(" ".join(words), name) for words, name in ((a, "a"), (b, "b"), (c, "c"), (a, "again"))]
    effects = Effects("near")
    assert [document.name for document in near(documents, settings, effects)] == ["a", "c"]
    assert effects.removed == {"near-duplicate": 2}
    assert effects.documents_in == effects.documents_out + 2 == 4
    example = effects.examples["near-duplicate"]
    assert (example["document"], example["after"]) == ("b", "a")


def test_exact_duplicates_of_an_earlier_document_go():
    texts = ["One  two", "three", "one two", "ONE\ntwo", "Three", "four"]
    effects = Effects("exact")
    documents = [Document(text, f"file:{i}") for i, text in enumerate(texts)]
    assert list(exact(documents, effects)) == [documents[0], documents[1], documents[5]]
    assert effects.removed == {"exact duplicate": 3}
    example = effects.examples["exact duplicate"]
    assert (example["document"], example["before"], example["after"]) == ("file:2", "one two", "file:0")


@settings(max_examples=50)
@given(st.lists(st.sampled_from(["a b", "A  b", "c", "d e f", ""])))
def test_what_stays_has_no_duplicates_and_is_all_there_was(texts):
    documents = [Document(text, str(i)) for i, text in enumerate(texts)]
    for kept in (list(exact(documents, Effects("exact"))), list(near(documents, DEFAULT, Effects("near")))):
        assert len({normalised(document.text) for document in kept}) == len(kept)
        assert {normalised(document.text) for document in kept} == {normalised(text) for text in texts}
        assert kept == sorted(kept, key=lambda document: int(document.name))


def test_keys_and_signatures_are_the_same_in_every_process_and_need_no_extra():
    code = (
        "import sys; from classiclm.data.duplicates import *; text = 'to be or not, that is the question ' * 9\n"
        "print(content_key(text), signature(text, Near()).tolist(), {'torch', 'datasketch'} & sys.modules.keys())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, **other}
        ).stdout
        for other in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "2"})
    }
    text = "to be or not, that is the question " * 9
    assert printed == {f"{content_key(text)} {signature(text, DEFAULT).tolist()} set()\n"}


@pytest.mark.parametrize("wrong", [{"threshold": 1.2}, {"n_perm": 8}, {"shingle": 0}, {"shingle": 1000}])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(Error):
        validate(Near, wrong)
