"""Datasets in the forms of nanoGPT and llm.c, read as those programs read them."""

import errno
import os

import numpy as np
import pytest

from classiclm.data import exports
from classiclm.data.dataset import open_dataset
from classiclm.data.exports import export_llmc, export_nanogpt
from classiclm.data.tokenizers import CharTokenizer
from classiclm.errors import BAD_INPUT, RESOURCE, USAGE, Error
from test_dataset import make_dataset

TEXT = {"train": "abcabcdjjjjjj\ndeafbadhead", "val": "fade\ncabice"}
SHARDS = {"train": ["abcabcd", "jjjjjj\n", "deafbadhead"], "val": ["fade\n", "cabice"]}


@pytest.fixture
def dataset(tmp_path):
    return open_dataset(make_dataset(tmp_path / "data"))


@pytest.fixture(params=[1, 3, 2**22])
def piece(request, monkeypatch):
    """How many tokens are in memory at once."""
    monkeypatch.setattr(exports, "_PIECE", request.param)


def test_nanogpt_finds_its_two_files(dataset, tmp_path, piece):
    assert export_nanogpt(dataset, tmp_path / "out") == [tmp_path / "out/train.bin", tmp_path / "out/val.bin"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train.bin", "val.bin"]
    for split, text in TEXT.items():
        data = np.memmap(tmp_path / "out" / f"{split}.bin", dtype=np.uint16, mode="r")
        assert dataset.tokenizer.decode(data) == text
        block_size, starts = 4, range(len(data) - 4)  # its get_batch: every start that has a next token
        x = np.stack([data[i : i + block_size].astype(np.int64) for i in starts])
        y = np.stack([data[i + 1 : i + 1 + block_size].astype(np.int64) for i in starts])
        assert [dataset.tokenizer.decode(row) for row in x] == [text[i : i + 4] for i in starts]
        assert [dataset.tokenizer.decode(row) for row in y] == [text[i + 1 : i + 5] for i in starts]


def test_llmc_finds_a_file_of_its_kind_for_each_shard(dataset, tmp_path, piece):
    export_llmc(dataset, tmp_path / "out")
    names = [f"{split}_{i:06d}.bin" for split, texts in SHARDS.items() for i in range(len(texts))]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    for split, texts in SHARDS.items():
        for i, text in enumerate(texts):  # as its dataloader.h does: the header first, then the size has to fit
            data = (tmp_path / "out" / f"{split}_{i:06d}.bin").read_bytes()
            magic, version, n_tokens = np.frombuffer(data, np.int32, 256)[:3].tolist()
            assert (magic, version, n_tokens) == (20240520, 1, len(text))
            assert not any(np.frombuffer(data, np.int32, 256)[3:])
            assert len(data) == 256 * 4 + 2 * n_tokens
            assert dataset.tokenizer.decode(np.frombuffer(data, np.uint16, n_tokens, 1024)) == text


def characters(n):
    return [chr(c) for c in [*range(0x100, 0xD800), *range(0x10000, 0x20000)][:n]]


@pytest.mark.parametrize("export", [export_nanogpt, export_llmc])
def test_ids_that_fit_16_bits_are_exported_from_four_bytes(tmp_path, export):
    letters = characters(65_536)
    texts = {"train": [("one", [letters[-1]])], "val": [("one", [letters[3]])]}
    dataset = open_dataset(make_dataset(tmp_path / "data", CharTokenizer(letters), texts))
    paths = export(dataset, tmp_path / "out")
    assert [path.read_bytes()[-2:] for path in paths] == [b"\xff\xff", b"\x03\x00"]


@pytest.mark.parametrize("export", [export_nanogpt, export_llmc])
def test_a_larger_vocabulary_is_refused_before_anything_is_written(tmp_path, export):
    letters = characters(65_537)
    texts = {"train": [("one", [letters[-1]])], "val": [("one", [letters[3]])]}
    dataset = open_dataset(make_dataset(tmp_path / "data", CharTokenizer(letters), texts))
    with pytest.raises(Error) as raised:
        export(dataset, tmp_path / "out")
    assert raised.value.code == USAGE
    assert "65,537" in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_nanogpt, export_llmc])
def test_a_split_without_tokens_is_refused(tmp_path, export):
    dataset = open_dataset(make_dataset(tmp_path / "data", texts={"train": [("one", ["abc"])], "val": []}))
    with pytest.raises(Error) as raised:
        export(dataset, tmp_path / "out")
    assert raised.value.code == BAD_INPUT
    assert not (tmp_path / "out").exists()


def test_a_shard_that_llmc_could_not_count_is_refused(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "_LLMC_LARGEST", 10)
    with pytest.raises(Error) as raised:
        export_llmc(dataset, tmp_path / "out")
    assert raised.value.code == RESOURCE
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("export", [export_nanogpt, export_llmc])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_whole_and_nothing_half(dataset, tmp_path, monkeypatch, export, call):
    first = export(dataset, tmp_path / "out")[0]
    first.write_bytes(b"old")
    before = sorted(path.name for path in first.parent.iterdir())

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(Error) as raised:
        export(dataset, tmp_path / "out")
    assert raised.value.code == RESOURCE
    assert first.read_bytes() == b"old"
    assert sorted(path.name for path in first.parent.iterdir()) == before
