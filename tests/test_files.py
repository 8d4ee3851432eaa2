"""Writing that a crash cannot tear: every system call is made to fail in turn, and what is then on the disk is read."""

import io
import json
import os
import random
import stat
from pathlib import Path

import pytest

from classiclm.errors import RESOURCE, Error
from classiclm.files import (
    FORMAT,
    MANIFEST,
    defect,
    make_folder,
    publish_folder,
    remove_folder,
    sha256,
    sha256_of_file,
    sweep,
    write_file,
)

FILES = {"weights.bin": bytes(range(256)) * 40, "state.json": b'{"step": 3}', "empty": b""}
OLD, NEW = b"old content\n" * 50, b"NEW content!\n" * 70


class Faults:
    """Counts the system calls of a write, and lets the one numbered `fatal` (from 0) fail."""

    def __init__(self, monkeypatch):
        self.calls, self.fatal = 0, None
        for name in ("fsync", "replace", "rename", "mkdir", "open", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.watched(getattr(os, name)))
        opened = io.open
        monkeypatch.setattr(io, "open", lambda *a, **k: self.file(self.watched(opened)(*a, **k)))

    def watched(self, function):
        def call(*arguments, **keywords):
            self.strike()
            return function(*arguments, **keywords)

        return call

    def strike(self):
        self.calls += 1
        if self.calls - 1 == self.fatal:
            raise OSError(28, "No space left on device")

    def file(self, opened):
        """The opened file; a write that fails leaves half of its data, as a full disk does."""
        faults = self

        class Half:
            def write(self, data):
                try:
                    faults.strike()
                except OSError:
                    opened.write(data[: len(data) // 2])
                    raise
                return opened.write(data)

            def __getattr__(self, name):
                return getattr(opened, name)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                opened.close()

        return Half() if opened.writable() else opened


@pytest.fixture
def faults(monkeypatch):
    return Faults(monkeypatch)


def run_with_each_fault(faults, prepare, write, check):
    """Prepare, let the k-th call of `write` fail, check; for every k there is. Returns how many there were."""
    k = 0
    while True:
        faults.fatal = None
        prepare()
        faults.calls, faults.fatal = 0, k
        try:
            write()
        except Error as e:
            faults.fatal = None
            check(e)
            k += 1
            continue
        faults.fatal = None
        assert faults.calls <= k, "a failure was swallowed"
        return k


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Whole or not at all


def test_a_failing_write_leaves_the_old_file_or_the_new_one_and_no_litter(tmp_path, faults):
    path = tmp_path / "metrics.jsonl"
    seen = set()

    def check(error):
        assert error.code == RESOURCE
        assert str(error).startswith(f"{path}: cannot be written (No space left on device)")
        assert set(contents(tmp_path)) == {path.name}
        seen.add(path.read_bytes())

    n = run_with_each_fault(faults, lambda: path.write_bytes(OLD), lambda: write_file(path, NEW), check)
    assert path.read_bytes() == NEW
    assert n >= 4  # open, write, fsync, replace, and the folder
    assert seen == {OLD, NEW}


def test_a_failing_first_write_leaves_no_file_or_all_of_it(tmp_path, faults):
    path = tmp_path / "config.yaml"

    def check(error):
        assert error.code == RESOURCE
        assert contents(tmp_path) in ({}, {path.name: NEW})

    run_with_each_fault(faults, lambda: path.unlink(missing_ok=True), lambda: write_file(path, NEW), check)
    assert contents(tmp_path) == {path.name: NEW}


def test_a_failing_publication_shows_no_folder_or_a_valid_one_and_no_litter(tmp_path, faults):
    path = tmp_path / "step-00000007"

    def check(error):
        assert error.code == RESOURCE
        assert str(error).startswith(f"{path}: ")
        assert [p.name for p in tmp_path.iterdir()] in ([], [path.name])
        assert not path.exists() or defect(path) is None

    def prepare():
        if path.exists():
            remove_folder(path)

    n = run_with_each_fault(faults, prepare, lambda: publish_folder(path, FILES, {"step": 7}), check)
    assert n >= 3 * (len(FILES) + 1)
    assert defect(path) is None
    assert {name: data for name, data in contents(path).items() if name != MANIFEST} == FILES


def test_a_failing_removal_never_leaves_a_folder_that_looks_valid_and_is_not(tmp_path, faults):
    path = tmp_path / "step-00000007"

    def check(error):
        assert error.code == RESOURCE
        assert not path.exists() or defect(path) is None

    def prepare():
        if not path.exists():
            publish_folder(path, FILES, {})

    run_with_each_fault(faults, prepare, lambda: remove_folder(path), check)
    assert not path.exists()


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    calls = []

    def log(name, function):
        def call(first, *rest):
            file = isinstance(first, int) and not stat.S_ISDIR(os.fstat(first).st_mode)
            calls.append(name + (" file" if file else " folder" if isinstance(first, int) else ""))
            return function(first, *rest)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        log(name, getattr(os, name))
    write_file(tmp_path / "a", NEW)
    assert calls == ["fsync file", "replace", "fsync folder"]
    calls.clear()
    publish_folder(tmp_path / "b", FILES, {})
    assert calls == ["fsync file"] * (len(FILES) + 1) + ["fsync folder", "rename", "fsync folder"]


@pytest.mark.parametrize("name", ["a" * 300, "no/such/folder/file", "file/below-a-file"])
def test_a_place_that_cannot_be_written_is_a_resource_error_that_names_it(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Error) as caught:
        write_file(tmp_path / name, b"x")
    assert caught.value.code == RESOURCE
    assert str(tmp_path / name) in str(caught.value)


def test_a_folder_that_cannot_be_made_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Error) as caught:
        make_folder(tmp_path / "file" / "below")
    assert caught.value.code == RESOURCE
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a" / "b").is_dir()


def test_a_folder_is_not_published_over_another(tmp_path):
    publish_folder(tmp_path / "a", FILES, {})
    with pytest.raises(Error) as caught:
        publish_folder(tmp_path / "a", {"other": b"1"}, {})
    assert caught.value.code == RESOURCE
    assert defect(tmp_path / "a") is None
    assert "other" not in contents(tmp_path / "a")


# Defects


@pytest.fixture
def published(tmp_path):
    publish_folder(tmp_path / "p", FILES, {"step": 3})
    return tmp_path / "p"


def test_a_published_folder_has_no_defect_and_its_manifest_says_what_is_in_it(published):
    assert defect(published) is None
    manifest = json.loads((published / MANIFEST).read_text())
    assert manifest["format"] == FORMAT
    assert manifest["step"] == 3
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {n: len(d) for n, d in FILES.items()}


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 5000, -1])
@pytest.mark.parametrize("bit", [0, 7])
def test_one_flipped_bit_is_found_wherever_it_is(published, offset, bit):
    data = bytearray(FILES["weights.bin"])
    data[offset] ^= 1 << bit
    (published / "weights.bin").write_bytes(data)
    assert defect(published) == "has a damaged weights.bin"


@pytest.mark.parametrize("length", [0, 1, 4096, 10239])
def test_a_truncated_file_is_found(published, length):
    (published / "weights.bin").write_bytes(FILES["weights.bin"][:length])
    assert defect(published) == "has a damaged weights.bin"


def test_a_file_that_grew_is_found(published):
    (published / "empty").write_bytes(b"\0")
    assert defect(published) == "has a damaged empty"


@pytest.mark.parametrize("name", list(FILES))
def test_a_missing_file_is_found(published, name):
    (published / name).unlink()
    assert defect(published) == f"lacks {name}"


def test_a_folder_in_the_place_of_a_file_is_found(published):
    (published / "empty").unlink()
    (published / "empty").mkdir()
    assert defect(published) == "lacks empty"


def test_swapped_files_of_equal_size_are_found(tmp_path):
    publish_folder(tmp_path / "p", {"a": b"12345", "b": b"54321"}, {})
    (tmp_path / "p" / "a").write_bytes(b"54321")
    (tmp_path / "p" / "b").write_bytes(b"12345")
    assert "damaged" in defect(tmp_path / "p")


GARBAGE = [b"", b"{", b"null", b"[]", b"5", b'"x"', b"{}", b"\xff\xfe\x00", b"\0" * 300, b"[" * 200_000]
GARBAGE += [b'{"format": 1' + rest + b"}" for rest in (b"", b', "files": []', b', "files": {"empty": {}}')]


@pytest.mark.parametrize("manifest", GARBAGE, ids=range(len(GARBAGE)))
def test_a_manifest_of_garbage_is_a_defect_and_no_crash(published, manifest):
    (published / MANIFEST).write_bytes(manifest)
    assert defect(published) == f"has no readable {MANIFEST}"


@pytest.mark.parametrize("cut", [1, 50, 200])
def test_a_truncated_manifest_is_a_defect(published, cut):
    path = published / MANIFEST
    path.write_bytes(path.read_bytes()[:-cut])
    assert defect(published) == f"has no readable {MANIFEST}"


def test_a_missing_manifest_a_missing_folder_and_a_file_are_defects(published, tmp_path):
    (published / MANIFEST).unlink()
    assert defect(published) == f"has no readable {MANIFEST}"
    assert defect(tmp_path / "nowhere") == f"has no readable {MANIFEST}"
    assert defect(published / "empty") == f"has no readable {MANIFEST}"


def test_a_folder_of_a_later_format_says_so(published):
    path = published / MANIFEST
    path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
    assert "format 3" in defect(published)


def test_a_folder_of_format_1_whose_manifest_has_no_sum_is_read(published):
    path = published / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.write_text(json.dumps({**manifest, "format": 1}, indent=1))
    assert defect(published) is None
    (published / "empty").write_bytes(b"x")
    assert defect(published) == "has a damaged empty"


def test_every_flipped_bit_of_a_manifest_is_found(published):
    path = published / MANIFEST
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert defect(published) is not None, bit
    path.write_bytes(data)
    assert defect(published) is None


def test_a_link_in_the_place_of_a_file_is_found_even_if_it_leads_to_the_same_bytes(published, tmp_path):
    for name in ("weights.bin", MANIFEST):
        (published / name).rename(tmp_path / "elsewhere")
        (published / name).symlink_to(tmp_path / "elsewhere")
        assert defect(published) is not None
        (published / name).unlink()
        (tmp_path / "elsewhere").rename(published / name)
    assert defect(published) is None


# Equal content, equal bytes


def test_equal_content_gives_equal_bytes_whatever_the_order_of_the_files(tmp_path):
    names = list(FILES)
    random.Random(1).shuffle(names)
    publish_folder(tmp_path / "one", FILES, {"step": 1})
    publish_folder(tmp_path / "two", {name: FILES[name] for name in reversed(names)}, {"step": 1})
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert str(tmp_path).encode() not in contents(tmp_path / "one")[MANIFEST]


def test_the_two_sums_are_the_published_ones(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(b"abc") == sha256_of_file(tmp_path / "abc") == expected


# Sweeping


def crash(monkeypatch, write):
    """Die at the rename, as a killed process does: nothing is cleaned up."""

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(os, name, die)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            write()


def test_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path, monkeypatch):
    write_file(tmp_path / "config.yaml", OLD)
    publish_folder(tmp_path / "step-1", FILES, {})
    (tmp_path / ".lock").write_bytes(b"")
    (tmp_path / "my.tmp-notes").write_bytes(b"mine")
    before = contents(tmp_path)
    crash(monkeypatch, lambda: write_file(tmp_path / "config.yaml", NEW))
    crash(monkeypatch, lambda: publish_folder(tmp_path / "step-2", FILES, {}))
    assert len(contents(tmp_path)) == len(before) + 1 + len(FILES) + 1
    assert not (tmp_path / "step-2").exists()
    sweep(tmp_path)
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 4
    sweep(tmp_path / "nowhere")


def test_a_removed_folder_is_gone_and_its_neighbour_is_not(tmp_path):
    publish_folder(tmp_path / "a", FILES, {})
    publish_folder(tmp_path / "b", FILES, {})
    remove_folder(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert defect(tmp_path / "b") is None
