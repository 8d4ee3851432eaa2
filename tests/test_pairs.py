"""Sentence pairs: what is read, what is refused and how, and what is tokenised."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from classiclm.data import corpora
from classiclm.data.corpora import MULTI30K, Data, read_documents, read_pairs
from classiclm.data.pairs import prepare_pairs
from classiclm.errors import BAD_INPUT, USAGE, Error

REAL = Path(os.environ.get("CLASSICLM_DATA", "nowhere"))
needs_multi30k = pytest.mark.skipif(not (REAL / MULTI30K[0].place).is_file(), reason="no multi30k under CLASSICLM_DATA")
GERMAN = [f"Ein Hund läuft über Feld {i}." for i in range(10)]
ENGLISH = [f"A dog runs over field {i}." for i in range(10)]


@pytest.fixture(autouse=True)
def nothing_here(monkeypatch, tmp_path):
    """No data folder and an empty cache, unless a test says otherwise."""
    monkeypatch.delenv("CLASSICLM_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """Ten training pairs, two for validation, one for a test."""
    place = tmp_path / "mine"
    place.mkdir()
    for name, lines in {"train": slice(10), "val": slice(2), "test_a": slice(1)}.items():
        (place / f"{name}.de").write_text("\n".join(GERMAN[lines]) + "\n", encoding="utf-8")
        (place / f"{name}.en").write_text("\n".join(ENGLISH[lines]) + "\n", encoding="utf-8")
    return place


def data_of(folder, source="de", target="en", **rest):
    return Data(str(folder), source=source, target=target, **rest)


def failure(call, *arguments):
    with pytest.raises(Error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value)


# What is read


def test_the_splits_of_a_folder_are_its_pairs_of_files_either_way(folder):
    there = read_pairs(data_of(folder))
    assert there == {
        "train": list(zip(GERMAN, ENGLISH, strict=True)),
        "val": list(zip(GERMAN[:2], ENGLISH[:2], strict=True)),
        "test_a": [(GERMAN[0], ENGLISH[0])],
    }
    back = read_pairs(data_of(folder, "en", "de"))
    assert back == {name: [(b, a) for a, b in pairs] for name, pairs in there.items()}


def test_a_file_may_be_compressed_and_the_other_not(folder):
    expected = read_pairs(data_of(folder))
    for path in list(folder.glob("*.de")):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert read_pairs(data_of(folder)) == expected


def test_of_two_languages_one_names_the_other(folder):
    assert read_pairs(data_of(folder, "en", None))["val"][0] == (ENGLISH[0], GERMAN[0])
    assert read_pairs(data_of(folder, None, "en"))["val"][0] == (GERMAN[0], ENGLISH[0])


@pytest.mark.parametrize(
    ("source", "target"), [(None, None), ("de", "de"), ("de", "fr"), ("fr", None), (None, "txt"), ("DE", "en")]
)
def test_an_unclear_direction_is_a_usage_error_that_names_the_languages(folder, source, target):
    code, message = failure(read_pairs, data_of(folder, source, target))
    assert code == USAGE
    assert "which way?" in message
    assert "there are de, en" in message
    assert "--data.source de --data.target en" in message


def test_of_three_languages_two_are_to_be_named(folder):
    for name, n in {"train": 10, "val": 2}.items():
        (folder / f"{name}.pt-br").write_text("Um cachorro corre.\n" * n)
    assert read_pairs(data_of(folder, "en", "pt-br"))["train"][0] == (ENGLISH[0], "Um cachorro corre.")
    assert set(read_pairs(data_of(folder, "en", "pt-br"))) == {"train", "val"}  # the test is of two others
    assert set(read_pairs(data_of(folder))) == {"train", "val", "test_a"}
    code, message = failure(read_pairs, data_of(folder, "en", None))
    assert code == USAGE
    assert "there are de, en, pt-br" in message
    (folder / "val.pt-br").unlink()
    assert failure(read_pairs, data_of(folder, "en", "pt-br"))[0] == BAD_INPUT


def test_lines_are_cut_at_line_breaks_only_and_stripped(folder):
    (folder / "val.de").write_bytes("\ufeffeins\u2028zwei \r\n\x85 drei\r\n".encode())
    assert [pair[0] for pair in read_pairs(data_of(folder))["val"]] == ["eins\u2028zwei", "drei"]


def test_pairs_with_an_empty_side_are_left_out_and_counted(folder):
    (folder / "train.de").write_text("eins\n\ndrei\n \nfünf\n" + "x\n" * 4 + "\n", encoding="utf-8")
    (folder / "train.en").write_text("one\ntwo\n\t\n\nfive\n" + "y\n" * 5, encoding="utf-8")
    assert read_pairs(data_of(folder))["train"] == [("eins", "one"), ("fünf", "five"), *[("x", "y")] * 4]
    prepared = prepare_pairs(data_of(folder), "bpe-300")
    assert (prepared.train.n_empty, prepared.val.n_empty) == (4, 0)


@pytest.mark.parametrize(("share", "n_train"), [(0.1, 9), (0.25, 7), (0.5, 5)])
def test_without_files_for_validation_the_last_pairs_are_kept_for_it(folder, share, n_train):
    for language in ("de", "en"):
        (folder / f"val.{language}").unlink()
    there = read_pairs(data_of(folder, val_share=share))
    pairs = list(zip(GERMAN, ENGLISH, strict=True))
    assert (there["train"], there["val"]) == (pairs[:n_train], pairs[n_train:])
    for language in ("de", "en"):
        (folder / f"train.{language}").write_text("ein Satz\n")
    code, message = failure(read_pairs, data_of(folder, val_share=share))
    assert code == BAD_INPUT
    assert "1 training pairs, too few" in message


def broken_cases():
    return {
        "unequal": ("train.en", b"one\ntwo\n", ["has 10 lines and train.en has 2"]),
        "one more line": ("val.en", b"one\ntwo\n\n", ["has 2 lines and val.en has 3"]),
        "not utf-8": ("val.en", b"one\nt\xffo\n", ["is not UTF-8 at byte 5", "--data.errors replace"]),
        "binary": ("val.en", b"one\n\0\n", ["is a binary file"]),
        "empty": ("train.de", b"", ["has 0 lines and train.en has 10"]),
        "missing side": ("val.en", None, ["has no val.en beside it", "val.de"]),
        "missing side of a test": ("test_a.de", None, ["has no test_a.de beside it", "test_a.en"]),
        "no training side": ("train.de", None, ["has no train.de beside it"]),
    }


@pytest.mark.parametrize("case", broken_cases())
def test_a_broken_corpus_is_bad_input_that_names_the_files(folder, case):
    name, content, expected = broken_cases()[case]
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    code, message = failure(read_pairs, data_of(folder))
    assert code == BAD_INPUT
    assert str(folder) in message
    assert all(part in message for part in expected), message


def test_bytes_that_are_not_utf_8_may_be_replaced(folder):
    (folder / "val.en").write_bytes(b"one\nt\xffo\n")
    assert read_pairs(data_of(folder, errors="replace"))["val"][1][1] == "t\ufffdo"


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"no gzip at all", lambda b: b[:-4] + b"zzzz"]
)
def test_a_damaged_gz_file_is_bad_input(folder, damage):
    whole = gzip.compress((folder / "train.de").read_bytes())
    (folder / "train.de").unlink()
    (folder / "train.de.gz").write_bytes(damage(whole))
    code, message = failure(read_pairs, data_of(folder))
    assert code == BAD_INPUT
    assert "train.de.gz: is damaged" in message


def test_a_gz_file_with_damaged_contents_is_bad_input(folder):
    whole = bytearray(gzip.compress((folder / "train.de").read_bytes()))
    whole[10] = 0xFF  # a block of a kind that there is not
    (folder / "train.de").unlink()
    (folder / "train.de.gz").write_bytes(bytes(whole))
    assert failure(read_pairs, data_of(folder))[0] == BAD_INPUT


def test_the_same_file_with_and_without_compression_is_one_too_many(folder):
    (folder / "val.en.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    code, message = failure(read_pairs, data_of(folder))
    assert code == BAD_INPUT
    assert "is there twice" in message


def test_a_corpus_without_training_or_any_sentence_is_bad_input(folder):
    for language in ("de", "en"):
        (folder / f"test_a.{language}").write_text("\n \n")
    code, message = failure(read_pairs, data_of(folder))
    assert code == BAD_INPUT
    assert "have no sentences" in message
    for path in [*folder.glob("train.*"), *folder.glob("test_a.*")]:
        path.unlink()
    code, message = failure(read_pairs, data_of(folder))
    assert code == BAD_INPUT
    assert "has no training pairs from de to en" in message


# The wrong kind of corpus


def test_a_language_model_does_not_read_sentence_pairs(folder):
    (folder / "README.md").write_text("what this is")
    for name in (str(folder), "multi30k"):
        code, message = failure(read_documents, Data(name))
        assert code == BAD_INPUT
        assert "is a corpus of sentence pairs. Fix: train transformer2017-" in message


@pytest.mark.parametrize("name", ["text", "text/train.txt", "text/*.txt", "plays", "shakespeare"])
def test_a_translator_does_not_read_plain_text(tmp_path, name):
    (tmp_path / "text").mkdir()
    for ending in ("txt", "md", "de"):  # a text in one language is no pair
        (tmp_path / "text" / f"train.{ending}").write_text("text")
    code, message = failure(read_pairs, Data(f"{tmp_path}/{name}" if "text" in name else name))
    assert code == BAD_INPUT
    assert "has no sentence pairs. Fix: " in message
    assert "a folder with train.de, train.en, val.de, val.en" in message
    if name == "text":
        assert read_documents(Data(f"{tmp_path}/{name}")) == ["text", "text"]


def test_names_and_paths_that_are_not_there(tmp_path):
    code, message = failure(read_pairs, Data("multi30"))
    assert code == USAGE
    assert "did you mean 'multi30k'" in message
    code, message = failure(read_pairs, Data(f"{tmp_path}/no/"))
    assert code == BAD_INPUT
    assert "does not exist" in message


# Multi30k


@needs_multi30k
def test_multi30k_has_its_published_sizes_and_goes_from_german_to_english(monkeypatch):
    monkeypatch.setenv("CLASSICLM_DATA", str(REAL))
    there = read_pairs(Data("multi30k"))
    assert {name: len(pairs) for name, pairs in there.items()} == {
        "train": 29_000,
        "val": 1014,
        "test_2016_flickr": 1000,
    }
    assert there["train"][0] == (
        "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
        "Two young, White males are outside near many bushes.",
    )
    assert read_pairs(Data("multi30k", target="de"))["val"][7] == there["val"][7][::-1]
    assert read_pairs(Data(str(REAL / "multi30k"), source="de", target="en")) == there


def test_multi30k_that_is_not_here_names_the_file_to_place_and_where(tmp_path):
    code, message = failure(read_pairs, Data("multi30k"))
    assert code == BAD_INPUT
    assert str(tmp_path / "cache" / "classiclm" / "multi30k" / "train.de.gz") in message
    assert "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw/train.de.gz" in message


def test_a_multi30k_file_with_other_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path))
    for file in MULTI30K:
        (tmp_path / file.place).parent.mkdir(exist_ok=True)
        (tmp_path / file.place).write_bytes(gzip.compress(b"another text\n"))
    code, message = failure(read_pairs, Data("multi30k"))
    assert code == BAD_INPUT
    assert "its sha256 differs" in message
    assert "multi30k" in corpora.NAMES


# Tokens


def test_the_tokenizer_is_learnt_on_both_sides_of_the_training_split_alone(folder):
    def learnt():
        return prepare_pairs(data_of(folder), "bpe-300").tokenizer.fingerprint

    first = learnt()
    (folder / "val.de").write_text("völlig anders\nganz und gar\n", encoding="utf-8")
    (folder / "test_a.en").write_text("entirely different\n")
    assert learnt() == first
    (folder / "train.en").write_text("zebra zebra zebra\n" * 10)
    second = learnt()
    (folder / "train.de").write_text("giraffe giraffe\n" * 10)
    assert len({first, second, learnt()}) == 3


def test_each_sentence_is_its_own_tokens_and_the_end_token(folder):
    prepared = prepare_pairs(data_of(folder), "bpe-300")
    tokenizer, train = prepared.tokenizer, prepared.train
    end = tokenizer.end_of_text
    assert train.sources() == [[*tokenizer.encode(text), end] for text in GERMAN]
    cut = np.split(train.target, train.target_starts[1:-1])
    assert [tokenizer.decode(tokens[:-1].tolist()) for tokens in cut] == ENGLISH
    assert {int(tokens[-1]) for tokens in cut} == {end}
    assert train.n_target_tokens == sum(map(len, cut))
    assert train.n_bytes == sum(len(text.encode()) for text in ENGLISH)
    assert train.n_chars == sum(map(len, ENGLISH))
    back = prepare_pairs(data_of(folder, "en", "de"), tokenizer)
    assert back.train.n_bytes == sum(len(text.encode()) for text in GERMAN) > back.train.n_chars
    assert list(train.texts) == list(zip(GERMAN, ENGLISH, strict=True))
    assert train.lengths.tolist() == [list(map(len, train.sources())), list(map(len, cut))]


def test_splits_go_by_name_and_a_fingerprint_names_each(folder):
    prepared = prepare_pairs(data_of(folder), "bpe-300")
    assert prepared.split("test_a") is prepared.splits["test_a"]
    assert (len(prepared.train), len(prepared.val), len(prepared.split("test_a"))) == (10, 2, 1)
    code, message = failure(prepared.split, "test")
    assert code == USAGE
    assert "test_a" in message
    others = [
        prepare_pairs(data_of(folder, "en", "de"), prepared.tokenizer).train,
        prepare_pairs(data_of(folder), "bpe-270").train,
        prepared.val,
    ]
    assert len({prepared.train.fingerprint, *[pairs.fingerprint for pairs in others]}) == 4
    assert prepare_pairs(data_of(folder), prepared.tokenizer).train.fingerprint == prepared.train.fingerprint


def test_a_tokenizer_without_an_end_token_is_a_usage_error(folder):
    code, message = failure(prepare_pairs, data_of(folder), "char")
    assert code == USAGE
    assert "no end-of-text token" in message
    assert "bpe-8000" in message


def test_a_validation_file_of_another_name_is_told_and_not_passed_over(tmp_path):
    for name in ("train.de", "train.en", "valid.de", "valid.en"):
        (tmp_path / name).write_text("eins\nzwei\n")
    with pytest.raises(Error) as caught:
        read_pairs(Data(str(tmp_path), source="de", target="en"))
    assert caught.value.code == 3
    assert "rename it to val" in str(caught.value)


def test_a_folder_of_texts_may_have_any_names(tmp_path):
    for name in ("dev.txt", "valid.md", "train.txt"):
        (tmp_path / name).write_text("eins\nzwei\n")
    assert len(read_documents(Data(str(tmp_path)))) == 3
