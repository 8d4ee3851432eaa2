"""Reading and cleaning on datatrove's executors (extra `cluster`): one machine, Slurm, or Ray.

The map stage of big corpora, cut into tasks. Task r of n reads every n-th file from file r on, or the r-th part of a
hub set, cleans it, and writes a Parquet file with the columns text and id. A second command makes shards of them.

    OUT/clean/NAME/00000.parquet  what task 0 kept of the source NAME
    OUT/log/NAME/                 datatrove's logs, counts and marks of finished tasks; plan.json; what cleaning did

The same command again runs the tasks that are not marked as finished; one that was killed writes its file anew. The
steps are callables of (documents, rank, world size), and fit into any pipeline of datatrove.
"""

import dataclasses
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from classiclm.config import Positive, difference
from classiclm.data.cleaning import DUPLICATE_STEPS, Cleaning, Effects, clean, make_steps
from classiclm.data.documents import Document
from classiclm.data.hub import open_stream, read_rows
from classiclm.data.readers import Notes
from classiclm.data.sources import HubRows, LocalFiles, Origin
from classiclm.errors import BAD_INPUT, RESOURCE, USAGE, Error
from classiclm.extras import need
from classiclm.files import make_folder, write_file

_BATCH = 64  # documents that the writer holds back; each may have 8 Mi characters


@dataclass(frozen=True)
class Engine:
    """What cleans the sources in place of this command's own processes."""

    SHORTHAND: ClassVar[str] = "kind"

    kind: Literal["local", "slurm", "ray"] | None = None  # only clean the sources, on this executor of datatrove
    tasks: Positive = 64  # parts that each source is cut into; a file is never cut
    hours: Positive = 24  # that a task may take on Slurm and Ray
    cpus: Positive = 1  # cores of a task, on Slurm and Ray
    gigabytes: Positive = 4  # memory for each of these cores
    partition: str | None = None  # of Slurm
    setup: str | None = None  # shell command that readies a node of Slurm, as in "source /shared/venv/bin/activate"


class _Step:
    """datatrove's protocol of a step. No subclass of its own class: that would need it wherever this file is read."""

    def __post_init__(self) -> None:
        self.stats = need("datatrove.utils.stats", "cluster").Stats(type(self).__name__)

    def _count(self, counts: Mapping[str, int]) -> None:
        for what, n in counts.items():
            self.stats[what].update(n, "task")


@dataclass
class ReadOrigin(_Step):
    """Yields the documents of an origin; each task reads a part of its own."""

    origin: Origin
    log: Path  # folder for what the reader's policies did, a file for each task

    def __call__(self, data: Iterable[Any] | None, rank: int, world_size: int) -> Iterator[Any]:
        """datatrove's Documents, behind those of earlier readers (`data`). Raises Error as `Origin.read` does."""
        yield from data or ()
        theirs, notes = need("datatrove.data", "cluster").Document, Notes()
        for document in _part(self.origin, rank, world_size, notes):
            yield theirs(text=document.text, id=document.name.encode(errors="backslashreplace").decode())
        self._count(notes.counts)
        _write_json(self.log / f"notes-{rank:05d}.json", dict(notes.counts))


def _part(origin: Origin, rank: int, world_size: int, notes: Notes) -> Iterator[Document]:
    """The documents of one task. One that is spread over files of a hub set is cut where a part ends."""
    if isinstance(origin, HubRows):
        name, stream = origin.source.name, open_stream(origin.hub, origin.source.name, origin.source.alternatives)
        n_parts = min(world_size, stream.num_shards)
        if rank < n_parts:
            rows = read_rows(stream.shard(n_parts, rank), origin.hub, origin.reading, name, None, notes)
            yield from (Document(row.text, f"{rank:05d}/{row.name}") for row, _ in rows)  # each counts rows from 1
    else:
        assert isinstance(origin, LocalFiles)  # there are no others
        part = dataclasses.replace(origin, files=origin.files[rank::world_size])
        yield from (document for document, _ in part.read(None, notes))


@dataclass
class CleanSteps(_Step):
    """Puts documents through cleaning steps by name; those that compare documents are not among them."""

    names: tuple[str, ...]
    settings: Cleaning
    log: Path  # folder for what the steps did, a file for each task

    def __call__(self, data: Iterable[Any] | None, rank: int, world_size: int) -> Iterator[Any]:
        """The documents that stay, with their metadata. Raises Error (exit 2) for an unknown name."""
        current: Any = None

        def ours() -> Iterator[Document]:
            nonlocal current
            for current in data or ():
                yield Document(current.text, current.id)

        stream, effects = clean(ours(), make_steps(self.names, self.settings))
        for document in stream:  # no step holds a document back, so it is the current one
            current.text = document.text
            yield current
        for step in effects:
            self._count({f"{step.name}: {case}": n for case, n in (step.removed | {"changed": step.changed}).items()})
        _write_json(self.log / f"effects-{rank:05d}.json", [step.to_json() for step in effects])


def make_executor(origin: Origin, out: Path, settings: Cleaning, engine: Engine, workers: int | None = None) -> Any:
    """datatrove's executor that cleans an origin into OUT, to be started by run(). `workers`: tasks at once; None: all.

    Raises Error: exit 2 for an unknown step or OUT begun with other settings, 3 with other files, 4 without a package.
    """
    need("datatrove", "cluster")
    out = out.absolute()  # tasks may start in any folder
    if isinstance(origin, LocalFiles):
        origin = dataclasses.replace(origin, files=tuple((name, path.absolute()) for name, path in origin.files))
        engine = dataclasses.replace(engine, tasks=min(engine.tasks, len(origin.files)))
    names, log = tuple(name for name in origin.steps if name not in DUPLICATE_STEPS), out / "log" / origin.name
    make_steps(names, settings)
    writer = need("datatrove.pipeline.writers", "cluster").ParquetWriter
    to_disk = writer(str(out / "clean" / origin.name), compression="zstd", batch_size=_BATCH, max_file_size=-1)
    pipeline = [ReadOrigin(origin, log), CleanSteps(names, settings, log), to_disk]
    common = {"pipeline": pipeline, "tasks": engine.tasks, "workers": workers or -1, "logging_dir": str(log)}
    executor = _executor(engine, f"classiclm-{origin.name}", common)
    _check_plan(log / "plan.json", _plan(origin, names, settings, engine.tasks))
    return executor


def _executor(engine: Engine, name: str, common: dict[str, Any]) -> Any:
    limits = {"cpus_per_task": engine.cpus, "mem_per_cpu_gb": engine.gigabytes}
    if engine.kind == "slurm":
        if engine.partition is None:
            raise Error("--engine.partition", "is missing", "name a partition of the cluster; sinfo lists them", USAGE)
        slurm = {"job_name": name, "partition": engine.partition, "qos": None, "time": f"{engine.hours}:00:00"}
        make = need("datatrove.executor.slurm", "cluster").SlurmPipelineExecutor
        return make(**common, **limits, **slurm, env_command=engine.setup)
    if engine.kind == "ray":
        need("ray", "ray")
        make = need("datatrove.executor.ray", "cluster").RayPipelineExecutor
        return make(**common, **limits, time=engine.hours * 3600)
    return need("datatrove.executor.local", "cluster").LocalPipelineExecutor(**common)


def clean_on(origins: Sequence[Origin], out: Path, settings: Cleaning, engine: Engine, workers: int | None) -> bool:
    """Clean all origins into OUT; whether all tasks are finished. Slurm takes the jobs, and does them later.

    Raises Error as `make_executor` and the tasks do, and (exit 4) where there is no Slurm.
    """
    executors = [make_executor(origin, out, settings, engine, workers) for origin in origins]
    for executor in executors:
        try:
            executor.run()
        except FileNotFoundError as e:
            if e.filename != "sbatch":
                raise
            script = executor.logging_dir.resolve_paths("launch_script.slurm")
            raise Error("sbatch", "is not here", f"use a machine that has Slurm, or submit {script}", RESOURCE) from e
    return not any(executor.get_incomplete_ranks() for executor in executors)


def next_command(origins: Sequence[Origin], out: Path) -> str:
    """The command that makes shards of the cleaned text; flags such as --tokenizer can follow."""
    steps = [name for name in DUPLICATE_STEPS if any(name in origin.steps for origin in origins)]
    folders = shlex.join(str(out / "clean" / origin.name) for origin in origins)
    shards = shlex.quote(str(out / "shards"))
    return f"classiclm prepare {folders} --cleaning {','.join(steps) or 'none'} --out {shards}"


def report(out: Path, name: str) -> tuple[dict[str, int], list[Effects]]:
    """What the reader's policies and the cleaning steps did to a source, summed over the tasks finished so far."""
    notes, effects = Counter[str](), dict[int, Effects]()
    for path in sorted((out / "log" / name).glob("notes-*.json")):
        notes.update(json.loads(path.read_bytes()))
    for path in sorted((out / "log" / name).glob("effects-*.json")):
        for i, tree in enumerate(json.loads(path.read_bytes())):
            effects.setdefault(i, Effects(tree["name"])).merge(Effects.from_json(tree))
    return dict(notes), list(effects.values())


def _plan(origin: Origin, names: Sequence[str], settings: Cleaning, tasks: int) -> dict[str, Any]:
    """What decides which file holds what: with another number of tasks, finished ones would have read other files."""
    plan = {"tasks": tasks, "reading": dataclasses.asdict(origin.reading)}
    plan["cleaning"] = dataclasses.asdict(settings) | {"steps": list(names)}
    if isinstance(origin, HubRows):
        return plan | {"hub": dataclasses.asdict(origin.hub)}
    assert isinstance(origin, LocalFiles)
    lines = "".join(f"{path.stat().st_size}  {name}\n" for name, path in origin.files)  # to read all would take hours
    return plan | {"files": hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()}


def _check_plan(path: Path, plan: dict[str, Any]) -> None:
    """Keep the plan, or compare with the one that the work was begun with."""
    changed = difference(json.loads(path.read_bytes()), plan) if path.is_file() else []
    if changed:
        code = BAD_INPUT if all(line.startswith("files:") for line in changed) else USAGE
        fix = "choose another --out, or go on with what it was begun with"
        raise Error(path.parent, f"was begun with other files or settings ({'; '.join(changed)})", fix, code)
    _write_json(path, plan)


def _write_json(path: Path, tree: Any) -> None:
    write_file(make_folder(path.parent) / path.name, json.dumps(tree, indent=1).encode())
