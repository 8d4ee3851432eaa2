"""GPT-1's tokenizer against what ftfy, spaCy and the released algorithm gave (see fixtures), and a plain learner."""

import hashlib
import json
import os
import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data import tokenizer as shared
from classiclm.data.gpt1_bpe import GPT1_FILES, GPT1BPE
from classiclm.data.locate import find
from classiclm.data.tokenizers import from_json
from classiclm.errors import BAD_INPUT, USAGE, Error

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "gpt1_bpe.json").read_text(encoding="utf-8"))
SENTENCES = FIXTURE["sentences"]
ALIKE = [case for case in SENTENCES if "differs" not in case]
OTHERWISE = [case for case in SENTENCES if "differs" in case]
TEXT = "\n".join(case["text"] for case in ALIKE)
DATA = Path(os.environ.get("CLASSICLM_DATA") or "nowhere")

needs_gpt1 = pytest.mark.skipif(
    any(find(file) is None for file in GPT1_FILES), reason="GPT-1's vocabulary is not on this machine"
)


@pytest.fixture(scope="module")
def learnt():
    return GPT1BPE.train(TEXT, 700)


@pytest.fixture(scope="module")
def gpt1():
    return GPT1BPE.published_gpt1()


def normalizer(tokenizer):
    return tokenizers.Tokenizer.from_str(tokenizer.to_json()).normalizer


def model(tokenizer):
    return json.loads(tokenizer.to_json())["model"]


# Words


@pytest.mark.parametrize("case", ALIKE, ids=lambda case: case["text"][:40])
def test_words_are_those_of_ftfy_and_spacy(learnt, case):
    assert normalizer(learnt).normalize_str(case["text"]).split(" ") == case["words"]


@pytest.mark.parametrize("case", OTHERWISE, ids=lambda case: case["text"][:40])
def test_the_list_of_differences_is_true(learnt, case):
    assert normalizer(learnt).normalize_str(case["text"]).split(" ") != case["words"]


# Published ids


@needs_gpt1
def test_ids_are_those_of_the_released_code(gpt1):
    assert len(ALIKE) >= 40
    tokens = {i: token for token, i in model(gpt1)["vocab"].items()}
    for case in ALIKE:
        assert gpt1.encode(case["text"]) == case["ids"], case["text"]
        assert [tokens[i] for i in case["ids"]] == case["tokens"]


@needs_gpt1
@pytest.mark.parametrize("name", FIXTURE["corpora"])
def test_every_line_of_a_corpus_has_the_ids_of_the_released_code(gpt1, name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not on this machine")
    lines = (DATA / name).read_text(encoding="utf-8").split("\n")
    ids = hashlib.sha256()
    for line in lines:
        ids.update(np.array([*gpt1.encode(line), 65_535], dtype="<u2").tobytes())
    assert {"lines": len(lines), "sha256": ids.hexdigest()} == FIXTURE["corpora"][name]


@needs_gpt1
def test_published_size_and_special_ids(gpt1):
    assert (gpt1.vocab_size, gpt1.end_of_text) == (40_478, None)
    assert gpt1.encode("a\nb") == [246, 40_477, 259]
    assert gpt1.encode("\u2603") == [0]
    assert 0 not in gpt1.encode("<unk> <UNK>")
    assert gpt1.encode("") == gpt1.encode(" \n ") == []
    assert gpt1.encode_array("the cat").dtype == np.uint16


@needs_gpt1
def test_decoding_gives_words_with_spaces_and_shows_the_unknown(gpt1):
    assert gpt1.decode(gpt1.encode("He didn't  SAY\n\u2603 so.")) == "he did n't say \n <unk>so ."
    assert gpt1.decode([]) == ""


# No text is too strange


def random_texts(n):
    generator = random.Random(0)
    ranges = [(0, 0x80), (0, 0x300), (0x300, 0x3100), (0, 0xD800), (0xE000, 0x110000), (0x2000, 0x2070)]
    for _ in range(n):
        low, high = generator.choice(ranges)
        marks = "'`.:<>=\"$ \n\u00b0" if generator.random() < 0.5 else ""
        characters = [chr(generator.randrange(low, high)) for _ in range(generator.randrange(1, 15))]
        characters = [c for c in characters if not 0xD800 <= ord(c) < 0xE000] + list(marks)
        generator.shuffle(characters)
        yield "".join(characters)


def test_ten_thousand_random_texts_are_encoded_and_decoded(learnt):
    for text in random_texts(10_000):
        ids = learnt.encode(text)
        assert all(0 <= i < learnt.vocab_size for i in ids)
        assert isinstance(learnt.decode(ids), str)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d \ude00"])
def test_half_a_character_is_bad_input(learnt, text):
    with pytest.raises(Error) as caught:
        learnt.encode(text)
    assert caught.value.code == BAD_INPUT


@pytest.mark.parametrize("unit", ["c", "'", ".", " ", "=x", "Mr.", "5%", "a.'"])
def test_a_long_run_of_anything_takes_time_in_proportion(learnt, unit):
    text = unit * ((1_000_000 if unit == "c" else 300_000) // len(unit))
    start = time.perf_counter()
    learnt.encode(text)
    assert time.perf_counter() - start < 20  # about 0.5 s on a free machine; were it quadratic, an hour


@settings(deadline=None, max_examples=200)
@given(
    parts=st.lists(st.sampled_from(["a", "Be", "'s", " ", "  ", "\n", "Mr.", "\t", "1", ";", "\u0301", "n't", "''"])),
    size=st.integers(1, 12),
)
def test_a_text_cut_in_pieces_gives_the_ids_of_the_whole(learnt, parts, size):
    text = "".join(parts)
    whole = learnt.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "PIECE", size)
        assert "".join(shared.pieces(text, learnt.border)) == text
        assert learnt.encode(text) == whole


def test_a_long_text_is_cut_between_words(learnt, monkeypatch):
    whole = learnt.encode(TEXT)
    monkeypatch.setattr(shared, "PIECE", 30)
    assert len(shared.pieces(TEXT, learnt.border)) > 40
    assert learnt.encode(TEXT) == whole


# Learning


def learn_merges(words, n, age):
    """The n most frequent pairs within words, one after the other; among equals the one of the older symbols."""
    counted = Counter((*word[:-1], word[-1] + "</w>") for word in words)
    merges = []
    for _ in range(n):
        pairs = Counter()
        for word, count in counted.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        age["".join(best)] = len(age)
        joined = Counter()
        for word, count in counted.items():
            symbols, i = [], 0
            while i < len(word):
                step = 2 if word[i : i + 2] == best else 1
                symbols.append("".join(word[i : i + step]))
                i += step
            joined[tuple(symbols)] += count
        counted = joined
    return merges


def test_merges_are_learnt_by_frequency_within_the_words(learnt):
    words = [word for case in ALIKE for word in [*case["words"], "\n"]][:-1]
    words = [w for w, after in zip(words, [*words[1:], ""], strict=True) if (w, after) != ("\n", "\n")]
    alphabet = sorted(set("".join(words)))
    symbols = ["<unk>", *alphabet, *(c + "</w>" for c in alphabet)]
    vocab = model(learnt)["vocab"]
    assert sorted(vocab, key=vocab.__getitem__)[: len(symbols)] == symbols
    merges = [tuple(pair) for pair in model(learnt)["merges"]]
    assert len(merges) == 700 - len(symbols)
    expected = learn_merges(words, len(merges), {symbol: i for i, symbol in enumerate(symbols)})
    assert merges == expected


def test_a_learnt_tokenizer_knows_its_text_and_is_the_same_every_time(learnt):
    assert learnt.vocab_size == 700
    assert 0 not in learnt.encode(TEXT)
    assert learnt.encode("\u65e5\u6708") == [learnt.encode("\u65e5 \u65e5\u6708")[1], 0]
    assert learnt.decode(learnt.encode("It's the CAT.")) == "it 's the cat ."
    assert GPT1BPE.train(TEXT, 700).fingerprint == learnt.fingerprint


@pytest.mark.parametrize("size", [0, 1, 60, 10**9])
def test_an_impossible_size_is_an_error_that_says_what_is_possible(size):
    with pytest.raises(Error, match=r"from 7\d ") as caught:
        GPT1BPE.train("the quick brown fox jumps over the lazy dog, 0123456789", size)
    assert caught.value.code == USAGE
    assert str(caught.value).startswith(f"gpt1-bpe-{size}:")


def test_the_file_is_the_whole_tokenizer(learnt):
    again = from_json(learnt.to_json(), "x")
    assert isinstance(again, GPT1BPE)
    assert (again.fingerprint, again.vocab_size, again.end_of_text) == (learnt.fingerprint, 700, None)
    theirs = tokenizers.Tokenizer.from_str(learnt.to_json())
    assert theirs.encode(TEXT).ids == again.encode(TEXT) == learnt.encode(TEXT)
    assert str(theirs)  # the library cannot print some patterns


def test_transformers_reads_the_file_alike(learnt, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(learnt.to_json(), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(TEXT)["input_ids"] == learnt.encode(TEXT)
