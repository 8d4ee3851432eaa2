"""BERT's WordPiece against its released rules, written anew in plain Python, and against a learner of its own."""

import json
import os
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data import tokenizer as shared
from classiclm.data.locate import find
from classiclm.data.tokenizers import from_json, load_tokenizer
from classiclm.data.wordpiece import BERT_FILE, SPECIAL, WordPiece
from classiclm.errors import BAD_INPUT, USAGE, Error

PIECES = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyz0123456789[]!',.-$\u03c3\u03c2\u4e2d\u6587\U0002b820\ue000\u00e9A"]
PIECES += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789\u03c3\u03c2\ue000\u00e9\u0301A"]
PIECES += ["un", "##aff", "##able", "the", "##ing", "mask", "run", "##ning", "Un"]
TEXT = "The runners weren't running; 21 cats sat on 12 mats, unaffable Caf\u00e9s! \u4e2d\u6587 Ab-ab ab abab.\n" * 4
DATA = Path(os.environ.get("CLASSICLM_DATA") or "nowhere")

needs_bert = pytest.mark.skipif(find(BERT_FILE) is None, reason="BERT's vocabulary is not on this machine")


# An oracle: the rules of google-research/bert, tokenization.py, in the plainest way.

CHINESE = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F)]
CHINESE += [(0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]


def is_removed(c):
    return c in "\0\ufffd" or (c not in "\t\n\r" and unicodedata.category(c) in ("Cc", "Cf"))


def is_punctuation(c):
    ascii_mark = 33 <= ord(c) <= 126 and not c.isalnum()
    return ascii_mark or unicodedata.category(c).startswith("P")


def split_words(text, lowercase):
    cleaned = "".join(" " if unicodedata.category(c) == "Zs" else c for c in text if not is_removed(c))
    spaced = "".join(f" {c} " if any(a <= ord(c) <= b for a, b in CHINESE) else c for c in cleaned)
    words = []
    for word in spaced.split():
        if lowercase:
            letters = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in letters if unicodedata.category(c) != "Mn")
        words += "".join(f" {c} " if is_punctuation(c) else c for c in word).split()
    return words


def cut(word, vocab):
    """The longest known beginning, then the longest that goes on, ..."""
    found, start = [], 0
    while start < len(word):
        ends = range(len(word), start, -1)
        names = (("##" if start else "") + word[start:end] for end in ends)
        name = next((name for name in names if name in vocab), None)
        if name is None:
            return ["[UNK]"]
        found.append(name)
        start += len(name) - (2 if start else 0)
    return found


def encode_by_the_rules(text, vocab, lowercase=True):
    words = split_words(text, lowercase)
    return [vocab[piece] for word in words for piece in (["[UNK]"] if len(word) > 200 else cut(word, vocab))]


def vocabulary(tokenizer):
    return json.loads(tokenizer.to_json())["model"]["vocab"]


@pytest.fixture(scope="module")
def small():
    return WordPiece.from_vocabulary(PIECES)


@pytest.fixture(scope="module")
def cased():
    return WordPiece.from_vocabulary(PIECES, lowercase=False)


@pytest.fixture(scope="module")
def learnt():
    return WordPiece.train(TEXT, 75)


@pytest.fixture(scope="module")
def bert():
    return WordPiece.published_bert()


# The rules

TRICKY = st.text(
    st.sampled_from(
        "aAbz\u03a3\u03c3'. -$[]!\u00c9e\u0301\u0130\u00df\u01c5\u4e2d\U0002b820\uf900\ue000\u00ad\u200b"
        "\u2028\t\n\x1c\x85\ufffd\u3000"
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=1000)
@given(text=TRICKY | st.text(max_size=20))
def test_ids_are_those_of_the_released_rules(small, cased, text):
    ids = {piece: i for i, piece in enumerate(PIECES)}
    text = "".join(c for c in text if unicodedata.category(c) != "Cn" and ord(c) not in LEFT_OVER)
    assert small.encode(text) == encode_by_the_rules(text, ids)
    assert cased.encode(text) == encode_by_the_rules(text, ids, lowercase=False)


LEFT_OVER = {0x1171E, 0x11938}  # the characters that the module's docstring names


@pytest.mark.parametrize("lowercase", [True, False])
def test_every_assigned_character_is_treated_as_by_the_rules(lowercase):
    library = tokenizers.Tokenizer.from_str(WordPiece.from_vocabulary(PIECES, lowercase).to_json())
    many = [range(0x4E10, 0x9F00), range(0x20010, 0x2A600), range(0xAC10, 0xD700), range(0xD800, 0xE000)]
    many += [range(0xE010, 0xF800), range(0xF0010, 0x110000)]  # Chinese, Korean and private use, all alike
    different = set()
    for code in range(0x110000):
        if any(code in alike for alike in many) or unicodedata.category(chr(code)) == "Cn":
            continue
        text = f"a{chr(code)}b"
        words = library.pre_tokenizer.pre_tokenize_str(library.normalizer.normalize_str(text))
        if [word for word, _ in words] != split_words(text, lowercase):
            different.add(code)
    assert different <= LEFT_OVER


def test_the_longest_piece_goes_first_and_a_word_that_cannot_be_cut_is_unknown(small):
    names = {i: piece for piece, i in vocabulary(small).items()}
    found = [names[i] for i in small.encode("UNAFFABLE un-thing")]
    assert found == [
        "un",
        "##aff",
        "##able",
        "un",
        "-",
        "t",
        "##h",
        "##ing",
    ]
    assert small.encode("ab\u05d0") == [small.unk]
    assert small.encode("\u05d0 a") == [small.unk, small.encode("a")[0]]


def test_a_word_of_more_than_200_characters_is_unknown(small):
    assert len(small.encode("a" * 200)) == 200
    assert small.encode("a" * 201) == [small.unk]
    assert small.encode("A\u0301" * 200 + " a") == [*small.encode("a" * 200), *small.encode("a")]


def test_special_tokens_in_a_users_text_stay_plain(small):
    for tokenizer in (small, from_json(small.to_json(), "x")):
        names = {i: piece for piece, i in vocabulary(tokenizer).items()}
        assert [names[i] for i in tokenizer.encode("[MASK]")] == ["[", "mask", "]"]
        assert not set(tokenizer.encode("[CLS][PAD] [SEP]")) & {tokenizer.cls, tokenizer.sep, tokenizer.pad}


def test_decoding_joins_pieces_and_shows_special_tokens(small):
    assert small.decode(small.encode("Unaffable, the  Caf\u00e9!")) == "unaffable , the cafe !"
    assert small.decode([small.cls, small.mask, small.sep, small.pad]) == "[CLS] [MASK] [SEP] [PAD]"
    assert small.decode([]) == ""
    assert small.end_of_text is None


def test_a_cased_vocabulary_keeps_case_and_accents(cased):
    assert cased.decode(cased.encode("Un aA \u00e9")) == "Un aA \u00e9"
    assert cased.encode("B") == [cased.unk]


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_half_a_character_is_bad_input(small, text):
    with pytest.raises(Error) as caught:
        small.encode(text)
    assert caught.value.code == BAD_INPUT


@settings(deadline=None, max_examples=200)
@given(text=TRICKY, size=st.integers(1, 12))
def test_a_text_cut_in_pieces_gives_the_ids_of_the_whole(small, text, size):
    whole = small.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared, "PIECE", size)
        assert "".join(shared.pieces(text, small.border)) == text
        assert small.encode(text) == whole


# BERT's published vocabulary


def corpus():
    naughty, wikitext = DATA / "hostile" / "naughty-strings.json", DATA / "wikitext2" / "valid.txt"
    if not naughty.is_file() or not wikitext.is_file():
        pytest.skip("the texts are not on this machine")
    strings = json.loads(naughty.read_text(encoding="utf-8"))
    assert len(strings) == 515
    return [*strings, *wikitext.read_text(encoding="utf-8").split("\n")]


@needs_bert
def test_bert_encodes_every_line_by_the_released_rules(bert):
    ids = {piece: i for i, piece in enumerate(find(BERT_FILE).read_text(encoding="utf-8").split("\n")[:-1])}
    texts = corpus()
    assert [text for text in texts if bert.encode(text) != encode_by_the_rules(text, ids)] == []
    assert bert.encode("\n".join(texts)) == [i for text in texts for i in bert.encode(text)]


@needs_bert
def test_bert_has_its_published_size_and_ids(bert):
    assert bert.vocab_size == 30_522
    assert (bert.pad, bert.unk, bert.cls, bert.sep, bert.mask) == (0, 100, 101, 102, 103)
    assert bert.encode("Hello, World!") == [7592, 1010, 2088, 999]
    assert load_tokenizer("bert").fingerprint == bert.fingerprint


@pytest.mark.parametrize("content", [b"", b"a\nb\n", b"\xff\xfe", "\n".join([*SPECIAL, "a", "a", ""]).encode()])
def test_a_broken_published_file_is_bad_input_that_names_it(tmp_path, monkeypatch, content):
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path))
    path = tmp_path / BERT_FILE.place
    path.parent.mkdir()
    path.write_bytes(content)
    monkeypatch.setattr("classiclm.data.wordpiece.locate", lambda file: path)
    with pytest.raises(Error) as caught:
        WordPiece.published_bert()
    assert caught.value.code == BAD_INPUT
    assert str(path) in str(caught.value)


# Files


def test_the_file_is_the_whole_tokenizer(small, cased, learnt):
    for tokenizer in (small, cased, learnt):
        again = from_json(tokenizer.to_json(), "x")
        assert isinstance(again, WordPiece)
        assert again.to_json() == tokenizer.to_json()
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        specials = (again.pad, again.unk, again.cls, again.sep, again.mask)
        assert specials == (tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask)
        assert str(tokenizers.Tokenizer.from_str(tokenizer.to_json()))  # the library cannot print some patterns


def test_transformers_reads_the_file_and_frames_sentences_as_bert_does(small, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(small.to_json(), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    one, other = small.encode("the cat"), small.encode("ran!")
    assert theirs("the cat")["input_ids"] == [small.cls, *one, small.sep]
    pair = theirs("the cat", "ran!", return_token_type_ids=True)
    assert pair["input_ids"] == [small.cls, *one, small.sep, *other, small.sep]
    assert pair["token_type_ids"] == [0] * (len(one) + 2) + [1] * (len(other) + 1)


def test_a_wordpiece_file_without_special_tokens_is_bad_input():
    bare = tokenizers.Tokenizer(tokenizers.models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    with pytest.raises(Error, match=r"\[PAD\]") as caught:
        from_json(bare.to_str(), "some/file")
    assert caught.value.code == BAD_INPUT
    assert "some/file" in str(caught.value)


# Learning


def learn_pieces(words, n, pieces):
    """The n most frequent pairs within words, joined one after the other; among equals that of the older pieces."""
    counted = Counter((word[0], *(f"##{c}" for c in word[1:])) for word in words)
    pieces = list(pieces)
    while len(pieces) < n:
        pairs = Counter()
        for word, count in counted.items():
            for pair in pairwise(word):
                pairs[pair] += count
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pieces.index(pair[0]), pieces.index(pair[1])))
        whole = first + second[2:]
        pieces += [] if whole in pieces else [whole]
        joined = Counter()
        for word, count in counted.items():
            symbols, i = [], 0
            while i < len(word):
                is_pair = word[i : i + 2] == (first, second)
                symbols.append(whole if is_pair else word[i])
                i += 2 if is_pair else 1
            joined[tuple(symbols)] += count
        counted = joined
    return pieces


def test_pieces_are_learnt_by_frequency_within_the_words_of_the_rules(learnt):
    words = split_words(TEXT, lowercase=True)
    characters = sorted(set("".join(words)))
    inside = [c for c in characters if c.isalnum()]
    start = [*SPECIAL, *characters, *(f"##{c}" for c in inside)]
    ids = vocabulary(learnt)
    assert sorted(ids, key=ids.__getitem__) == learn_pieces(words, 75, start)


def test_a_learnt_tokenizer_knows_its_text_and_is_the_same_every_time(learnt):
    assert learnt.vocab_size == 75
    assert (learnt.pad, learnt.unk, learnt.cls, learnt.sep, learnt.mask) == (0, 1, 2, 3, 4)
    assert learnt.unk not in learnt.encode(TEXT)
    assert learnt.unk not in learnt.encode("fb21ef")  # letters in a new order
    assert learnt.encode("q") == [learnt.unk]
    assert WordPiece.train(TEXT, 75).fingerprint == learnt.fingerprint


@pytest.mark.parametrize("size", [0, 10, 34, 10**9])
def test_an_impossible_size_is_an_error_that_says_what_is_possible(size):
    with pytest.raises(Error, match="from 35 ") as caught:
        WordPiece.train("the quick brown fox", size)
    assert caught.value.code == USAGE
    assert str(caught.value).startswith(f"wordpiece-{size}:")
    assert WordPiece.train("the quick brown fox", 35).vocab_size == 35


@pytest.mark.parametrize(("pieces", "why"), [([*SPECIAL, "a", "a"], "twice"), ([*SPECIAL[:-1], "a"], r"\[MASK\]")])
def test_a_vocabulary_that_cannot_be_is_bad_input(pieces, why):
    with pytest.raises(Error, match=why) as caught:
        WordPiece.from_vocabulary(pieces)
    assert caught.value.code == BAD_INPUT
