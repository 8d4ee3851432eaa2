"""Prepared datasets: what is opened is what was written; any damage to a file is named, and nothing is handed out."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from classiclm.data.dataset import Dataset, defects, is_dataset, load_meta, open_dataset, write_meta
from classiclm.data.dataset_meta import Counts, Meta, Shard, SourceMeta, Splits, TokenizerMeta
from classiclm.data.shards import write_shard
from classiclm.data.tokenizers import CharTokenizer
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.files import sha256

ALPHABET = CharTokenizer(sorted("abcdefghij\n"))
TEXTS = {  # split -> (source, documents of its shards)
    "train": [("one", ["abc", "abcd"]), ("one", ["jjjjjj\n"]), ("two", ["deaf", "bad", "head"])],
    "val": [("one", ["fade\n"]), ("two", ["cab", "ice"])],
}


def counts_of(shards):
    names = ("tokens", "documents", "sequences", "text_bytes", "chars")
    return Counts(*(sum(getattr(shard, name) for shard in shards) for name in names))


def splits_of(shards):
    return Splits(*(counts_of([shard for shard in shards if shard.split == split]) for split in ("train", "val")))


def make_dataset(folder: Path, tokenizer=ALPHABET, texts=TEXTS) -> Path:
    """A small dataset; every document is one sequence."""
    folder.mkdir()
    shards = []
    for split, parts in texts.items():
        for i, (source, documents) in enumerate(parts):
            ids = [tokenizer.encode_array(text) for text in documents]
            said = write_shard(folder, f"{split}-{i:05d}", np.concatenate(ids), np.array(list(map(len, ids))))
            n = sum(map(len, documents))
            shards.append(Shard(**said, split=split, source=source, text_bytes=n, chars=n))
    data = tokenizer.to_json().encode()
    (folder / "tokenizer.json").write_bytes(data)
    names = dict.fromkeys(shard.source for shard in shards)
    sources = [
        SourceMeta(name, {"licence": "ours"}, {}, [], splits_of([s for s in shards if s.source == name]))
        for name in names
    ]
    about = TokenizerMeta("tokenizer.json", sha256(data), tokenizer.fingerprint, tokenizer.vocab_size)
    dtype = np.dtype(tokenizer.dtype).name
    end = tokenizer.end_of_text
    meta = Meta("classiclm-shards", 1, about, dtype, end, "documents", None, splits_of(shards), sources, shards)
    write_meta(folder, meta)
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("sound") / "data")


@pytest.fixture
def folder(sound, tmp_path):
    """A copy to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "data"))


def edit(folder, change):
    """Rewrite meta.json, its tree changed in place."""
    tree = json.loads((folder / "meta.json").read_text())
    change(tree)
    (folder / "meta.json").write_text(json.dumps(tree))


def check_refused(folder, named, verify="sha256"):
    """`defects` names the file, and nothing is opened."""
    found = defects(folder)
    assert any(str(folder / named) in line for line in found), found
    assert all("\n" not in line for line in found)
    with pytest.raises(Error) as raised:
        open_dataset(folder, verify)
    assert raised.value.code == BAD_INPUT
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_what_is_opened_is_what_was_written(sound):
    assert defects(sound) == []
    dataset = open_dataset(sound)
    train = dataset.split("train")
    assert dataset.tokenizer.decode(train.tokens[:]) == "abcabcdjjjjjj\ndeafbadhead"
    assert train.sequence_ends.tolist() == train.document_ends.tolist() == [3, 7, 14, 18, 21, 25]
    assert train.sources == [("one", 0, 14), ("two", 14, 25)]
    assert (train.n_bytes, train.n_chars) == (25, 25)
    val = dataset.split("val")
    assert dataset.tokenizer.decode(np.asarray(val.tokens)) == "fade\ncabice"
    assert val.sources == [("one", 0, 5), ("two", 5, 11)]
    assert train.fingerprint != val.fingerprint
    assert load_meta(sound) == dataset.meta
    with pytest.raises(Error) as raised:
        dataset.split("test")
    assert raised.value.code == USAGE


def test_sentences_and_documents_end_at_places_of_their_own(tmp_path):
    folder = make_dataset(tmp_path / "data")
    said = write_shard(
        folder, "train-00000", ALPHABET.encode_array("abcabcd"), np.array([1, 2, 4]), np.array([0, 2, 3])
    )
    meta = load_meta(folder)
    shards = [Shard(**{**vars(meta.shards[0]), **said}), *meta.shards[1:]]
    sources = [
        dataclasses.replace(s, splits=splits_of([x for x in shards if x.source == s.name])) for s in meta.sources
    ]
    write_meta(
        folder,
        dataclasses.replace(meta, sequences="sentences", shards=shards, sources=sources, splits=splits_of(shards)),
    )
    train = open_dataset(folder).split("train")
    assert train.sequence_ends.tolist() == [1, 3, 7, 14, 18, 21, 25]
    assert train.document_ends.tolist() == [3, 7, 14, 18, 21, 25]


def test_equal_input_gives_equal_bytes_and_another_text_another_fingerprint(sound, tmp_path):
    again = make_dataset(tmp_path / "again")
    for path in sorted(sound.iterdir()):
        assert path.read_bytes() == (again / path.name).read_bytes()
    fingerprint = open_dataset(sound).split("train").fingerprint
    assert open_dataset(again).split("train").fingerprint == fingerprint
    other = {**TEXTS, "train": [("one", ["abc", "abce"]), *TEXTS["train"][1:]]}
    assert open_dataset(make_dataset(tmp_path / "b", texts=other)).split("train").fingerprint != fingerprint
    moved = {**TEXTS, "train": [("one", ["abca", "bcd"]), *TEXTS["train"][1:]]}  # the same tokens, other borders
    assert open_dataset(make_dataset(tmp_path / "c", texts=moved)).split("train").fingerprint != fingerprint


def test_a_large_vocabulary_is_stored_in_four_bytes(tmp_path):
    letters = [chr(c) for c in range(0x4E00, 0x4E00 + 65_499) if not 0xD800 <= c < 0xE000]
    letters += [chr(c) for c in range(0x20000, 0x20000 + 65_500 - len(letters))]
    texts = {"train": [("one", [letters[-1] + letters[0]])], "val": [("one", [letters[7]])]}
    dataset = open_dataset(make_dataset(tmp_path / "data", CharTokenizer(letters), texts))
    assert (dataset.meta.tokenizer.vocab_size, dataset.meta.dtype) == (65_500, "int32")
    assert dataset.split("train").tokens[:].tolist() == [65_499, 0]
    assert dataset.split("train").tokens.dtype == np.int32


NAMES = ["tokenizer.json", "meta.json"]
NAMES += [
    f"{stem}.{ending}"
    for stem in ("train-00000", "train-00001", "train-00002", "val-00000", "val-00001")
    for ending in ("bin", "idx")
]


def truncated(n):
    return lambda data: data[: n if n >= 0 else len(data) + n] if n != 0.5 else data[: len(data) // 2]


def flipped(share):
    def flip(data):
        place = int(share * (len(data) - 1))
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


SPOILT = {
    "cut to nothing": truncated(0),
    "cut to a byte": truncated(1),
    "cut to half": truncated(0.5),
    "a byte too short": truncated(-1),
    "a byte too long": lambda data: data + b"\0",
    **{f"a bit flipped at {share}": flipped(share) for share in (0, 0.2, 0.4, 0.6, 0.8, 1)},
}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "meta.json"])
@pytest.mark.parametrize("how", SPOILT)
def test_every_damage_to_every_file_is_named(folder, name, how):
    path = folder / name
    path.write_bytes(SPOILT[how](path.read_bytes()))
    check_refused(folder, name)


@pytest.mark.parametrize("how", [how for how in SPOILT if "flipped" not in how])
def test_a_meta_of_another_length_is_named(folder, how):
    path = folder / "meta.json"
    path.write_bytes(SPOILT[how](path.read_bytes().rstrip()))
    check_refused(folder, "meta.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_gone_or_became_a_folder_a_pipe_or_a_dangling_link_is_named(folder, name):
    path = folder / name
    path.unlink()
    check_refused(folder, name)
    for make in (path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(folder / "nowhere")):
        make()
        check_refused(folder, name)
        check_refused(folder, name, "size")
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_shards_that_changed_places_or_are_links_to_one_another_are_named(folder, ending):
    a, b = folder / f"train-00001.{ending}", folder / f"train-00002.{ending}"
    whole = a.read_bytes(), b.read_bytes()
    a.write_bytes(whole[1])
    b.write_bytes(whole[0])
    check_refused(folder, a.name)
    check_refused(folder, b.name)
    a.write_bytes(whole[0])
    b.unlink()
    b.symlink_to(a)
    check_refused(folder, b.name)


def test_a_link_to_a_sound_copy_is_sound(folder, tmp_path):
    shutil.move(folder / "val-00000.bin", tmp_path / "elsewhere.bin")
    (folder / "val-00000.bin").symlink_to(tmp_path / "elsewhere.bin")
    assert defects(folder) == []


def test_a_shard_that_meta_does_not_know_is_named(folder):
    shutil.copy(folder / "val-00000.bin", folder / "val-00002.bin")
    (folder / "notes.txt").write_text("anything else may lie here")
    assert [line.split(": ")[0] for line in defects(folder)] == [str(folder / "val-00002.bin")]
    check_refused(folder, "val-00002.bin", "size")


def test_sizes_alone_see_a_cut_but_not_a_flipped_bit_in_tokens(folder):
    path = folder / "train-00000.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-2])
    check_refused(folder, path.name, "size")
    path.write_bytes(flipped(0)(data))
    assert isinstance(open_dataset(folder, "size"), Dataset)


def test_ids_beyond_the_vocabulary_are_named_even_where_all_sums_fit(folder):
    ids = np.array([1, 2, 11, 3, 4, 5, 6], np.uint16)
    said = write_shard(folder, "train-00000", ids, np.array([3, 4]))
    edit(folder, lambda tree: tree["shards"][0].update(said))
    assert [line for line in defects(folder) if "holds token 11, and the tokenizer has 11" in line]
    check_refused(folder, "train-00000.bin")


def test_an_index_of_other_counts_is_named_even_where_all_sums_fit(folder):
    said = write_shard(folder, "train-00002", ALPHABET.encode_array("deafbadhea"), np.array([4, 3, 3]))
    (folder / "train-00002.bin").write_bytes(ALPHABET.encode_array("deafbadhead").tobytes())
    edit(folder, lambda tree: tree["shards"][2].update(index_sha256=said["index_sha256"]))
    check_refused(folder, "train-00002.idx", "size")


def test_another_tokenizer_is_named(folder):
    other = CharTokenizer(sorted("ABCDEFGHIJ\n"))
    (folder / "tokenizer.json").write_text(other.to_json())
    check_refused(folder, "tokenizer.json")
    edit(folder, lambda tree: tree["tokenizer"].update(sha256=sha256(other.to_json().encode())))
    check_refused(folder, "tokenizer.json")  # by its fingerprint
    (folder / "tokenizer.json").write_text("{}")
    edit(folder, lambda tree: tree["tokenizer"].update(sha256=sha256(b"{}")))
    check_refused(folder, "tokenizer.json")


COUNTS = ("tokens", "documents", "sequences", "bytes", "chars")
NUMBERS = [("splits", split, unit) for split in ("train", "val") for unit in COUNTS]
NUMBERS += [("sources", i, "splits", split, unit) for i in (0, 1) for split in ("train", "val") for unit in COUNTS]
NUMBERS += [
    ("shards", i, unit)
    for i in range(5)
    for unit in ("bytes", "tokens", "sequences", "documents", "text_bytes", "chars")
]
NUMBERS += [("tokenizer", "vocab_size"), ("version",)]
NAMED = [("shards", i, key) for i in range(5) for key in ("file", "split", "source", "sha256", "index_sha256")]
NAMED += [
    ("format",),
    ("dtype",),
    ("sequences",),
    ("tokenizer", "file"),
    ("tokenizer", "sha256"),
    ("tokenizer", "fingerprint"),
    ("sources", 0, "name"),
]
OTHER_TYPES = [None, True, 1.5, "1", "\ud800\n\x1b[0m", [], {}, -1, 2**63, 10**400, float("nan"), float("inf"), [[[]]]]


def place(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("by", [-1, 1, 1000])
def test_every_number_in_meta_is_checked(folder, path, by):
    def change(tree):
        place(tree, path)[path[-1]] += by

    edit(folder, change)
    assert any("meta.json" in line for line in defects(folder))
    with pytest.raises(Error) as raised:
        open_dataset(folder)
    assert raised.value.code == BAD_INPUT


@pytest.mark.parametrize("path", NAMED)
def test_every_name_and_sum_in_meta_is_checked(folder, path):
    def change(tree):
        old = place(tree, path)[path[-1]]
        place(tree, path)[path[-1]] = old[:-1] + ("0" if old[-1] != "0" else "1")

    edit(folder, change)
    assert any("meta.json" in line for line in defects(folder))
    with pytest.raises(Error):
        open_dataset(folder)


@pytest.mark.parametrize("value", OTHER_TYPES, ids=lambda value: ascii(value)[:20])
def test_values_of_other_types_are_refused_by_key(folder, value):
    whole = (folder / "meta.json").read_text()
    sums = [("shards", 1, "file"), ("shards", 1, "sha256"), ("tokenizer", "sha256"), ("format",), ("dtype",)]
    branches = [("splits",), ("sources", 0), ("shards", 0), ("tokenizer",), ("splits", "val")]
    for path in [*NUMBERS[3:33:5], *sums, *branches]:
        (folder / "meta.json").write_text(whole)
        edit(folder, lambda tree, path=path: place(tree, path).__setitem__(path[-1], value))
        check_refused(folder, "meta.json")
        assert f"{folder / 'meta.json'}: {'.'.join(map(str, path))}" in defects(folder)[0]


@pytest.mark.parametrize(
    "file",
    ["../x.bin", "/etc/passwd", "train-00000.bin\n", "train-0.bin", "val/../train-00000.bin", "train-00001.bin", ""],
)
def test_file_names_that_lead_elsewhere_or_repeat_are_refused(folder, file):
    edit(folder, lambda tree: tree["shards"][0].update(file=file))
    assert len(defects(folder)) >= 1
    check_refused(folder, "meta.json")


MALICIOUS = {
    "empty": b"",
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe\x00",
    "null bytes": bytes(4096),
    "a list": b"[]",
    "a number": b"7",
    "deep": b"[" * 200_000 + b"]" * 200_000,
    "deep inside": b'{"format": "classiclm-shards", "version": 1, "weights": '
    + b'{"a":' * 100_000
    + b"1"
    + b"}" * 100_001,
    "many digits": b'{"version": ' + b"9" * 10_000 + b"}",
    "another version": b'{"format": "classiclm-shards", "version": 2}',
    "nothing in it": b'{"format": "classiclm-shards", "version": 1}',
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_a_malicious_meta_is_refused_in_a_line(folder, name):
    (folder / "meta.json").write_bytes(MALICIOUS[name])
    assert is_dataset(folder)  # the shards beside it say what this is
    check_refused(folder, "meta.json")
    with pytest.raises(Error):
        load_meta(folder)


def test_a_meta_of_gigabytes_is_not_read(folder):
    with (folder / "meta.json").open("r+b") as file:
        file.truncate(2**40)
    check_refused(folder, "meta.json")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda tree: tree.update(surprise=1), "surprise"),
        (lambda tree: tree["shards"][3].update(surprise=1), "shards.3.surprise"),
        (lambda tree: tree["shards"][3].pop("sha256"), "shards.3.sha256"),
        (lambda tree: tree.update(weights={"one": 1.0}), "'two'"),
        (lambda tree: tree.update(weights={"one": 1.0, "two": 1.0, "three": 2.0}), "'three'"),
        (lambda tree: tree.update(weights={"one": 1.0, "two": 0.0}), "weights.two"),
        (lambda tree: tree.update(end_of_text=11), "end_of_text"),
        (lambda tree: tree.update(end_of_text=10), "ends a text"),
        (lambda tree: tree.update(dtype="int32"), "uint16"),
        (lambda tree: tree["sources"].append(tree["sources"][0]), "twice"),
        (lambda tree: tree["sources"].reverse(), "ordered"),
        (lambda tree: tree["shards"].reverse(), "ordered"),
    ],
)
def test_what_does_not_fit_in_meta_is_named(folder, change, word):
    edit(folder, change)
    assert any(word in line for line in defects(folder)), defects(folder)
    with pytest.raises(Error):
        open_dataset(folder)


def test_meta_that_would_be_refused_is_not_written(folder):
    meta, before = load_meta(folder), (folder / "meta.json").read_bytes()
    with pytest.raises(Error):
        write_meta(folder, dataclasses.replace(meta, shards=meta.shards[1:]))
    assert (folder / "meta.json").read_bytes() == before


def test_a_folder_is_a_dataset_by_its_meta_or_by_the_shards_of_an_unfinished_one(sound, folder, tmp_path):
    assert is_dataset(sound)
    (folder / "meta.json").unlink()
    assert is_dataset(folder)
    assert "not finished" in defects(folder)[0]
    (tmp_path / "meta.json").write_text('{"format": "another"}')
    for path in (tmp_path, tmp_path / "missing", sound / "meta.json"):
        assert not is_dataset(path)
        assert len(defects(path)) == 1
