"""The parent's side: a process for each contender, one unit at a time, round robin.

All contenders of a case are there at once, prepared and warm; only one of them runs at any time. The order moves on by
one each round, so that whatever else the machine does hits all alike.
"""

import dataclasses
import itertools
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import Case, Entry
from benchmarks.work import Work

ROOT = Path(__file__).resolve().parent.parent
REST = 0.25  # seconds between two turns: threads of the one before are asleep by then
ENDING = 5.0  # seconds that a contender has to leave


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    repeats: int = 5
    threads: int = 1
    warm_up: int = 2
    patience: float = 900.0  # seconds for a preparation, or a unit
    at_once: int = 1  # how many prepare at the same time: two large ones may not fit
    python: dict[str, str] = field(default_factory=dict)  # other interpreters, by the name of a contender's file
    nanogpt: str | None = None
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


class Failed(Exception):
    """A contender is out, and why."""


class Contender:
    """One contender's process, and what it has said."""

    def __init__(self, entry: Entry, work: Work, settings: Settings, folder: Path, profiling: bool = False):
        self.entry, self.settings = entry, settings
        self.ready: dict[str, Any] = {}
        self.turns: list[dict[str, Any]] = []
        self.why: str | None = None
        self.idle = [0.0, 0.0]  # seconds: of processor time, of waiting
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in close()
        self._rest = b""
        file = entry.target.partition(":")[0].rstrip("_")
        self.process = subprocess.Popen(
            [settings.python.get(file, sys.executable), "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env=environment(settings.threads),
            cwd=ROOT,
        )
        options = {**entry.options, **({"folder": settings.nanogpt} if file == "nanogpt" else {})}
        job = {"target": entry.target, "work": dataclasses.asdict(work), "options": options, "folder": str(folder)}
        more = {"threads": settings.threads, "warm_up": settings.warm_up, "profiling": profiling}
        self._send(json.dumps({**job, **more}))

    def prepare(self) -> None:
        """Wait until it is ready; `why` says why it will not be."""
        try:
            self.ready = self._answer("ready")
        except Failed as e:
            self.why = str(e)

    def turn(self) -> None:
        """Let it do one unit."""
        try:
            self._send("go")
            self.turns.append(self._answer("done"))
        except Failed as e:
            self.why = str(e)

    def close(self) -> None:
        """Tell it to leave, and wait; whoever stays is killed."""
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(ENDING)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()
        self._said.close()

    def _send(self, line: str) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # its last words are in the other pipe

    def _answer(self, event: str) -> dict[str, Any]:
        """The next message, which has to be of the kind. Raises Failed."""
        message = json.loads(self._line())
        if message.pop("event") == event:
            return message
        raise Failed(message.get("why", "it said something else than it should"))

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        file, deadline = self.process.stdout.fileno(), time.monotonic() + self.settings.patience
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self.process.kill()
                    raise Failed(f"took more than {self.settings.patience:.0f} s")
                got = os.read(file, 1 << 16)
                if not got:
                    raise Failed(self._last_words())
                self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        code = self.process.wait()
        self._said.seek(0)
        lines = self._said.read().strip().splitlines()
        killed = " (killed: too little memory?)" if code == -9 else ""
        return f"ended with code {code}{killed}: {lines[-1][:200] if lines else 'nothing said'}"


def environment(threads: int) -> dict[str, str]:
    """The same threads for all, and our sources before any installed ones."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    paths = [str(ROOT), str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**env, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def measure(case: Case, settings: Settings, folder: Path, profiling: bool = False) -> dict[str, Any]:
    """Prepare, take the rounds, say what happened: a case of the JSON file."""
    before = machine.load()
    contenders = start(case, settings, folder)
    try:
        for number in range(settings.repeats):
            take_round(contenders, number, settings)
    finally:
        for contender in contenders:
            contender.close()
    profiles = profile(case, settings, folder) if profiling else {}
    return result(case, contenders, profiles, [before, machine.load()])


def start(case: Case, settings: Settings, folder: Path) -> list[Contender]:
    """The contenders, ready or with a reason why not."""
    contenders: list[Contender] = []
    waiting: list[Contender] = []
    for entry in case.entries:
        waiting.append(Contender(entry, entry.work or case.work, settings, folder))
        contenders.append(waiting[-1])
        if len(waiting) >= settings.at_once:
            announce(case, waiting.pop(0))
    for contender in waiting:
        announce(case, contender)
    return contenders


def announce(case: Case, contender: Contender) -> None:
    """Wait for one, and say how it went."""
    contender.prepare()
    contender.settings.say(f"{case.name}: {contender.entry.name}: {contender.why or 'ready'}")


def take_round(contenders: Sequence[Contender], number: int, settings: Settings) -> None:
    """A unit of each that is still in; whoever waits is watched for processor time."""
    for contender in rotated([c for c in contenders if c.why is None], number):
        waiting = [c for c in contenders if c is not contender and c.why is None]
        time.sleep(REST)
        used, began = [machine.cpu_seconds(c.process.pid) for c in waiting], time.monotonic()
        contender.turn()
        for other, spent in zip(waiting, used, strict=True):
            other.idle[0] += machine.cpu_seconds(other.process.pid) - spent
            other.idle[1] += time.monotonic() - began
        if contender.why:
            settings.say(f"{contender.entry.name}: {contender.why}")


def rotated(contenders: Sequence[Contender], number: int) -> list[Contender]:
    """From another one on in each round."""
    first = number % max(1, len(contenders))
    return [*contenders[first:], *contenders[:first]]


def profile(case: Case, settings: Settings, folder: Path) -> dict[str, dict[str, float]]:
    """Where a unit of each of ours goes, in a process of its own: name -> group -> seconds."""
    profiles = {}
    for entry in case.entries:
        if entry.target not in ("ours:train", "ours:decode") or entry.x is not None:
            continue
        contender = Contender(entry, entry.work or case.work, settings, folder, profiling=True)
        contender.prepare()
        if contender.why is None:
            contender.turn()
        if contender.turns:
            profiles[entry.name] = contender.turns[0]["profile"]
        contender.close()
    return profiles


def result(
    case: Case, contenders: Sequence[Contender], profiles: dict[str, dict[str, float]], loads: list[list[float]]
) -> dict[str, Any]:
    """All that the report needs, and all raw times."""
    rows = [row(case, contender) | {"profile": profiles.get(contender.entry.name)} for contender in contenders]
    described = {"name": case.name, "title": case.title, "about": case.about, "axis": case.axis, "load": loads}
    parts = {"measures": case.measures, "bars": case.bars}
    compare_written(rows)
    return {**described, **{k: [dataclasses.asdict(p) for p in v] for k, v in parts.items()}, "contenders": rows}


def row(case: Case, c: Contender) -> dict[str, Any]:
    """One contender: what it is, what became of it, its seconds by measure and round."""
    work, limits = c.entry.work or case.work, [entry.name for entry in case.entries if entry.role == "limit"]
    ready = {"n_params": None, "note": "", **c.ready}
    return {
        "name": c.entry.name,
        "role": c.entry.role,
        "x": c.entry.x,
        "limit": c.entry.limit or (limits[0] if len(limits) == 1 else None),
        "work": dataclasses.asdict(work),
        "why": c.why,
        "peak": max((turn["peak"] for turn in c.turns if turn["peak"] is not None), default=None),
        "loss": [turn["loss"] for turn in c.turns if "loss" in turn],
        "idle": round(c.idle[0] / c.idle[1], 4) if c.idle[1] else None,
        "amount": {m.name: m.amount(work, ready["n_params"]) for m in case.measures},
        "seconds": {m.name: [turn["seconds"].get(m.name) for turn in c.turns] for m in case.measures},
        **ready,
    }


def compare_written(rows: Sequence[dict[str, Any]]) -> None:
    """In place of the tokens that a contender wrote: the share that is as the first peer has it (in fp32)."""
    reference = next((r["written"] for r in rows if r["role"] == "peer" and "written" in r), None)
    for r in rows:
        written = r.pop("written", None)
        if written is not None and reference is not None:
            mine, theirs = (list(itertools.chain.from_iterable(texts)) for texts in (written, reference))
            r["same"] = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(theirs)
