"""classiclm export: a run's weights, sizes and tokenizer as a folder that other programs read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from classiclm import registry
from classiclm.commands.tables import show, table
from classiclm.config import Positional, parse_flags, validate
from classiclm.convert import check, folders, gguf
from classiclm.errors import BUG, Error
from classiclm.extras import need
from classiclm.files import make_folder, publish_folder, writing
from classiclm.train import checkpoint
from classiclm.train.progress import say

EXTRA = "export"


@dataclass(frozen=True)
class ExportFlags:
    """Write a trained model as a folder for Hugging Face's libraries, or as a GGUF file for llama.cpp."""

    run: Annotated[str | None, Positional] = None  # the folder of a run
    to: Literal["hf", "gguf"] | None = None  # hf: config.json and model.safetensors; gguf: model.gguf (GPT-2, GPT-3)
    out: str | None = None  # the folder to make
    check: bool = False  # read it back and compare with the original: exit code 1 if they differ
    checkpoint: str = "last"  # last, best, a saved step, or mean-5 for the mean of the last five


def main(argv: Sequence[str], prog: str) -> int:
    """Write the folder, as a whole or not at all; then compare, if asked. Exit code 1 if the comparison fails."""
    flags: ExportFlags = validate(ExportFlags, parse_flags(ExportFlags, argv, prog), "the command line")
    if flags.run is None or flags.to is None or flags.out is None:
        raise Error(prog, "needs a run, a format and a folder", f"use {prog} runs/a --to hf --out hf/a")
    out = Path(flags.out)
    _check_out(out)
    if flags.to == "gguf" or flags.check:
        need(gguf.PACKAGE if flags.to == "gguf" else check.PACKAGE, EXTRA)  # before any work is done
    _check_family(Path(flags.run), gguf.FAMILIES if flags.to == "gguf" else tuple(folders.maps()), flags.to)
    loaded = registry.open_run(flags.run, flags.checkpoint)
    write = gguf.contents if flags.to == "gguf" else folders.contents
    _publish(out, write(loaded.info["family"], loaded.model.config, loaded.model.state_dict(), loaded.tokenizer))
    say(f"{loaded.folder} is now {out} ({flags.to})")
    return _compare(out, loaded, flags.to) if flags.check else 0


def _check_out(out: Path) -> None:
    """Raises Error (exit 2) for a folder that holds something."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise Error(out, "exists already", "name another folder with --out, or remove this one")


def _check_family(run: Path, known: Sequence[str], to: str) -> None:
    """Raises Error (exit 2) for a run of a family that the format has no place for."""
    family = checkpoint.read_model_info(checkpoint.require(run, "last"))["family"]
    if family not in known:
        why = f"is of the family {family!r}, which the format {to} has no place for"
        raise Error(run, why, f"export a run of one of these: {', '.join(known)}")


def _publish(out: Path, files: dict[str, bytes]) -> None:
    make_folder(out.parent)
    if out.is_dir():
        with writing(out):
            out.rmdir()  # it is empty
    publish_folder(out, files, {"kind": "export"})


def _compare(out: Path, loaded: registry.Loaded, to: str) -> int:
    """The differences on stdout; 1 if one is above its bar."""
    if to == "gguf":
        rows = gguf.compare(out, loaded.model.config, loaded.model.state_dict())
    else:
        rows = check.compare(out, loaded.info["family"], loaded.model, loaded.tokenizer)
    made = table(["what"], ["difference", "bar"], last="verdict")
    for row in rows:
        made.add_row(row.what, f"{row.value:.2g}", f"{row.bar:.0e}" if row.bar else "0", "ok" if row.ok else "DIFFERS")
    show(made)
    return 0 if all(row.ok for row in rows) else BUG
