"""classiclm import: weights from elsewhere as a run, so that every other command works on them."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import save as save_tensors

from classiclm import registry
from classiclm.config import Positional, parse_flags, validate
from classiclm.convert import folders, vocabularies
from classiclm.convert.folders import Foreign
from classiclm.data.tokenizers import Tokenizer, file_of, load_tokenizer
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import is_path, locked, make_folder, publish_folder
from classiclm.train import checkpoint
from classiclm.train.progress import say

UNKNOWN = "imported"  # in the place of a preset's name, if no preset has these sizes


@dataclass(frozen=True)
class ImportFlags:
    """Make a run of a model in Hugging Face's form, or of OpenAI's files of GPT-1."""

    source: Annotated[str | None, Positional] = None  # a folder with config.json and model.safetensors
    out: str | None = None  # the folder of the run to make
    tokenizer: str | None = None  # gpt2, gpt1, bert or the path of a tokenizer.json; default: the folder's own


def main(argv: Sequence[str], prog: str) -> int:
    """Read, check, publish as the checkpoint of step 0."""
    flags: ImportFlags = validate(ImportFlags, parse_flags(ImportFlags, argv, prog), "the command line")
    if not flags.source or not flags.out:  # "" would be the folder one stands in
        raise Error(prog, "needs a folder to read and one to make", f"use {prog} hf/a --out runs/a")
    source, run = Path(flags.source), Path(flags.out)
    _check_out(run)
    foreign = folders.read(source)
    tokenizer = _tokenizer(source if source.is_dir() else source.parent, flags.tokenizer, foreign)
    name = preset_of(foreign)
    folder = _publish(run, foreign, tokenizer, name)
    if foreign.notes:
        say(f"training only: {', '.join(foreign.notes)}")
    count = sum(weight.numel() for weight in foreign.weights.values())
    kept = "" if foreign.dtypes == ("float32",) else f", kept as {' and '.join(foreign.dtypes)} and now in fp32"
    say(f"{source} is now {folder} ({foreign.family}, {name}): {count:,} parameters{kept}")
    return 0


def preset_of(foreign: Foreign) -> str:
    """The preset of these sizes; dropout is no size, and files from elsewhere have their own."""
    for preset in registry.presets().values():
        if preset.family == foreign.family:
            config = dataclasses.replace(preset.config, dropout=foreign.config.dropout)
            if config == foreign.config:
                return preset.name
    return UNKNOWN


def _check_out(run: Path) -> None:
    """Raises Error (exit 2) for a run that has checkpoints already."""
    if checkpoint.saved_steps(run):
        raise Error(run, "has checkpoints already", "name another folder with --out")


def _tokenizer(folder: Path, asked: str | None, foreign: Foreign) -> Tokenizer:
    """The one asked for, else the folder's. Raises Error (exit 3) if there is none, or it does not fit the weights."""
    tokenizer = vocabularies.read(folder) if asked is None else _named(asked)
    if tokenizer is None:
        why = "has no tokenizer.json, vocab.txt, or vocab.json with merges.txt"
        raise Error(folder, why, "name the tokenizer with --tokenizer", BAD_INPUT)
    source = asked or f"the tokenizer in {folder}"
    vocabularies.check_kind(tokenizer, foreign.family, source)
    if tokenizer.vocab_size != foreign.config.vocab_size:
        why = f"has {tokenizer.vocab_size:,} tokens, and the weights have rows for {foreign.config.vocab_size:,}"
        fix = "name the tokenizer that the model was trained with; padded rows have to be cut off first"
        raise Error(source, why, fix, BAD_INPUT)
    return tokenizer


def _named(name_or_path: str) -> Tokenizer:
    """A published one, that of a folder in any of the forms that are read, or that of a run."""
    if not is_path(name_or_path):
        return load_tokenizer(name_or_path)
    found = vocabularies.read(Path(name_or_path)) if Path(name_or_path).is_dir() else None
    return found or vocabularies.read_file(file_of(name_or_path))


def _publish(run: Path, foreign: Foreign, tokenizer: Tokenizer, name: str) -> Path:
    """The checkpoint's folder. Raises Error: exit 2 if there is one by now, 4 if it cannot be written."""
    info: dict[str, Any] = {"family": foreign.family, "preset": name, "config": dataclasses.asdict(foreign.config)}
    files = {
        "model.safetensors": save_tensors(foreign.weights),
        "model.json": json.dumps(info, indent=1).encode(),
        "tokenizer.json": tokenizer.to_json().encode(),
        "state.json": json.dumps(vars(checkpoint.State())).encode(),
    }
    folder = checkpoint.folder_of(run, 0)
    with locked(run, "checkpoints"):
        _check_out(run)
        make_folder(folder.parent)
        publish_folder(folder, files, {"step": 0})
    return folder
