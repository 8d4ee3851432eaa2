"""Tokenizers against a byte-pair trainer and encoder of their own, GPT-2's published ids, and round trips."""

import json
import os
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data import tokenizer as module
from classiclm.data.locate import find
from classiclm.data.tokenizers import (
    END_OF_TEXT,
    GPT1BPE,
    GPT2_FILES,
    ByteBPE,
    CharTokenizer,
    WordPiece,
    from_json,
    load_tokenizer,
    make_tokenizer,
)
from classiclm.errors import BAD_INPUT, USAGE, Error

TEXT = """It isn't late; they've   gone, we'll see at 1066 o'clock -- says she's 21!

    def one(a, b):
        return  a+b


    def two(a, b):
\treturn a-b
Grüße aus Köln, naïve café. \u65e5\u672c\u8a9e\u306e\u6587\u7ae0 \U0001f600\U0001f600
the cat sat on the mat, the cats sat on the mats; that's that, that's 12 12 123.
""".replace("\t", "\t\t")

needs_gpt2 = pytest.mark.skipif(
    any(find(file) is None for file in GPT2_FILES), reason="GPT-2's vocabulary is not on this machine"
)


# An oracle: GPT-2's own algorithm (openai/gpt-2, src/encoder.py), written anew in the plainest way.

GPT2_PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]  # these bytes stand for themselves
BYTE_TO_CHAR = {b: chr(b) for b in PRINTABLE}
BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in PRINTABLE)}


def words(text):
    return [tuple(BYTE_TO_CHAR[b] for b in word.encode()) for word in GPT2_PATTERN.findall(text)]


def join(word, pair):
    """The word with each occurrence of the pair, from left to right, made one symbol."""
    result, i = [], 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        result.append("".join(word[i : i + step]))
        i += step
    return tuple(result)


def learn_merges(text, n):
    """The n most frequent pairs, one after the other; among equals the one of the older symbols."""
    counted = Counter(words(text))
    age = {char: i for i, char in enumerate(sorted(BYTE_TO_CHAR.values()))}
    merges = []
    for _ in range(n):
        pairs = Counter()
        for word, count in counted.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        age["".join(best)] = len(age)
        counted = Counter({join(word, best): count for word, count in counted.items()})
    return merges


def encode_by_merges(text, merges, ids):
    rank = {pair: i for i, pair in enumerate(merges)}
    result = []
    for word in words(text):
        while len(word) > 1 and (best := min(pairwise(word), key=lambda pair: rank.get(pair, len(rank)))) in rank:
            word = join(word, best)
        result += [ids[symbol] for symbol in word]
    return result


def vocabulary(tokenizer):
    return json.loads(tokenizer.to_json())["model"]["vocab"]


def merges_of(tokenizer):
    return [tuple(pair) for pair in json.loads(tokenizer.to_json())["model"]["merges"]]


@pytest.fixture(scope="module")
def bpe():
    return ByteBPE.train(TEXT * 3, 340)


@pytest.fixture(scope="module")
def gpt2():
    return ByteBPE.published_gpt2()


# Characters


@settings(deadline=None, max_examples=200)
@given(st.text(min_size=1))
def test_characters_round_trip_in_code_point_order(text):
    tokenizer = CharTokenizer.train(text)
    ids = tokenizer.encode(text)
    alphabet = sorted(set(text))
    assert ids == [alphabet.index(character) for character in text]
    assert tokenizer.decode(ids) == text
    assert tokenizer.vocab_size == len(alphabet)
    again = from_json(tokenizer.to_json(), "x")
    assert again.encode(text) == ids
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("unknown", ["z", "\u00e9", "\U0001f600", "\n", "\0"])
def test_an_unknown_character_is_bad_input_that_names_it(unknown):
    with pytest.raises(Error) as caught:
        CharTokenizer.train("abc ").encode(f"ab{unknown}c")
    assert caught.value.code == BAD_INPUT
    assert f"U+{ord(unknown):04X}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_library_reads_the_file_of_a_character_tokenizer_alike():
    ours = CharTokenizer.train(TEXT)
    theirs = tokenizers.Tokenizer.from_str(ours.to_json())
    assert theirs.encode(TEXT).ids == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT)) == TEXT


# Learnt byte-pair encoding


def test_merges_are_learnt_by_frequency_within_the_words_of_gpt2s_pattern(bpe):
    merges = merges_of(bpe)
    assert len(merges) == 340 - 257
    assert merges == learn_merges(TEXT * 3, len(merges))


def test_encoding_is_that_of_an_independent_encoder(bpe):
    merges, ids = merges_of(bpe), vocabulary(bpe)
    unseen = "That's  a\tcat's\n\n\n  mat: 12,123 K\u00f6ln \u65e5 \U0001f601\n \n x\r\n they'VE 'tis"
    for text in (TEXT, unseen, "", " ", "\n\n", "'", "''s"):
        assert bpe.encode(text) == encode_by_merges(text, merges, ids)


def test_no_token_crosses_letters_digits_punctuation_and_white_space(bpe):
    back = {char: byte for byte, char in BYTE_TO_CHAR.items()}
    for token in vocabulary(bpe):
        if token == END_OF_TEXT:
            continue
        text = bytes(back[char] for char in token).decode(errors="ignore")
        kinds = {"Z" if c.isspace() else unicodedata.category(c)[0] for c in text.removeprefix(" ")}
        kinds = {kind if kind in "LNZ" else "other" for kind in kinds}
        assert len(kinds) <= 1 or text in ("'s", "'t", "'re", "'ve", "'m", "'l", "'ll", "'d", "'r", "'v")
        assert not (text.startswith(" ") and kinds == {"Z"} and text.strip())


@settings(deadline=None, max_examples=600)
@given(st.text(max_size=60))
def test_any_text_round_trips_and_its_bytes_are_the_tokens_bytes(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert all(0 <= i < bpe.vocab_size and i != bpe.end_of_text for i in ids)
    assert len(ids) <= len(text.encode())


def test_every_byte_is_known_even_to_the_smallest_vocabulary():
    tokenizer = ByteBPE.train("a", 257)
    assert tokenizer.vocab_size == 257
    assert len(tokenizer.encode("\U0001f600\u00e9a")) == 4 + 2 + 1
    assert tokenizer.decode(tokenizer.encode("\U0001f600")[:3]) == "\ufffd"
    assert tokenizer.decode([]) == ""


def test_a_text_too_small_for_the_vocabulary_gives_a_smaller_one():
    tokenizer = ByteBPE.train("ab", 300)
    assert tokenizer.vocab_size == 258
    assert len(tokenizer.encode("ab")) == 1


@pytest.mark.parametrize("text", [END_OF_TEXT, f" {END_OF_TEXT}", f"a{END_OF_TEXT}b", END_OF_TEXT * 3])
def test_special_tokens_in_a_users_text_stay_plain(bpe, text):
    for tokenizer in (bpe, from_json(bpe.to_json(), "x")):
        ids = tokenizer.encode(text)
        assert tokenizer.end_of_text not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([tokenizer.end_of_text]) == END_OF_TEXT


def test_learning_is_the_same_every_time():
    assert ByteBPE.train(TEXT, 320).fingerprint == ByteBPE.train(TEXT, 320).fingerprint
    assert ByteBPE.train(TEXT, 320).fingerprint != ByteBPE.train(TEXT, 321).fingerprint


# In pieces

SPACED = st.lists(
    st.sampled_from(["a", "be", "'s", " ", "  ", "\n", "\n\n", "\t", "1", ";", "\u00e9", "\r\n", "\x1c", "\u3000"])
)


@settings(deadline=None, max_examples=300)
@given(parts=SPACED, size=st.integers(1, 12))
def test_a_text_cut_in_pieces_gives_the_ids_of_the_whole(bpe, parts, size):
    text = "".join(parts)
    whole = bpe.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        assert "".join(module.pieces(text, bpe.border)) == text
        assert bpe.encode(text) == whole


@pytest.mark.parametrize("size", [2, 7, 30])
def test_pieces_are_short_and_change_neither_ids_nor_learning(bpe, monkeypatch, size):
    text = TEXT * 5
    whole, learnt = bpe.encode(text), ByteBPE.train(text, 300).fingerprint
    monkeypatch.setattr(module, "PIECE", size)
    assert len(module.pieces(text, bpe.border)) >= 15
    assert bpe.encode(text) == whole
    assert ByteBPE.train(text, 300).fingerprint == learnt


def test_a_text_without_line_breaks_is_one_piece(bpe, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 4)
    assert module.pieces("no break in here", bpe.border) == ["no break in here"]
    assert module.pieces("", bpe.border) == [""]


# Files and names


def test_a_reloaded_tokenizer_gives_equal_ids_and_fingerprint(bpe, tmp_path):
    (tmp_path / "tokenizer.json").write_text(bpe.to_json(), encoding="utf-8")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(name))
        assert again.encode(TEXT) == bpe.encode(TEXT)
        assert (again.fingerprint, again.vocab_size, again.end_of_text) == (bpe.fingerprint, 340, bpe.end_of_text)
    assert tokenizers.Tokenizer.from_str(bpe.to_json()).encode(TEXT).ids == bpe.encode(TEXT)


BROKEN = [b"", b"{", b"[]", b"null", b'{"model": {}}', b'{"model": {"type": "BPE"}}', b"\xff\xfe\0", b"PK\x03\x04"]


@pytest.mark.parametrize("content", BROKEN)
def test_a_file_that_is_no_tokenizer_is_bad_input_that_names_it(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(Error) as caught:
        load_tokenizer(str(path))
    assert caught.value.code == BAD_INPUT
    assert str(path) in str(caught.value)


def test_a_tokenizer_of_another_kind_is_bad_input(tmp_path):
    other = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0)], 0))
    (tmp_path / "tokenizer.json").write_text(other.to_str())
    with pytest.raises(Error, match="Unigram") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.code == BAD_INPUT


@pytest.mark.parametrize(
    ("name", "code"),
    [("gpt9", USAGE), ("bpe", USAGE), ("bpe-", USAGE), ("bpe--5", USAGE), ("./none.json", BAD_INPUT)]
    + [(f"bpe-{n}", USAGE) for n in (0, 1, 256, 10**10, 10**30)],
)
def test_an_impossible_tokenizer_is_an_error_that_names_it(name, code):
    with pytest.raises(Error) as caught:
        make_tokenizer(name, "some text")
    assert caught.value.code == code
    assert str(caught.value).startswith(f"{name}:")


def test_names_make_the_tokenizers_they_say():
    assert make_tokenizer("char", "banana").encode("nab") == [2, 0, 1]
    assert make_tokenizer("bpe-257", "banana").vocab_size == 257
    for name, kind, size in [("wordpiece-12", WordPiece, 12), ("gpt1-bpe-9", GPT1BPE, 9)]:
        made = make_tokenizer(name, "banana Banana")
        assert (type(made), made.vocab_size) == (kind, size)
        assert type(from_json(made.to_json(), "x")) is kind
        assert made.decode(made.encode("BANANA ban")) == "banana ban"


@pytest.mark.parametrize(
    ("name", "near"),
    [("gpt", "gpt1"), ("bret", "bert"), ("gtp2", "gpt2"), ("wordpeice-2048", "wordpiece-2048"), ("xyzzy", "bert, bpe")],
)
def test_an_unknown_name_is_an_error_that_suggests_the_nearest(name, near):
    with pytest.raises(Error) as caught:
        make_tokenizer(name, "some text")
    assert caught.value.code == USAGE
    assert near in str(caught.value)


def test_a_run_gives_the_tokenizer_of_its_newest_checkpoint(tmp_path):
    run = tmp_path / "a"
    for step, characters in ((2_000, "ab"), (99_999_999, "abcd"), (100_000_000, "abcde"), (30_000, "abc")):
        folder = run / "checkpoints" / f"step-{step:08}"
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(CharTokenizer.train(characters).to_json())
    (run / "checkpoints" / ".classiclm-tmp-step-99").mkdir()
    assert load_tokenizer(str(run)).vocab_size == 5
    assert load_tokenizer(str(run / "checkpoints" / "step-00002000")).vocab_size == 2
    (run / "tokenizer.json").write_text(CharTokenizer.train("z").to_json())
    assert load_tokenizer(str(run)).vocab_size == 1


def test_a_path_that_does_not_exist_is_an_error_that_suggests_the_nearest(tmp_path):
    (tmp_path / "first-run").mkdir()
    for name, near in (("frist-run", "first-run"), ("nothing/at/all", None)):
        path = tmp_path / name
        with pytest.raises(Error, match="does not exist") as caught:
            load_tokenizer(str(path))
        assert caught.value.code == BAD_INPUT
        assert str(caught.value).startswith(f"{path}:")
        assert "\n" not in str(caught.value)
        assert (f"did you mean {str(tmp_path / near)!r}" if near else "Fix: name a tokenizer.json") in str(caught.value)


def test_a_folder_without_a_tokenizer_is_said_to_have_none(tmp_path):
    with pytest.raises(Error, match=r"has no tokenizer\.json") as caught:
        load_tokenizer(str(tmp_path))
    assert caught.value.code == BAD_INPUT
    assert str(caught.value).startswith(f"{tmp_path}:")


@pytest.mark.parametrize("name", ["char", "bpe-512", "wordpiece-2048", "gtp2", ""])
def test_where_nothing_can_be_learnt_only_published_names_and_paths_are_offered(name):
    with pytest.raises(Error) as caught:
        load_tokenizer(name)
    assert caught.value.code == USAGE
    why, fix = str(caught.value).split(" Fix: ")
    assert ("is learnt from a text" in why) is (name in ("char", "bpe-512", "wordpiece-2048"))
    assert not any(learnt in fix for learnt in ("char", "bpe-", "wordpiece"))
    assert "gpt2" in fix
    assert "path" in fix


@pytest.mark.parametrize("name", ["char", "bpe-300", "gpt1-bpe-90", "wordpiece-90"])
def test_a_text_with_half_a_character_teaches_nothing(name):
    with pytest.raises(Error, match="not Unicode") as caught:
        make_tokenizer(name, "some \ud800 text")
    assert caught.value.code == BAD_INPUT


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["bpe-300", "gpt1-bpe-300", "wordpiece-300"])
@pytest.mark.parametrize("letter", ["a", "=", " "])
def test_endless_runs_are_not_learnt_from(name, letter):
    text = "the cat sat on the mat\n" * 40
    learnt = make_tokenizer(name, text + letter * 3_000_000 + "\n" + text)
    assert learnt.decode(learnt.encode("the cat sat")) == "the cat sat"


@pytest.mark.parametrize("digits", ["\u0663\u0660\u0660", "\uff13\uff10\uff10", "\u00b3"])
def test_a_size_is_spelt_in_ascii_digits(digits):
    with pytest.raises(Error) as caught:
        make_tokenizer(f"bpe-{digits}", TEXT)
    assert caught.value.code == USAGE


def test_a_file_over_which_the_library_breaks_down_is_bad_input(tmp_path):
    tree = json.loads(ByteBPE.train("low lower lowest " * 9, 270).to_json())
    tree["model"]["continuing_subword_prefix"] = "##"
    with pytest.raises(Error, match="continuing_subword_prefix") as caught:
        from_json(json.dumps(tree), tmp_path)
    assert caught.value.code == BAD_INPUT


def test_a_panic_of_the_library_is_bad_input_and_other_exits_are_not(monkeypatch):
    class PanicException(BaseException):
        """What pyo3 raises."""

    def raising(exception):
        def from_str(text):
            raise exception

        return type("Library", (), {"from_str": staticmethod(from_str)})

    text = ByteBPE.train("low lower", 260).to_json()
    monkeypatch.setattr(tokenizers, "Tokenizer", raising(PanicException("slice index")))
    with pytest.raises(Error, match="breaks down") as caught:
        from_json(text, "x")
    assert caught.value.code == BAD_INPUT
    monkeypatch.setattr(tokenizers, "Tokenizer", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        from_json(text, "x")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"model": None}, "of another type"),
        ({"version": "1.0"}, "lacks 'model'"),
        ({"model": {"type": "WordLevel", "vocab": {"cat": 0}}}, "words, not characters"),
        ({"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2}}}, "0, 1, 2"),
        ({"model": {"type": "WordLevel", "vocab": {"\ud800": 0}}}, "UTF-8"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_words_and_once(tree, words):
    with pytest.raises(Error) as caught:
        from_json(json.dumps(tree), "x")
    assert caught.value.code == BAD_INPUT
    assert words in str(caught.value)
    assert str(caught.value).count("Fix:") == 1


def test_a_file_over_which_the_library_breaks_down_at_the_first_text_is_bad_input():
    empty, without_words = (json.loads(WordPiece.train("the cat sat on the mat ", 200).to_json()) for _ in range(2))
    empty["normalizer"]["normalizers"][1]["pattern"]["Regex"] = ""
    without_words["model"]["vocab"] = {}
    for broken in (empty, without_words):
        tokenizer = from_json(json.dumps(broken), "x")
        with pytest.raises(Error, match="cannot encode") as caught:
            tokenizer.encode("low we st")
        assert caught.value.code == BAD_INPUT


def test_a_wordpiece_without_its_special_tokens_is_told_with_one_remedy():
    tree = json.loads(WordPiece.train(TEXT, 200).to_json())
    tree["model"]["vocab"]["[mask]"] = tree["model"]["vocab"].pop("[MASK]")
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "[MASK]"]
    with pytest.raises(Error, match=r"lacks \[MASK\]") as caught:
        from_json(json.dumps(tree), "x")
    assert str(caught.value).count("Fix:") == 1


def test_ids_are_stored_in_the_smallest_type_that_holds_them():
    small, big = CharTokenizer("ab"), CharTokenizer([chr(0x10000 + i) for i in range(65_500)])
    assert small.encode_array("ba").dtype == np.uint16
    assert big.dtype == np.int32
    assert big.encode_array(chr(0x10000 + 65_499)).tolist() == [65_499]


# GPT-2's published vocabulary


@needs_gpt2
def test_gpt2_has_its_published_size_and_ids(gpt2):
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert load_tokenizer("gpt2").fingerprint == gpt2.fingerprint
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode(END_OF_TEXT) == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2.encode("a\n\nb") == [64, 198, 198, 65]  # "\n\n" is token 628, and only ends a text
    assert gpt2.encode("a\n\n") == [64, 628]
    assert 50256 not in gpt2.encode(f" {END_OF_TEXT}")
    assert gpt2.decode([15496, 995, 50256]) == f"Hello world{END_OF_TEXT}"


def samples():
    data = os.environ.get("CLASSICLM_DATA")
    path = Path(data or ".") / "hostile" / "naughty-strings.json"
    naughty = json.loads(path.read_text(encoding="utf-8")) if data and path.is_file() else []
    return [
        TEXT,
        *naughty,
        "\n".join(map(str, naughty)),
        "x" * 200,
        " " * 50,
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    ]


@needs_gpt2
def test_gpt2_encodes_as_an_independent_encoder_with_the_same_two_files(gpt2):
    vocab_file, merges_file = (find(file) for file in GPT2_FILES)
    ids = json.loads(vocab_file.read_text(encoding="utf-8"))
    merges = [tuple(line.split()) for line in merges_file.read_text(encoding="utf-8").split("\n")[1:-1]]
    assert len(merges) == 50_000
    for text in samples():
        encoded = gpt2.encode(text)
        assert encoded == encode_by_merges(text, merges, ids)
        assert gpt2.decode(encoded) == text
    again = from_json(gpt2.to_json(), "x")
    assert (again.fingerprint, again.encode(TEXT)) == (gpt2.fingerprint, gpt2.encode(TEXT))


@needs_gpt2
def test_gpt2_encodes_as_tiktoken_with_the_same_two_files(gpt2):
    tiktoken = pytest.importorskip("tiktoken")
    wikitext = Path(os.environ.get("CLASSICLM_DATA") or "nowhere") / "wikitext2" / "valid.txt"
    lines = wikitext.read_text(encoding="utf-8").split("\n") if wikitext.is_file() else []
    back = {char: byte for byte, char in BYTE_TO_CHAR.items()}
    ids = json.loads(find(GPT2_FILES[0]).read_text(encoding="utf-8"))
    ranks = {bytes(back[char] for char in token): i for token, i in ids.items() if token != END_OF_TEXT}
    theirs = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_PATTERN.pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 50_256}
    )
    texts = [*samples(), *lines, "\n".join(lines)]
    assert [text for text in texts if gpt2.encode(text) != theirs.encode_ordinary(text)] == []


@needs_gpt2
@pytest.mark.parametrize("size", [5, 40, 300])
def test_gpt2_in_pieces_gives_the_ids_of_the_whole(gpt2, monkeypatch, size):
    text = "\n\n".join([TEXT, "a\n\n\nb", "  indented\n\n    twice", *map(str, samples())])
    whole = gpt2.encode(text)
    monkeypatch.setattr(module, "PIECE", size)
    assert gpt2.encode(text) == whole


@pytest.mark.parametrize(("vocab", "merges"), [("{", ""), ("[]", "#version\n"), ('{"a": 0}', "#version\nx y\n")])
def test_broken_published_files_are_bad_input_that_names_them(tmp_path, monkeypatch, vocab, merges):
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path))
    for file, content in zip(GPT2_FILES, (vocab, merges), strict=True):
        (tmp_path / file.place).parent.mkdir(exist_ok=True)
        (tmp_path / file.place).write_text(content)
    with pytest.raises(Error) as caught:
        load_tokenizer("gpt2")
    assert caught.value.code == BAD_INPUT
    assert str(tmp_path / GPT2_FILES[0].place) in str(caught.value)


def test_a_byte_level_file_as_transformers_writes_it_is_byte_level(tmp_path):
    tree = json.loads(ByteBPE.train("low lower lowest " * 9, 270).to_json())
    tree["model"]["end_of_word_suffix"] = ""
    assert isinstance(from_json(json.dumps(tree), "file"), ByteBPE)
