"""Whole runs, killed at random and started again until they are done: the end must be that of a run left alone.

A run is `classiclm train` in a fork of this process, which has imported torch already.
"""

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from classiclm.cli import main
from classiclm.errors import RESOURCE
from classiclm.files import locked
from classiclm.train import checkpoint

from .crash import Tally, scratch

TIMES = ("seconds", "tokens_per_s")
STEPS = 40
SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_ctx": 16, "dropout": 0.1}
AIMS = ("at any time", "inside a save")


def command(run, text, steps=STEPS):
    """The arguments of a short run of a small model that saves every 5 steps."""
    every = {"save_every": 5, "log_every": 1, "eval_every": 20, "eval_windows": 4}
    settings = {"steps": steps, "batch": 4, "seed": 3, **every, "device": "cpu", "compile": "false"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    sizes = [f"--model.{name}={value}" for name, value in SIZES.items()]
    return ["train", "gpt2-shakespeare-cpu", "--data", str(text), "--out", str(run), *flags, *sizes]


def start(arguments, said, slow_disk=False):
    """Fork a process that runs a command, its words in the file `said`; its id. A slow disk takes 3 ms for a flush,
    so that there is time to strike within a save."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if slow_disk:
            os.fsync = _slow(os.fsync)
        with open(said, "a", buffering=1) as file, contextlib.redirect_stderr(file), contextlib.redirect_stdout(file):
            code = main(arguments)
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(code)


def _slow(flush):
    def called(descriptor):
        time.sleep(0.003)
        flush(descriptor)

    return called


def exit_code(child, wait=True):
    """The exit code of a child; None if it still runs and wait is False."""
    found, status = os.waitpid(child, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill(child):
    os.kill(child, signal.SIGKILL)
    return exit_code(child)


def outcome(run):
    """What must be equal: the sums of the newest weights and moments, and the rows but for times."""
    folder, _ = checkpoint.newest_valid(run)
    names = ("model.safetensors", "optimizer.safetensors")
    sums = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return checkpoint.step_of(folder), sums, [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def strike(child, run, aim, chance, seconds, latest=7):
    """Kill a run at any time of `seconds`, or within one of its next `latest` saves; its exit code."""
    began, delay = time.monotonic(), chance.uniform(0, 0.9 * seconds)
    saves, wanted = 0, chance.randrange(latest) + 1
    under_way = False
    while time.monotonic() - began < seconds * 4:
        code = exit_code(child, wait=False)
        if code is not None:
            return code
        if aim == "at any time" and time.monotonic() - began > delay:
            return kill(child)
        seen = aim == "inside a save" and any((run / "checkpoints").glob(".classiclm-tmp-*"))
        saves, under_way = saves + (seen and not under_way), seen
        if seen and saves >= wanted:
            time.sleep(chance.uniform(0, 0.01))
            return kill(child)
        time.sleep(0 if aim == "inside a save" else 0.001)
    return exit_code(child)


def killed_until_done(run, text, aim, chance, seconds, n_kills):
    """Kill a run up to n_kills times, then let it end. Returns kills that struck, of them those within a save, and the
    most steps that were lost at once."""
    kills = inside = lost = 0
    said = run.parent / f"{run.name}.said"
    while True:
        child = start(command(run, text), said, slow_disk=aim == AIMS[1])
        latest = 7 if n_kills < 7 else 2  # of a run that is killed often, each start may not get far
        code = strike(child, run, aim, chance, seconds, latest) if kills < n_kills else exit_code(child)
        if code == 0:
            return kills, inside, lost
        if code != -signal.SIGKILL:
            raise AssertionError(f"{run} left with {code}: {said.read_text()[-500:]}")
        kills += 1
        inside += any((run / "checkpoints").glob(".classiclm-tmp-*"))
        metrics = run / "metrics.jsonl"
        rows = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        found, _ = checkpoint.newest_valid(run)
        lost = max(lost, rows - (checkpoint.step_of(found) if found else 0))


def random_kills(trials, seed=0, again=1, chained=True):
    """The tally of `trials` runs, each killed `again` times, and of one that is killed ten times."""
    tally, chance = Tally(Counter()), random.Random(seed)
    with scratch() as base:
        folder = Path(base)
        text = folder / "text.txt"
        text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 80)
        exit_code(start(command(folder / "warm", text), folder / "warm.said"))
        began = time.monotonic()
        exit_code(start(command(folder / "whole", text), folder / "whole.said"))
        seconds, expected = time.monotonic() - began, outcome(folder / "whole")
        plans = [(AIMS[i % 2], again) for i in range(trials)] + [("inside a save", 10)] * chained
        for i, (aim, n_kills) in enumerate(plans):
            run = folder / f"run-{i}"
            kills, inside, lost = killed_until_done(run, text, aim, chance, seconds, n_kills)
            tally.cases["runs"] += 1
            tally.cases["kills"] += kills
            tally.cases["kills inside a save"] += inside
            tally.cases["most kills of one run"] = max(tally.cases["most kills of one run"], kills)
            tally.cases["most steps lost by a kill"] = max(tally.cases["most steps lost by a kill"], lost)
            if outcome(run) != expected:
                tally.losses.append(f"run {i}, killed {kills} times {aim}, ended otherwise than the one left alone")
            if lost > 5:
                tally.losses.append(f"run {i} lost {lost} steps at once")
    return tally


def simultaneous_starts(trials=1, n=10):
    """n starts of one run at once: the tally of those that ran, those that were refused, and of what was wrong."""
    tally = Tally(Counter())
    for _ in range(trials):
        with scratch() as base:
            folder = Path(base)
            text = folder / "text.txt"
            text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 80)
            children = {start(command(folder / "run", text, 100_000), folder / f"{i}.said"): i for i in range(n)}
            holder = _refuse_all_but_one(children, folder, tally)
            kill(holder)
            try:
                with locked(folder / "run"):
                    tally.cases["free after kill -9"] += 1
            except Exception as e:
                tally.losses.append(f"the lock of a killed process is not free: {e}")
    return tally


def _refuse_all_but_one(children, folder, tally):
    """Wait until one child is left, which must be the holder that all others name."""
    running, codes, began = set(children), {}, time.monotonic()
    while len(running) > 1 and time.monotonic() < began + 60:
        for child in list(running):
            code = exit_code(child, wait=False)
            if code is not None:
                codes[child] = code
                running.discard(child)
        time.sleep(0.005)
    holder, *more = running
    for child in more:
        kill(child)
    slowest = round(1000 * (time.monotonic() - began))
    tally.cases["slowest refusal, ms from the first start"] = slowest
    tally.cases["starts"] += len(children)
    tally.cases["refused"] += len(codes)
    if more:
        tally.losses.append(f"{len(running)} of {len(children)} starts run at once")
    for child, code in codes.items():
        words = (folder / f"{children[child]}.said").read_text()
        if code != RESOURCE or f"is in use by process {holder} on " not in words:
            tally.losses.append(f"a start left with {code}: {words[-300:]}")
    return holder
