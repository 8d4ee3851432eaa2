"""BLEU against values that can be worked out by hand, and what happens without sacrebleu."""

import math
import sys

import pytest

from classiclm.errors import RESOURCE, Error
from classiclm.evaluate.bleu import bleu


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu")


@pytest.mark.usefixtures("sacrebleu")
def test_the_score_is_the_geometric_mean_of_four_precisions():
    """Of 6, 5, 4 and 3 n-grams 5, 3, 2 and 1 are in the reference; its single "the" counts once."""
    score = bleu(["the cat sat on the mat"], ["the cat sat on a mat"]).score
    assert score == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, abs=1e-6)


@pytest.mark.usefixtures("sacrebleu")
def test_short_translations_pay_the_brevity_penalty_of_the_whole_corpus():
    """All n-grams are right, but there are 5 + 7 words where the references have 6 + 7."""
    translations = ["the cat sat on a", "a dog runs through the deep snow"]
    references = ["the cat sat on a mat", "a dog runs through the deep snow"]
    assert bleu(translations, references).score == pytest.approx(100 * math.exp(1 - 13 / 12), abs=1e-6)
    assert bleu(references, references).score == pytest.approx(100)
    assert bleu(references, translations).score < 100  # which is which matters


@pytest.mark.usefixtures("sacrebleu")
def test_a_corpus_is_more_than_the_mean_of_its_sentences():
    """Counts are added up before they are divided: (2 + 4) / (4 + 4) words, (1 + 3) / 6, (0 + 2) / 4, (0 + 1) / 2."""
    translations, references = ["a b x y", "c d e f"], ["a b p q", "c d e f"]
    expected = 100 * (6 / 8 * 4 / 6 * 2 / 4 * 1 / 2) ** 0.25
    assert bleu(translations, references).score == pytest.approx(expected, abs=1e-6)


@pytest.mark.usefixtures("sacrebleu")
def test_case_counts_and_punctuation_is_a_word_of_its_own():
    assert bleu(["The cat sat on a mat."], ["The cat sat on a mat ."]).score == pytest.approx(100)
    assert bleu(["the cat sat on a mat."], ["The cat sat on a mat."]).score < 90


def test_the_signature_says_how_it_was_counted(sacrebleu):
    signature = bleu(["a b c d"], ["a b c d"]).signature
    assert signature == f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{sacrebleu.__version__}"


@pytest.mark.parametrize(("translations", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_translations_and_references_go_in_pairs(translations, references):
    with pytest.raises(ValueError, match="as many translations as references"):
        bleu(translations, references)


def test_without_sacrebleu_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # so that importing it fails as if it were not there
    with pytest.raises(Error) as caught:
        bleu(["a"], ["a"])
    assert caught.value.code == RESOURCE
    assert "pip install 'classiclm[eval]'" in str(caught.value)
