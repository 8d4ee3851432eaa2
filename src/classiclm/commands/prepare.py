"""classiclm prepare: corpora -> token shards that `train --data` takes."""

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml

from classiclm.commands.tables import show, table
from classiclm.config import (
    Positional,
    Positive,
    PositiveFloat,
    Rate,
    difference,
    load_yaml,
    merge,
    parse_flags,
    to_yaml,
    validate,
)
from classiclm.data.cleaning import Cleaning
from classiclm.data.cluster import Engine, clean_on, next_command
from classiclm.data.dataset import load_meta, open_dataset, write_meta
from classiclm.data.dataset_meta import FORMAT, SPLITS, VERSION
from classiclm.data.duplicates import Near
from classiclm.data.exports import export_llmc, export_nanogpt
from classiclm.data.prepare import Job, map_stage, remove_pieces, saved_origins
from classiclm.data.reduce import Corpus, reduce_stage
from classiclm.data.sources import SOURCES, Origin, resolve
from classiclm.data.tokenizer import Tokenizer
from classiclm.data.tokenizers import is_learnt, load_tokenizer
from classiclm.data.wordpiece import WordPiece
from classiclm.errors import USAGE, Error
from classiclm.files import locked, sha256, write_file
from classiclm.train.progress import say

_EXPORTS = {"nanogpt": export_nanogpt, "llmc": export_llmc}
_SIZES = ("tokens", "documents", "sequences", "text_bytes", "chars")
_NOT_THE_DATA = ("out", "config", "workers", "export", "engine")  # what changes no byte of the shards


@dataclass(frozen=True)
class PrepareFlags:
    """Clean and tokenise corpora into shards, for `classiclm train --data OUT`.

    A source is a known corpus (NAME), one read from your files (NAME=PATH), or files of any text (PATH). Stopped or
    killed, the same command goes on.
    """

    sources: Annotated[tuple[str, ...], Positional] = ()  # as in: wikipedia  enron=./maildir  './letters/*.txt'
    out: str | None = None  # the folder to write
    tokenizer: str = "gpt2"  # gpt2, bert, gpt1, a tokenizer.json; or bpe-N, wordpiece-N, char: learnt here
    weights: tuple[PositiveFloat, ...] | None = None  # shares of the sources in training; default: all there is, once
    val_share: Rate = 0.005  # of the documents, kept for validation
    cleaning: Cleaning = Cleaning()  # steps of cleaning, joined by commas; none = none
    near: Near = Near()  # near-duplicates
    text: str | None = None  # column with the text, of jsonl, csv, tsv and parquet; default: the source's own
    group: str | None = None  # column whose equal neighbouring values make one document
    documents: Literal["file", "block", "line"] | None = None  # what a document of a text file is
    format: Literal["auto", "text", "jsonl", "csv", "tsv", "parquet", "mail"] | None = None  # default: by the ending
    errors: Literal["strict", "replace", "skip"] | None = None  # what to do with bytes that are not UTF-8
    limit: Positive | None = None  # documents to take of each source; default: all
    shard_tokens: Positive = 1 << 25  # tokens in a shard, about
    workers: Positive | None = None  # processes; default: one for each core
    export: Literal["nanogpt", "llmc"] | None = None  # write the tokens in another project's form too, to OUT/NAME
    engine: Engine = Engine()  # clean on datatrove's executor instead, a machine or a cluster: local, slurm or ray
    config: str | None = None  # a YAML file with any of these settings


def main(argv: Sequence[str], prog: str) -> int:
    """Prepare, or go on with it, or say that it is done."""
    flags = _flags(argv, prog)
    if flags.out is None:
        raise Error("--out", "is missing", "name the folder to write, as in --out data/mix")
    out = Path(flags.out)
    if flags.engine.kind:
        return _clean_only(flags, out)
    with locked(out, ".pieces", *_EXPORTS):
        _check_settings(out, flags)
        if not (out / "meta.json").is_file():
            job = _job(flags, _saved_revisions(out))
            write_file(out / "config.yaml", _settings(flags).encode())
            _prepare(job, flags)
        else:
            open_dataset(out, verify="size")  # a file that is gone is not passed over
            say(f"{out} is finished")
            shutil.rmtree(out / ".pieces", ignore_errors=True)  # of a process that was killed at the very end
        _report(out)
        if flags.export:
            say(f"writing {out / flags.export}")
            _EXPORTS[flags.export](open_dataset(out), out / flags.export)
    return 0


def _clean_only(flags: PrepareFlags, out: Path) -> int:
    """Have datatrove clean the sources, and say what comes next. Raises Error (exit 2) for flags of what comes next."""
    plain = PrepareFlags()
    names = ("limit", "weights", "export", "tokenizer", "val_share", "near", "shard_tokens")
    later = [name for name in names if getattr(flags, name) != getattr(plain, name)]
    if later:
        fix = "leave it out now, and give it to the command that makes shards of what is cleaned"
        raise Error(f"--{later[0]}", "does nothing with --engine, which only cleans", fix)
    with locked(out):
        origins = _origins(flags, [])
        workers = flags.workers or (_n_cores() if flags.engine.kind == "local" else None)
        finished = clean_on(origins, out, flags.cleaning, flags.engine, workers)
        say(f"cleaned; now: {next_command(origins, out)}" if finished else "when all jobs are done, run this once more")
    return 0


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _flags(argv: Sequence[str], prog: str) -> PrepareFlags:
    given = parse_flags(PrepareFlags, argv, prog)
    path = given.get("config")
    tree = load_yaml(Path(path)) if path else {}
    flags = validate(PrepareFlags, merge(tree, given), path or "the command line")
    if not flags.sources:
        raise Error("SOURCE", "is missing", f"name one or more of {', '.join(SOURCES)}, NAME=PATH, or a path")
    if flags.weights is not None and len(flags.weights) != len(flags.sources):
        why = f"are {len(flags.weights)}, and the sources {len(flags.sources)}"
        raise Error("--weights", why, "give one weight for each source, in the sources' order")
    if not flags.val_share:
        raise Error("--val_share", "is 0, and training needs a validation split", "use --val_share 0.001, say")
    return flags


def _job(flags: PrepareFlags, revisions: Sequence[str | None]) -> Job:
    origins = _origins(flags, revisions)
    if not is_learnt(flags.tokenizer):
        load_tokenizer(flags.tokenizer)  # a wrong name is found out before the sources are read
    job = Job(
        origins=origins,
        out=Path(str(flags.out)),
        tokenizer=flags.tokenizer,
        cleaning=flags.cleaning,
        near=flags.near,
        weights=flags.weights,
        val_share=flags.val_share,
        shard_tokens=flags.shard_tokens,
        workers=flags.workers or _n_cores(),
        limit=flags.limit,
    )
    for origin in origins:
        job.steps(origin)  # likewise
    return job


def _origins(flags: PrepareFlags, revisions: Sequence[str | None]) -> tuple[Origin, ...]:
    """The sources, found; a second one of the same name gets a number."""
    reading = {name: getattr(flags, name) for name in ("text", "group", "documents", "format", "errors")}
    overrides = {name: value for name, value in reading.items() if value is not None}
    origins: list[Any] = []
    for argument, revision in zip(flags.sources, revisions or [None] * len(flags.sources), strict=True):
        origin: Any = resolve(argument, overrides, _steps(flags.cleaning), revision)
        taken = {known.name for known in origins}
        names = (f"{origin.name}-{n}" if n > 1 else origin.name for n in itertools.count(1))
        origins.append(dataclasses.replace(origin, name=next(name for name in names if name not in taken)))
    return tuple(origins)


def _steps(cleaning: Cleaning) -> list[str] | None:
    """The steps that were asked for, None for each source's own."""
    if cleaning.steps is None:
        return None
    names = [name.strip() for name in cleaning.steps.split(",")]
    return [] if names in (["none"], [""]) else names


def _check_settings(out: Path, flags: PrepareFlags) -> None:
    """Compare with the config.yaml that is there, if there is work that it has decided; else begin anew.

    Raises Error (exit 2) with the difference, or for a folder in use.
    """
    path = out / "config.yaml"
    if not path.is_file():
        others = [entry.name for entry in out.iterdir() if not entry.name.startswith(".")]
        if others:
            raise Error(out, f"has other files in it, such as {others[0]}", "choose an empty or new folder", USAGE)
        return
    if not (out / "meta.json").is_file() and not any((out / ".pieces").glob("*.safetensors")):
        shutil.rmtree(out / ".pieces", ignore_errors=True)
        return
    changed = difference(load_yaml(path), yaml.safe_load(_settings(flags)))
    if changed:
        why = "was begun with other settings (" + "; ".join(changed) + ")"
        raise Error(out, why, "choose another --out, or the settings it was begun with", USAGE)


def _settings(flags: PrepareFlags) -> str:
    """What decides the bytes of the shards, as YAML."""
    return to_yaml(flags, leave_out=_NOT_THE_DATA)


def _saved_revisions(out: Path) -> list[str | None]:
    """The commits of the hub that the work began with, one for each source; empty before it has begun."""
    path = out / ".pieces" / "origins.json"
    if not path.is_file():
        return []
    return [origin.get("revision") for origin in json.loads(path.read_text(encoding="utf-8"))]


def _prepare(job: Job, flags: PrepareFlags) -> None:
    """Both stages and meta.json."""
    names = ", ".join(origin.name for origin in job.origins)
    say(f"{names} -> {job.out}: {flags.tokenizer}, {job.workers} processes")
    tokenizer = map_stage(job, say)
    corpora, shards = reduce_stage(job, tokenizer, say)
    write_file(job.out / "tokenizer.json", tokenizer.to_json().encode())
    write_meta(job.out, _meta(job, tokenizer, corpora, shards))
    remove_pieces(job)


def _meta(job: Job, tokenizer: Tokenizer, corpora: Sequence[Corpus], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of meta.json."""
    text = tokenizer.to_json().encode()
    weights = dict(zip((o.name for o in job.origins), job.weights, strict=True)) if job.weights else None
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": {
            "file": "tokenizer.json",
            "sha256": sha256(text),
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
        },
        "dtype": np.dtype(tokenizer.dtype).name,
        "end_of_text": tokenizer.end_of_text,
        "sequences": "sentences" if isinstance(tokenizer, WordPiece) else "documents",
        "weights": weights,
        "splits": {split: _sum(shards, split) for split in SPLITS},
        "sources": [
            {
                "name": origin.name,
                "origin": described,
                "notes": dict(sorted(corpus.notes.items())),
                "steps": [effects.to_json() for effects in corpus.effects],
                "splits": {split: _sum(shards, split, origin.name) for split in SPLITS},
            }
            for origin, described, corpus in zip(job.origins, saved_origins(job), corpora, strict=True)
        ],
        "shards": shards,
    }


def _sum(shards: Sequence[Mapping[str, Any]], split: str, source: str | None = None) -> dict[str, int]:
    """How much there is in the shards of a split, of one source or of all."""
    chosen = [shard for shard in shards if shard["split"] == split and source in (None, shard["source"])]
    sums = {name: sum(shard[name] for shard in chosen) for name in _SIZES}
    return {"bytes" if name == "text_bytes" else name: n for name, n in sums.items()}


def _report(out: Path) -> None:
    """What there is, as a table on stdout."""
    meta: Any = load_meta(out)
    made = table(["source"], ["documents", "removed", "characters", "train tokens", "val tokens"])
    for source in json.loads((out / "meta.json").read_bytes())["sources"]:
        steps, splits = source["steps"], source["splits"]
        n_kept = sum(splits[split]["documents"] for split in SPLITS)
        n_read = steps[0]["documents_in"] if steps else n_kept
        chars = sum(splits[split]["chars"] for split in SPLITS)
        tokens = [f"{splits[split]['tokens']:,}" for split in SPLITS]
        made.add_row(source["name"], f"{n_read:,}", f"{n_read - n_kept:,}", f"{chars:,}", *tokens)
    show(made)
    say(f"{out}: {len(meta.shards)} shards; train on them with --data {out if '/' in str(out) else f'./{out}'}")
