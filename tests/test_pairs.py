"""Sentence pairs: what is read and refused, what is tokenised, and batches as functions of the step."""

import gzip
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data import corpora
from classiclm.data.corpora import MULTI30K, Data, read_documents, read_pairs
from classiclm.data.pairs import PairBatches, Pairs, micro_batches, pair_evaluation_batches, prepare_pairs
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.models.transformer2017 import Config, Transformer2017
from classiclm.nn.mask import IGNORE, Mask
from classiclm.recipe import PairRecipe

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
    whole[12] ^= 0xFF
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


# Batches

END = 0
LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=60)


def pairs_of(lengths, fingerprint="f"):
    """Pairs of the given lengths with the end token. Every token but the end is another number: 1, 2, 3, ..."""
    starts = [np.cumsum([0, *side]) for side in zip(*lengths, strict=True)]
    arrays = []
    for first, place in zip((1, 1 + int(starts[0][-1])), starts, strict=True):
        tokens = np.arange(first, first + place[-1])
        tokens[place[1:] - 1] = END
        arrays.append(tokens)
    return Pairs(*arrays, *starts, tuple(("a", "b") for _ in lengths), 0, 0, 0, fingerprint)


def sides_of(pairs):
    """The pairs as lists, for looking them up."""
    cut = [
        np.split(tokens, starts[1:-1])
        for tokens, starts in [(pairs.source, pairs.source_starts), (pairs.target, pairs.target_starts)]
    ]
    return [(tuple(a.tolist()), tuple(b.tolist())) for a, b in zip(*cut, strict=True)]


def pairs_in(batch):
    """The pairs of a batch, read off its source and its targets."""
    return [
        (tuple(source[keep].tolist()), tuple(target[target != IGNORE].tolist()))
        for source, keep, target in zip(batch["source"], batch["source_keep"], batch["targets"], strict=True)
    ]


def batches_of(pairs, n_ctx=12, tokens=40, seed=0):
    return PairBatches(pairs, END, n_ctx, PairRecipe(batch=tokens), seed)


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60), n_ctx=st.integers(4, 12), seed=st.integers(0, 5))
def test_every_epoch_has_each_pair_that_fits_once(lengths, tokens, n_ctx, seed):
    pairs = pairs_of(lengths)
    fit = sorted(pair for pair in sides_of(pairs) if max(map(len, pair)) <= n_ctx)
    if not fit:
        code, message = failure(batches_of, pairs, n_ctx)
        assert code == BAD_INPUT
        assert f"--model.n_ctx; {min(max(pair) for pair in lengths)} is enough" in message
        return
    batches = batches_of(pairs, n_ctx, tokens, seed)
    assert batches.n_left_out == len(lengths) - len(fit)
    for epoch in range(3):
        made = [batches(epoch * batches.n_batches + i) for i in range(batches.n_batches)]
        assert sorted(pair for batch in made for pair in pairs_in(batch)) == fit
        for batch in made:
            rows = len(batch["source"])
            assert rows == 1 or max(batch["source"].numel(), batch["inputs"].numel()) <= tokens


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_inputs_are_the_targets_one_later_behind_the_end_token_and_padding_is_masked(lengths, tokens):
    for batch in pair_evaluation_batches(pairs_of(lengths), END, None, tokens):
        kinds = {name: tensor.dtype for name, tensor in batch.items()}
        assert kinds == {
            "source": torch.int64,
            "source_keep": torch.bool,
            "inputs": torch.int64,
            "targets": torch.int64,
        }
        assert batch["source"].shape == batch["source_keep"].shape
        assert batch["inputs"].shape == batch["targets"].shape
        assert (batch["inputs"][:, 0] == END).all()
        behind = batch["targets"] == IGNORE
        expected = batch["targets"].masked_fill(behind, END)[:, :-1]
        assert torch.equal(batch["inputs"][:, 1:], expected)
        assert (batch["source"][~batch["source_keep"]] == END).all()
        assert not behind.all(0).any()  # no column is padding in every row
        assert batch["source_keep"].any(0).all()
        for side in (behind, ~batch["source_keep"]):
            assert torch.equal(side, side.long().cumsum(1) > 0)  # padding is at the end of the row


def test_a_batch_depends_on_its_step_alone():
    rng = np.random.default_rng(0)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 12, (200, 2)).tolist()])
    batches = batches_of(pairs)
    forwards = [batches(step) for step in range(3 * batches.n_batches)]
    again = batches_of(pairs)
    for step in reversed(range(3 * batches.n_batches)):
        for made in (again(step), batches(step)):
            assert all(torch.equal(made[name], forwards[step][name]) for name in made)


@pytest.mark.parametrize("other", [{"seed": 1}, {"fingerprint": "g"}])
def test_another_seed_or_other_data_gives_another_order(other):
    lengths = [(5, 5)] * 100
    a = batches_of(pairs_of(lengths))
    b = batches_of(pairs_of(lengths, other.get("fingerprint", "f")), seed=other.get("seed", 0))
    assert pairs_in(a(0)) != pairs_in(b(0))


def test_in_every_epoch_batches_come_in_another_order_and_equal_pairs_meet_others():
    rng = np.random.default_rng(1)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 9, (300, 2)).tolist()])
    batches = batches_of(pairs)
    epochs = [[batches(epoch * batches.n_batches + i) for i in range(batches.n_batches)] for epoch in range(5)]
    widths = [[batch["source"].shape[1] for batch in epoch] for epoch in epochs]
    assert len({tuple(row) for row in widths}) == 5
    assert all(row != sorted(row) for row in widths)
    met = [{frozenset(pairs_in(batch)) for batch in epoch} for epoch in epochs]
    assert all(len(a & b) < batches.n_batches / 2 for i, a in enumerate(met) for b in met[:i])
    sizes = [sorted(len(batch["source"]) for batch in epoch) for epoch in epochs]
    assert all(row == sizes[0] for row in sizes)  # cut at the same places


def test_pairs_in_a_batch_are_about_equally_long():
    rng = np.random.default_rng(2)
    lengths = [(int(n), int(n)) for n in rng.integers(1, 101, 3000)]
    batches = batches_of(pairs_of(lengths), n_ctx=100, tokens=2000)
    made = [batches(i) for i in range(batches.n_batches)]
    padding = sum(int((batch["targets"] == IGNORE).sum()) for batch in made)
    assert padding < 0.05 * sum(batch["targets"].numel() for batch in made)
    assert batches.n_batches < 1.1 * sum(n for n, _ in lengths) / 2000


def test_a_pair_that_is_longer_than_a_batch_is_one_by_itself():
    batches = batches_of(pairs_of([(3, 3), (11, 2), (2, 12), (3, 3)]), tokens=6)
    made = sorted(len(pairs_in(batches(i))) for i in range(batches.n_batches))
    assert made == [1, 1, 2]


def test_a_batch_of_4096_tokens_takes_less_than_5_ms():
    rng = np.random.default_rng(3)
    lengths = [tuple(pair) for pair in np.clip(rng.normal(15, 5, (29_000, 2)), 2, 60).astype(int).tolist()]
    batches = batches_of(pairs_of(lengths), n_ctx=128, tokens=4096)
    times = []
    for step in range(50):
        start = time.perf_counter()
        batches(step)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 5e-3


# Evaluation


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60), n_ctx=st.sampled_from([None, 6, 12]))
def test_evaluation_has_all_pairs_once_by_length(lengths, tokens, n_ctx):
    pairs = pairs_of(lengths)
    made = list(pair_evaluation_batches(pairs, END, n_ctx, tokens))
    seen = [pair for batch in made for pair in pairs_in(batch)]
    assert sorted(seen) == sorted(pair for pair in sides_of(pairs) if max(map(len, pair)) <= (n_ctx or 12))
    keys = [max(map(len, pair)) for pair in seen]
    assert keys == sorted(keys)
    for batch in made:
        assert len(batch["source"]) == 1 or max(batch["source"].numel(), batch["inputs"].numel()) <= tokens


def test_some_batches_of_the_evaluation_are_spread_evenly_and_always_the_same():
    rng = np.random.default_rng(4)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 12, (200, 2)).tolist()])
    whole = [pairs_in(batch) for batch in pair_evaluation_batches(pairs, END, 12, 40)]
    some = [pairs_in(batch) for batch in pair_evaluation_batches(pairs, END, 12, 40, 7)]
    places = [whole.index(batch) for batch in some]
    assert len(places) == 7
    assert (places[0], places[-1]) == (0, len(whole) - 1)
    assert np.ptp(np.diff(places)) <= 1
    more = list(pair_evaluation_batches(pairs, END, 12, 40, len(whole) + 5))
    assert [pairs_in(batch) for batch in more] == whole


# Parts of a batch


def nats(model, batch):
    """The sum of -log p over the targets."""
    logits = model(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"]))
    return F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=IGNORE, reduction="sum")


def small_translator():
    torch.manual_seed(0)
    model = Transformer2017(Config(2, 24, 3, vocab_size=700, dropout=0.0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("tokens", [1, 13, 30, 64, 1000])
def test_the_parts_of_a_batch_have_the_loss_and_the_gradient_of_the_whole(tokens):
    model = small_translator()
    rng = np.random.default_rng(5)
    pairs = pairs_of([tuple(pair) for pair in rng.integers(1, 12, (40, 2)).tolist()])
    batch = batches_of(pairs, tokens=150)(3)
    assert len(batch["source"]) > 10
    parts = list(micro_batches(batch, tokens))
    assert (len(parts) == 1) == (tokens == 1000)
    whole = nats(model, batch)
    whole.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    sums = [nats(model, part) for part in parts]
    torch.stack(sums).sum().backward()
    assert float(torch.stack(sums).sum().detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-4 * float(gradient.abs().max() + 1))


@torch.no_grad()
def test_the_loss_of_a_batch_is_that_of_its_pairs_one_by_one_without_any_padding():
    model = small_translator()
    pairs = pairs_of([(3, 9), (9, 3), (1, 1), (5, 7)])
    (batch,) = pair_evaluation_batches(pairs, END, None, 1000)
    alone = 0.0
    for source, target in sides_of(pairs):
        log_p = model(torch.tensor([source]), torch.tensor([[END, *target[:-1]]]))[0].log_softmax(-1)
        alone -= float(log_p[range(len(target)), list(target)].sum())
    assert float(nats(model, batch)) == pytest.approx(alone, rel=1e-5)


@settings(deadline=None, max_examples=100)
@given(lengths=LENGTHS, tokens=st.integers(1, 60))
def test_parts_hold_the_same_pairs_in_no_more_tokens_and_no_useless_columns(lengths, tokens):
    for batch in pair_evaluation_batches(pairs_of(lengths), END, None, 100):
        parts = list(micro_batches(batch, tokens))
        assert sorted(pair for part in parts for pair in pairs_in(part)) == sorted(pairs_in(batch))
        for part in parts:
            rows, widths = len(part["source"]), [part[name].shape[1] for name in ("source", "inputs")]
            assert set(part) == set(batch)
            assert rows == 1 or rows * max(widths) <= tokens
            longest = [max(map(len, side)) for side in zip(*pairs_in(part), strict=True)]
            assert widths == longest
