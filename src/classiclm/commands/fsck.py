"""classiclm fsck: whether a dataset or a run on the disk is whole, file by file; what is not, a line each on stdout."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from classiclm.config import Positional, load_yaml, parse_flags, validate
from classiclm.data import dataset
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import defect
from classiclm.train.checkpoint import folder_of, saved_steps
from classiclm.train.run import Metrics


@dataclass(frozen=True)
class FsckFlags:
    """Check every file of a prepared dataset or of a run, byte by byte, and list what is wrong."""

    path: Annotated[str, Positional]  # folder that prepare or train wrote
    json: bool = False  # as JSON


def main(argv: Sequence[str], prog: str) -> int:
    """The defects, or that there are none, on stdout; exit code 3 if there is one.

    Raises Error (exit 3) for a path that is neither a dataset nor a run.
    """
    flags = validate(FsckFlags, parse_flags(FsckFlags, argv, prog), "the command line")
    kind, defects, what = check(Path(flags.path))
    if flags.json:
        print(json.dumps({"path": flags.path, "kind": kind, "ok": not defects, "what": what, "defects": defects}))
    else:
        print("\n".join(defects) or f"{flags.path}: ok, {what}")
    return BAD_INPUT if defects else 0


def check(path: Path) -> tuple[str, list[str], str]:
    """What a folder is, "dataset" or "run", the defects in it, and what was checked, in words."""
    if dataset.is_dataset(path):
        found = dataset.defects(path)
        return "dataset", found, "damaged" if found else _describe(path)
    if path.is_dir() and any((path / name).exists() for name in ("checkpoints", "config.yaml", "metrics.jsonl")):
        steps, found = saved_steps(path), check_run(path)
        return "run", found, f"a run with {len(steps)} checkpoint{'' if len(steps) == 1 else 's'}"
    why = "is neither a dataset nor a run" if path.exists() else "does not exist"
    raise Error(path, why, "name a folder that classiclm prepare or classiclm train wrote", BAD_INPUT)


def _describe(path: Path) -> str:
    meta = dataset.load_meta(path)
    splits, n = meta.splits, len(meta.shards)
    shards = f"{n} shard{'' if n == 1 else 's'}"
    return f"a dataset of {splits.train.tokens:,} training and {splits.val.tokens:,} validation tokens in {shards}"


def check_run(run: Path) -> list[str]:
    """What is wrong with a run, a line each: its config, its metrics, its checkpoints.

    A run that was imported, and not trained since, has neither config nor metrics.
    """
    steps = saved_steps(run)
    files = (("config.yaml", load_yaml), ("metrics.jsonl", _read_metrics))
    found = [_trouble(run / name, read, max(steps, default=0) > 0) for name, read in files]
    for folder in (folder_of(run, step) for step in steps):
        problem = defect(folder)
        found.append(f"{folder}: {problem}" if problem else None)
    return [line for line in found if line]


def _read_metrics(path: Path) -> None:
    """A last row that a crash has torn is no defect."""
    Metrics(path.parent).rows()


def _trouble(path: Path, read: Callable[[Path], object], needed: bool) -> str | None:
    """Why a file cannot be read, in a line."""
    if not path.exists():
        return f"{path}: is missing" if needed else None
    if not path.is_file():
        return f"{path}: is no plain file"
    try:
        read(path)
    except (Error, OSError, RecursionError) as e:  # RecursionError: a row nested too deeply
        return " ".join(str(e).partition(". Fix: ")[0].split()) if isinstance(e, Error) else f"{path}: cannot be read"
    return None
