"""From names and paths to splits: what is read, what is refused and how, what is counted; and n-gram tables."""

import http.client
import io
import math
import os
import time
import urllib.error
import urllib.request
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.config import validate
from classiclm.data import corpora, plays
from classiclm.data.batches import evaluation_batches
from classiclm.data.corpora import SHAKESPEARE, Data, default_corpus, entropy_floor, read_documents
from classiclm.data.locate import Download, cache_folder, find, locate
from classiclm.data.splits import prepare_text
from classiclm.data.tokenizers import END_OF_TEXT, ByteBPE
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.evaluate.ngram import SMOOTHING, baselines, ngram_loss
from classiclm.files import sha256
from classiclm.objectives import CausalLM, mean_loss

MIXED = "Grüße aus Köln 日本語 😀 the cat\n" * 40


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    """No data folder and an empty cache, unless a test says otherwise."""
    monkeypatch.delenv("CLASSICLM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def failure(call, *arguments):
    with pytest.raises(Error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def read(path, **settings):
    return read_documents(Data(str(path), **settings))


# Corpora


def test_a_file_is_one_document(tmp_path):
    (tmp_path / "a.text").write_text("some text\n")
    assert read(tmp_path / "a.text") == ["some text\n"]


def test_a_folder_is_its_txt_and_md_files_in_order(tmp_path):
    for name, text in {"b.txt": "B", "a.md": "A", "sub/c.TXT": "C", "d.py": "no", "e": "no", "f.txt.gz": "no"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "g.txt").mkdir()
    assert read(tmp_path) == ["A", "B", "C"]


def test_a_relative_path_needs_a_separator_and_a_bare_name_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("text")
    assert read("./mine.txt") == ["text"]
    error = failure(read, "mine.txt")
    assert error.code == USAGE
    assert "write ./mine.txt" in str(error)


@pytest.mark.parametrize(
    ("name", "hint"), [("shakespear", "'shakespeare'"), ("play", "'plays'"), ("", ""), ("zz", "plays")]
)
def test_an_unknown_name_is_a_usage_error_with_a_hint(name, hint):
    error = failure(read, name)
    assert error.code == USAGE
    assert hint in str(error)


@pytest.mark.parametrize("name", ["missing.txt", "missing/", "empty-folder", "only-code"])
def test_a_path_with_nothing_to_read_is_bad_input_that_names_it(tmp_path, name):
    (tmp_path / "empty-folder").mkdir()
    (tmp_path / "only-code").mkdir()
    (tmp_path / "only-code" / "a.py").write_text("x")
    error = failure(read, f"{tmp_path}/{name}")
    assert error.code == BAD_INPUT
    assert str(tmp_path / name) in str(error)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="everything may be read")
def test_a_file_that_may_not_be_read_is_bad_input(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    assert failure(read, tmp_path / "a.txt").code == BAD_INPUT


@pytest.mark.parametrize("content", [b"\x7fELF\0\0", "text".encode("utf-16"), b"a" * 5000 + b"\0"])
def test_a_binary_file_is_bad_input(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    error = failure(read, tmp_path / "a.txt")
    assert error.code == BAD_INPUT
    assert "binary" in str(error)


def test_invalid_utf_8_names_the_byte_or_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff\xe9def")
    error = failure(read, path)
    assert error.code == BAD_INPUT
    assert "at byte 3" in str(error)
    assert "--data.errors replace" in str(error)
    assert read(path, errors="replace") == ["abc\ufffd\ufffddef"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabc\xef\xbb\xbf")
    assert read(tmp_path / "a.txt") == ["abc\ufeff"]


def test_line_ends_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\n\rc")
    assert read(tmp_path / "a.txt") == ["a\r\nb\n\rc"]


def test_plays_are_the_same_a_million_characters_and_have_a_floor():
    (first,), (second,) = read("plays"), read("plays")
    assert first == second
    assert len(first) == corpora.PLAYS_CHARACTERS
    assert entropy_floor("plays") == plays.entropy_per_char()
    assert entropy_floor("shakespeare") is None
    assert default_corpus() == "plays"


def test_the_share_for_validation_is_neither_nothing_nor_all():
    for share in (0, 1, -0.1, 1.5, float("nan")):
        assert failure(validate, Data, {"val_share": share}).code == USAGE
    assert validate(Data, {"val_share": 0.5}).val_share == 0.5


# Splits


@pytest.mark.parametrize("n", [20, 101, 999, 1000, 1001])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_the_text_is_cut_at_a_character(tmp_path, n, share):
    text = (MIXED * 10)[:n]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = prepare_text(Data(str(tmp_path / "a.txt"), val_share=share), "char")
    train, val = (data.tokenizer.decode(data.split(name).tokens.tolist()) for name in ("train", "val"))
    assert train + val == text
    assert len(train) == math.floor(n * (1 - share))


def test_an_unknown_split_is_a_usage_error(text_file):
    data = prepare_text(Data(str(text_file)), "char")
    assert failure(data.split, "test").code == USAGE


@pytest.mark.parametrize("content", ["", "a", "ab", "abcdefghij"])
def test_too_little_text_is_bad_input_for_any_tokenizer(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    for tokenizer in ("char", "bpe-257"):
        error = failure(prepare_text, Data(str(tmp_path / "a.txt")), tokenizer)
        assert error.code == BAD_INPUT
        assert f"only {len(content)} characters" in str(error)


def test_a_validation_text_of_a_single_token_is_too_little(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 20)
    tokenizer = ByteBPE.train("aa aa", 258)  # one merge: "aa"
    assert failure(prepare_text, Data(str(tmp_path / "a.txt")), tokenizer).code == BAD_INPUT
    assert prepare_text(Data(str(tmp_path / "a.txt"), val_share=0.2), tokenizer).val.n_bytes == 2


def test_documents_end_with_end_of_text_where_the_tokenizer_has_it(tmp_path):
    texts = {"a.txt": "first " * 20, "b.txt": "second " * 20, "c.txt": "third " * 40, "d.txt": "", "e.txt": "last " * 9}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    tokenizer = ByteBPE.train("x", 257)
    data = prepare_text(Data(str(tmp_path), val_share=0.2), tokenizer)
    whole = "".join(texts.values())
    at = math.floor(len(whole) * 0.8)
    left = END_OF_TEXT.join([texts["a.txt"], texts["b.txt"], whole[260:at]]) + END_OF_TEXT
    right = END_OF_TEXT.join([whole[at:500], texts["e.txt"]]) + END_OF_TEXT
    assert tokenizer.decode(data.train.tokens.tolist()) == left
    assert tokenizer.decode(data.val.tokens.tolist()) == right
    assert data.train.n_chars == at - 1  # the text alone, without the marks


def test_documents_are_a_blank_line_apart_where_it_has_none(tmp_path):
    for name, text in {"a.txt": "aaaa" * 10, "b.txt": "bbbb" * 10}.items():
        (tmp_path / name).write_text(text)
    data = prepare_text(Data(str(tmp_path), val_share=0.25), "char")
    assert data.tokenizer.decode(data.train.tokens.tolist()) == "a" * 40 + "\n\n" + "b" * 20
    assert data.tokenizer.decode(data.val.tokens.tolist()) == "b" * 20


def test_an_empty_first_document_changes_no_count(tmp_path):
    (tmp_path / "z.txt").write_text("some text " * 20)
    without = prepare_text(Data(str(tmp_path)), ByteBPE.train("x", 257))
    (tmp_path / "a.txt").write_text("")
    again = prepare_text(Data(str(tmp_path)), ByteBPE.train("x", 257)).train
    assert (again.n_chars, again.n_bytes) == (without.train.n_chars, without.train.n_bytes) == (179, 179)
    assert again.fingerprint == without.train.fingerprint


@pytest.mark.parametrize("tokenizer", ["char", "bpe-257", "bpe-300"])
def test_characters_and_bytes_are_counted_behind_the_first_token(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(MIXED, encoding="utf-8")
    data = prepare_text(Data(str(tmp_path / "a.txt")), tokenizer)
    at = math.floor(len(MIXED) * 0.9)
    for split, text in ((data.train, MIXED[:at]), (data.val, MIXED[at:])):
        first = data.tokenizer.decode(split.tokens[:1].tolist())
        assert "\ufffd" not in first
        assert split.n_chars == len(text) - len(first)
        assert split.n_bytes == len(text.encode()) - len(first.encode())


class Fixed(torch.nn.Module):
    """Gives each token the same logits everywhere."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, -1)


def test_bits_per_byte_do_not_depend_on_how_the_text_is_written_as_tokens(tmp_path):
    """A coder that spends 8 bits on each byte spends 8 bits per byte, whether its tokens are bytes or characters."""
    text = "déjà " * 400
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for tokenizer in ("char", "bpe-257"):
        data = prepare_text(Data(str(tmp_path / "a.txt")), tokenizer)
        bits = torch.tensor([8.0 * len(data.tokenizer.decode([i]).encode()) for i in range(data.tokenizer.vocab_size)])
        if tokenizer == "bpe-257":  # a byte alone decodes to U+FFFD; the end of text costs nothing
            bits = 8.0 * (torch.arange(257) != data.tokenizer.end_of_text)
        nats = bits * math.log(2)
        normaliser = float(torch.logsumexp(-nats, 0))
        loss = mean_loss(Fixed(-nats), CausalLM(), evaluation_batches(data.val, 7, 3)) - normaliser
        spent = loss * (len(data.val.tokens) - 1) / math.log(2)
        assert spent / data.val.n_bytes == pytest.approx(8.0, rel=1e-5)


def test_the_fingerprint_names_tokens_and_tokenizer(text_file):
    data = prepare_text(Data(str(text_file)), "char")
    assert data.train.fingerprint == prepare_text(Data(str(text_file)), "char").train.fingerprint
    assert data.train.fingerprint != data.val.fingerprint
    text_file.write_text(text_file.read_text().replace("cat", "cow"))
    assert data.train.fingerprint != prepare_text(Data(str(text_file)), "char").train.fingerprint
    lower = prepare_text(Data(str(text_file)), "char").train
    text_file.write_text(text_file.read_text().upper())
    upper = prepare_text(Data(str(text_file)), "char").train
    assert np.array_equal(upper.tokens, lower.tokens)
    assert upper.fingerprint != lower.fingerprint


def test_byte_pairs_are_learnt_from_the_training_part_alone(tmp_path):
    (tmp_path / "a.txt").write_text("ab " * 300 + "xyz" * 32)
    data = prepare_text(Data(str(tmp_path / "a.txt")), "bpe-300")
    assert len(data.tokenizer.encode(" ab")) == 1
    assert len(data.tokenizer.encode("xyz")) == 3


# Downloads

CONTENT = b"published text\n" * 20
FILE = Download("folder/file.txt", "https://example.org/file.txt", sha256(CONTENT))


def served(monkeypatch, answer):
    """urlopen answers with these bytes or raises this exception; returns the list of the addresses asked for."""
    asked = []

    def urlopen(request, timeout):
        asked.append(request.full_url)
        if isinstance(answer, Exception):
            raise answer
        response = io.BytesIO(answer)
        response.status, response.headers = 200, {}
        return response

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return asked


def test_a_file_is_downloaded_once_verified_and_kept_in_the_cache(monkeypatch, tmp_path):
    asked = served(monkeypatch, CONTENT)
    path = locate(FILE)
    assert path == tmp_path / "cache" / "classiclm" / "folder" / "file.txt"
    assert path.read_bytes() == CONTENT
    assert locate(FILE) == path
    assert asked == [FILE.url]
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


PROBLEMS = [
    (CONTENT[:-1], "wrong sha256"),
    (b"", "wrong sha256"),
    (b"<!DOCTYPE html><html>Sign in</html>", "a web page"),
    (b"\n  <html><body>", "a web page"),
    (urllib.error.URLError("Name or service not known"), "Name or service not known"),
    (urllib.error.HTTPError("u", 404, "Not Found", None, None), "Not Found"),
    (TimeoutError("timed out"), "timed out"),
    (ConnectionResetError("reset"), "reset"),
    (http.client.IncompleteRead(b"half"), "IncompleteRead"),
]


@pytest.mark.parametrize(("answer", "why"), PROBLEMS)
def test_a_failed_download_names_the_file_and_where_to_place_it_and_leaves_nothing(monkeypatch, tmp_path, answer, why):
    served(monkeypatch, answer)
    error = failure(locate, FILE)
    assert error.code == BAD_INPUT
    assert why in str(error)
    assert FILE.url in str(error)
    assert str(cache_folder() / FILE.place) in str(error)
    assert list(tmp_path.rglob("*.txt")) == []


def test_the_data_folder_comes_before_the_cache_and_both_before_the_network(monkeypatch, tmp_path):
    asked = served(monkeypatch, CONTENT)
    cached = locate(FILE)
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path / "data"))
    assert find(FILE) == cached
    mine = tmp_path / "data" / FILE.place
    mine.parent.mkdir(parents=True)
    mine.write_bytes(CONTENT)
    assert find(FILE) == locate(FILE) == mine
    assert len(asked) == 1
    mine.write_bytes(b"another text")
    error = failure(locate, FILE)
    assert error.code == BAD_INPUT
    assert "not the published" in str(error)


def test_without_network_shakespeare_says_where_to_put_the_file():
    error = failure(read, "shakespeare")  # the tests' sockets refuse to connect
    assert error.code == BAD_INPUT
    assert "shakespeare/input.txt" in str(error)
    assert str(cache_folder() / "shakespeare" / "input.txt") in str(error)


# N-gram tables


def table_loss(train, val, order, vocab_size, add):
    """The definition, with dictionaries."""
    grams = Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))
    contexts = Counter()
    for gram, count in grams.items():
        contexts[gram[:-1]] += count
    nats = [
        -math.log((grams[gram] + add) / (contexts[gram[:-1]] + add * vocab_size))
        for gram in (tuple(val[i : i + order]) for i in range(len(val) - order + 1))
    ]
    return sum(nats) / len(nats)


@settings(deadline=None, max_examples=200)
@given(
    order=st.integers(1, 4),
    vocab_size=st.integers(1, 5),
    add=st.sampled_from([0.01, 0.5, 1.0, 3.0]),
    data=st.data(),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
)
def test_ngram_losses_are_what_counting_in_dictionaries_gives(order, vocab_size, add, data, dtype):
    draw = st.lists(st.integers(0, vocab_size - 1), min_size=order, max_size=40)
    train, val = data.draw(draw), data.draw(draw)
    loss = ngram_loss(np.array(train, dtype), np.array(val, dtype), order, vocab_size, add)
    assert loss == pytest.approx(table_loss(train, val, order, vocab_size, add), abs=1e-12)


def test_a_table_is_a_probability_distribution():
    train = np.random.default_rng(0).integers(0, 4, 50)
    for context in range(4):
        p = [math.exp(-ngram_loss(train, np.array([context, x]), 2, 4, 0.3)) for x in range(4)]
        assert sum(p) == pytest.approx(1)


def test_a_vocabulary_too_large_for_an_order_is_refused_or_left_out():
    tokens = np.arange(50_000)
    with pytest.raises(ValueError, match="too high"):
        ngram_loss(tokens, tokens, 5, 50_257, 1.0)
    assert "4-gram table" in baselines(tokens[:99], tokens[:99], 50_257)
    assert "4-gram table" not in baselines(tokens[:99], tokens[:99], 10**5)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_texts_shorter_than_an_order_leave_it_out(n):
    tokens = np.zeros(n, dtype=np.uint16)
    assert list(baselines(np.zeros(9, np.uint16), tokens, 3)) == [
        "uniform guess",
        *["unigram table", "bigram table", "trigram table", "4-gram table"][:n],
    ]


# The real Shakespeare


@pytest.fixture
def shakespeare(monkeypatch, real_shakespeare):
    monkeypatch.setattr(corpora, "locate", lambda _: real_shakespeare)
    return prepare_text(Data("shakespeare"), "char")


@pytest.fixture(scope="module")
def real_shakespeare():
    """The file, looked up before the tests' own environment hides it."""
    path = find(SHAKESPEARE)
    if path is None:
        pytest.skip("Shakespeare is not on this machine")
    assert sha256(path.read_bytes()) == SHAKESPEARE.sha256
    return path


def test_shakespeare_has_its_published_sizes(shakespeare):
    assert (len(shakespeare.train.tokens), len(shakespeare.val.tokens)) == (1_003_854, 111_540)  # nanoGPT, prepare.py
    assert shakespeare.tokenizer.vocab_size == 65
    assert shakespeare.val.n_bytes == shakespeare.val.n_chars == 111_539


@pytest.mark.parametrize(("order", "nats"), [(1, 3.347), (2, 2.482), (3, 2.046), (4, 1.777)])
def test_ngram_losses_on_shakespeare_are_the_published_ones(shakespeare, order, nats):
    loss = ngram_loss(shakespeare.train.tokens, shakespeare.val.tokens, order, 65, SMOOTHING[order])
    assert loss == pytest.approx(nats, abs=1e-3)
