"""Every file of a checkpoint is damaged in every way; each time the one before it must be found, and a line say why."""

import shutil
from collections import Counter

from classiclm.train import checkpoint
from classiclm.train.checkpoint import folder_of

from .crash import NEW, OLD, Tally, contents, save, scratch

OFFSETS = 32


def flip(path, share):
    """Flip one bit at about share / OFFSETS of the file."""
    data = bytearray(path.read_bytes())
    data[share * (len(data) - 1) // (OFFSETS - 1)] ^= 1 << share % 8
    path.write_bytes(data)


def append(path):
    path.write_bytes(path.read_bytes() + b"\n")


def cut(path, share):
    """Cut to nothing, to one byte, to half, or by one byte."""
    data = path.read_bytes()
    path.write_bytes({"0": b"", "1": data[:1], "half": data[: len(data) // 2], "-1": data[:-1]}[share])


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def replace_by_link(path):
    """A link to the very bytes: they are not in the checkpoint any more."""
    elsewhere = path.parents[3] / f"linked-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def replace_by_loop(path):
    path.unlink()
    path.symlink_to(path)


def mutations(folder):
    """kind, work: all that is done to a checkpoint, one at a time."""
    names = sorted(path.name for path in folder.iterdir())
    for name in names:
        path = folder / name
        for share in ("0", "1", "half", "-1"):
            yield f"cut to {share}", lambda path=path, share=share: cut(path, share)
        for share in range(OFFSETS):
            yield "bit flip", lambda path=path, share=share: flip(path, share)
        for change in (append, replace_by_folder, replace_by_link, replace_by_loop):
            yield change.__name__.replace("_", " "), lambda path=path, change=change: change(path)
        yield "delete", path.unlink
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            yield "swap", lambda one=folder / one, other=folder / other: swap(one, other)


def swap(one, other):
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)


def every_mutation():
    """The tally of all mutations of the newest of two checkpoints."""
    tally = Tally(Counter())
    with scratch() as base:
        run = checkpoint.Path(base) / "run"
        save(run, OLD, keep=2)
        save(run, NEW, keep=2)
        old, new = folder_of(run, OLD), folder_of(run, NEW)
        sound, whole = contents(old), shutil.copytree(new, run.parent / "whole")
        for kind, damage in list(mutations(new)):
            damage()
            tally.cases[kind] += 1
            found, warnings = checkpoint.newest_valid(run)
            if found != old or contents(found) != sound or len(warnings) != 1:
                tally.losses.append(f"{kind}: found {found}, with {len(warnings)} warnings")
            shutil.rmtree(new)
            shutil.copytree(whole, new)
        if checkpoint.newest_valid(run) != (new, []):
            tally.losses.append("an undamaged checkpoint is not found")
    return tally
