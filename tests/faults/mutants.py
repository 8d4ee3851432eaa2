"""Six wrong protocols. Each must be caught by the harness, or the harness proves nothing."""

import os
from contextlib import ExitStack, contextmanager
from unittest import mock

from classiclm import files
from classiclm.train import checkpoint, savers

from . import corruption, crash


@contextmanager
def patched(**changes):
    """Replace functions of `files`, `checkpoint` and `savers` by name, wherever they are known."""
    with ExitStack() as stack:
        for name, change in changes.items():
            for module in (files, checkpoint, crash):
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, change))
        yield


def rename_before_fsync():
    """The name is given first, and the data are flushed then."""

    def write_through(path, pieces):
        data = b"".join(pieces)
        path.write_bytes(data)
        return {"size": len(data), "sha256": files.sha256(data)}

    def reveal(temporary, path):
        os.rename(temporary, path)
        for file in path.iterdir():
            with file.open("rb+") as opened:
                os.fsync(opened.fileno())
        files._flush_folder(path.parent)

    return patched(_write_through=write_through, reveal=reveal)


@contextmanager
def manifest_first():
    """The manifest is written before the files it speaks of, in the place where all can see it."""

    def write_into(folder, streams):
        data = {name: b"".join(pieces) for name, pieces in streams.items()}
        sums = {name: {"size": len(text), "sha256": files.sha256(text)} for name, text in data.items()}
        files.seal(folder, sums, {"step": checkpoint.step_of(folder)})
        for name, text in data.items():
            files._write_through(folder / name, [text])
        return sums

    in_place = patched(write_into=write_into, temporary_for=lambda folder: folder, _finish=lambda *_: None)
    with in_place, mock.patch.object(checkpoint, "shutil", mock.Mock(disk_usage=files.shutil.disk_usage)):
        yield


def no_verify():
    """Whatever is newest is taken."""
    return patched(defect=lambda *_: None)


@contextmanager
def prune_before_publish():
    """Room is made first."""
    real = savers.Saver._publish

    def publish(self, snapshot, best_step):
        for step in checkpoint.saved_steps(self.run):
            checkpoint.remove_folder(checkpoint.folder_of(self.run, step))
        real(self, snapshot, best_step)

    with mock.patch.object(savers.Saver, "_publish", publish):
        yield


def no_sums():
    """The manifest holds sizes only."""
    return patched(sha256_of_file=lambda _: "", sha256=lambda _: "", _write_through=_without_sum(files._write_through))


def _without_sum(write_through):
    return lambda path, pieces: {**write_through(path, pieces), "sha256": ""}


def sweep_that_deletes_the_newest():
    """What a dead writer left is taken to be the newest folder, whatever its name."""

    def sweep(folder):
        for newest in sorted(folder.glob("*step-*"))[-1:]:
            files.shutil.rmtree(newest)

    return patched(sweep=sweep)


MUTANTS = {
    "rename before fsync": rename_before_fsync,
    "manifest first": manifest_first,
    "no verify": no_verify,
    "prune before publish": prune_before_publish,
    "no sums in the manifest": no_sums,
    "a sweep that deletes the newest": sweep_that_deletes_the_newest,
}


def caught(name):
    """What the harness says of a mutant, in words; None if it notices nothing."""
    if name in ("no verify", "no sums in the manifest"):
        with MUTANTS[name]():
            losses = corruption.every_mutation().losses
        return losses[0] if losses else None
    scenario, oracle = ("save, publish, prune",), crash.expected()
    with MUTANTS[name]():
        for kind in ("power cut, names kept", "die after"):
            losses = crash.every_case(scenario, (kind,), stride=2, oracle=oracle, stop=True).losses
            if losses:
                return losses[0]
    return None
