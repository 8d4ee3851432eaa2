"""Token shards: what is written, read in nanoGPT's way and by Megatron's layout; many files as one array."""

import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.shards import Tokens, file_size, index_bytes, read_index, write_shard
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import sha256


def read_idx(path):
    """Megatron's .idx, number by number from its description: dtype code, lengths, pointers, document indices."""
    data = path.read_bytes()
    assert data[:9] == b"MMIDIDX\x00\x00"
    version, code = struct.unpack("<QB", data[9:18])
    assert version == 1
    n_sequences, n_borders = struct.unpack("<QQ", data[18:34])
    place = 34
    lengths = struct.unpack(f"<{n_sequences}i", data[place : place + 4 * n_sequences])
    place += 4 * n_sequences
    pointers = struct.unpack(f"<{n_sequences}q", data[place : place + 8 * n_sequences])
    place += 8 * n_sequences
    borders = struct.unpack(f"<{n_borders}q", data[place:])
    return code, list(lengths), list(pointers), list(borders)


shards = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5)  # documents of sequences


@settings(max_examples=30, deadline=None)
@given(documents=shards, dtype=st.sampled_from([np.uint16, np.int32]), seed=st.integers(0, 99))
def test_what_is_written_is_read_back_by_others_and_by_us(tmp_path_factory, documents, dtype, seed):
    folder = tmp_path_factory.mktemp("shard")
    lengths = [n for document in documents for n in document]
    tokens = np.random.default_rng(seed).integers(0, 60_000, sum(lengths)).astype(dtype)
    borders = np.cumsum([0, *map(len, documents)])
    said = write_shard(folder, "a", tokens, np.array(lengths), borders)

    assert np.array_equal(np.memmap(folder / "a.bin", dtype=dtype, mode="r"), tokens)
    code, sizes, pointers, starts = read_idx(folder / "a.idx")
    assert code == {np.uint16: 8, np.int32: 4}[dtype]
    assert (sizes, starts) == (lengths, borders.tolist())
    for size, pointer, expected in zip(sizes, pointers, np.split(tokens, np.cumsum(lengths)), strict=False):
        assert np.array_equal(np.frombuffer((folder / "a.bin").read_bytes(), dtype, size, pointer), expected)

    index = read_index(folder / "a.idx")
    assert index.dtype == dtype
    assert index.sequence_ends.tolist() == np.cumsum(lengths).tolist()
    assert index.document_ends.tolist() == np.cumsum([sum(document) for document in documents]).tolist()
    assert said == {
        "file": "a.bin",
        "bytes": len(tokens) * np.dtype(dtype).itemsize,
        "sha256": sha256((folder / "a.bin").read_bytes()),
        "index_sha256": sha256((folder / "a.idx").read_bytes()),
        "tokens": len(tokens),
        "sequences": len(lengths),
        "documents": len(documents),
    }
    assert (folder / "a.idx").stat().st_size == index_bytes(len(lengths), len(documents))


def test_without_documents_every_sequence_is_one(tmp_path):
    write_shard(tmp_path, "a", np.arange(5, dtype=np.uint16), np.array([2, 3]))
    assert read_idx(tmp_path / "a.idx")[3] == [0, 1, 2]


@pytest.mark.parametrize(
    ("tokens", "lengths", "documents"),
    [
        (np.arange(5), [5], None),  # int64
        (np.zeros((2, 2), np.uint16), [4], None),
        (np.zeros(4, np.uint16), [3], None),
        (np.zeros(4, np.uint16), [4, 0], None),
        (np.zeros(0, np.uint16), [], None),
        (np.zeros(4, np.uint16), [2, 2], [0, 1]),
        (np.zeros(4, np.uint16), [2, 2], [1, 2]),
        (np.zeros(4, np.uint16), [2, 2], [0, 0, 2]),
        (np.zeros(4, np.uint16), [2, 2], []),
    ],
)
def test_parts_that_do_not_fit_are_not_written(tmp_path, tokens, lengths, documents):
    with pytest.raises(ValueError):
        write_shard(
            tmp_path, "a", tokens, np.array(lengths, np.int64), None if documents is None else np.array(documents)
        )
    assert list(tmp_path.iterdir()) == []


def index_of(
    n_sequences=2,
    n_borders=3,
    code=8,
    version=1,
    magic=b"MMIDIDX\0\0",
    lengths=(2, 3),
    pointers=(0, 4),
    borders=(0, 1, 2),
):
    head = struct.pack("<9sQBQQ", magic, version, code, n_sequences, n_borders)
    return head + struct.pack("<2i2q", *lengths, *pointers) + struct.pack(f"<{len(borders)}q", *borders)


def test_the_index_that_the_next_test_spoils_is_sound(tmp_path):
    (tmp_path / "a.idx").write_bytes(index_of())
    assert read_index(tmp_path / "a.idx").document_ends.tolist() == [2, 5]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        index_of()[:33],
        index_of()[:-1],
        index_of() + b"\0",
        index_of(magic=b"MMIDIDX\0\1"),
        index_of(version=2),
        index_of(code=5),
        index_of(n_sequences=2**63),
        index_of(n_sequences=2**64 - 1, n_borders=2**64 - 1),
        index_of(n_borders=2**40),
        index_of(n_sequences=0, n_borders=6, lengths=(0, 0), pointers=(0, 0), borders=(0, 0, 0)),
        index_of(lengths=(-2, 7)),
        index_of(lengths=(0, 5), pointers=(0, 0)),
        index_of(lengths=(2, 4), pointers=(0, 6)),
        index_of(pointers=(0, 8)),
        index_of(borders=(0, 2, 1)),
        index_of(borders=(1, 1, 2)),
        index_of(borders=(0, 1, 3)),
        index_of(n_borders=0, borders=()),
    ],
)
def test_an_index_that_does_not_add_up_is_refused_in_a_line(tmp_path, data):
    path = tmp_path / "a.idx"
    path.write_bytes(data)
    with pytest.raises(Error) as raised:
        read_index(path)
    assert raised.value.code == BAD_INPUT
    assert str(raised.value).startswith(f"{path}: ")
    assert "\n" not in str(raised.value)


def test_a_missing_file_a_folder_and_a_pipe_are_refused_and_the_pipe_is_not_opened(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing", "folder", "pipe", "a\0b"):
        for read in (file_size, read_index, lambda path: Tokens([path], np.uint16)):
            with pytest.raises(Error) as raised:
                read(tmp_path / name)
            assert raised.value.code == BAD_INPUT


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Files of 1 to 50 tokens, and what they hold, joined."""
    folder, rng = tmp_path_factory.mktemp("pieces"), np.random.default_rng(0)
    parts = [rng.integers(0, 2**16, n).astype(np.uint16) for n in (50, 1, 7, 1, 30, 2)]
    for i, part in enumerate(parts):
        part.tofile(folder / f"{i}.bin")
    return Tokens([folder / f"{i}.bin" for i in range(len(parts))], np.uint16), np.concatenate(parts)


places = st.integers(-91, 90)


@settings(deadline=None)
@given(
    key=st.one_of(
        places,
        st.lists(places, max_size=40),
        st.slices(91),
        st.lists(st.lists(places, min_size=3, max_size=3), max_size=9),
    )
)
def test_any_index_gives_what_the_joined_array_gives(pieces, key):
    tokens, joined = pieces
    key = np.array(key, dtype=np.int64) if isinstance(key, list) else key
    assert np.array_equal(tokens[key], joined[key])
    assert np.asarray(tokens[key]).shape == np.asarray(joined[key]).shape
    assert tokens[key].dtype == np.uint16


@settings(deadline=None)
@given(starts=st.lists(st.integers(0, 70), max_size=8), width=st.integers(1, 21))
def test_windows_may_cross_any_number_of_borders(pieces, starts, width):
    tokens, joined = pieces
    rows = np.array(starts, np.int64).reshape(-1, 1) + np.arange(width)
    assert np.array_equal(tokens[rows], joined[rows])


def test_rows_of_neighbours_that_wrap_around_the_end_are_read_one_by_one(pieces):
    tokens, joined = pieces
    rows = np.array([[-2, -1, 0, 1], [3, 4, 5, 6]])
    assert np.array_equal(tokens[rows], joined[rows])


@pytest.mark.parametrize("key", [91, -92, [0, 91], np.array([[5, 6], [90, 91]])])
def test_places_beyond_the_ends_are_errors(pieces, key):
    with pytest.raises(IndexError):
        pieces[0][key]


@pytest.mark.parametrize("key", [1.0, np.array([True]), "a"])
def test_places_are_whole_numbers(pieces, key):
    with pytest.raises(TypeError):
        pieces[0][key]


def test_tokens_are_an_array_to_numpy(pieces):
    tokens, joined = pieces
    assert np.array_equal(np.asarray(tokens), joined)
    assert np.asarray(tokens, dtype=np.int64).dtype == np.int64
    assert (tokens.shape, len(tokens), tokens.ndim, tokens.dtype) == ((91,), 91, 1, np.dtype(np.uint16))
    assert np.array_equal(tokens[...], joined)
    with pytest.raises(ValueError):
        np.array(tokens, copy=False)


def test_what_is_read_can_be_written_to_without_touching_the_file(pieces):
    tokens, joined = pieces
    part = tokens[3:9]
    part[:] = 0
    assert np.array_equal(tokens[3:9], joined[3:9])


def test_no_files_are_no_tokens():
    tokens = Tokens([], np.uint16)
    assert len(tokens) == 0
    assert tokens[:].shape == (0,)
    assert tokens[np.zeros((0, 4), np.int64)].shape == (0, 4)


def test_a_file_of_half_a_token_or_none_is_refused(tmp_path):
    for data in (b"", b"abc"):
        (tmp_path / "a.bin").write_bytes(data)
        with pytest.raises(Error) as raised:
            Tokens([tmp_path / "a.bin"], np.uint16)
        assert raised.value.code == BAD_INPUT


def test_files_may_be_more_than_the_system_lets_a_process_open(tmp_path):
    for i in range(1500):
        np.array([i, i], np.uint16).tofile(tmp_path / f"{i}.bin")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_already = len(list(Path("/dev/fd").iterdir()))  # by this process, which runs other tests too
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_already + 200, limits[1]))
    try:
        tokens = Tokens([tmp_path / f"{i}.bin" for i in range(1500)], np.uint16)
        for _ in range(2):
            assert np.array_equal(tokens[:], np.repeat(np.arange(1500), 2))
        assert tokens[np.arange(0, 3000, 7)].tolist() == [i // 2 for i in range(0, 3000, 7)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
