"""One contender's process: `python -m benchmarks.worker`, started by the harness.

The first line of stdin says what to do, as JSON. The harness reads stdout, so whatever libraries print goes to stderr.
"""

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.turns import Turns
from benchmarks.work import Work


def main() -> None:
    """Be the contender until stdin ends. Every failure is one line for the report."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    turns = Turns(sys.stdin, answers, Path(job["folder"]), job["warm_up"], job["threads"], job.get("profiling", False))
    try:
        run(job, turns)
    except Exception as e:
        turns.failed(in_a_line(e))
        raise


def run(job: dict, turns: Turns) -> None:
    """Call the function that `target` names, "file:function" of contenders/."""
    module, _, function = job["target"].partition(":")
    contender = getattr(importlib.import_module(f"benchmarks.contenders.{module}"), function)
    with tempfile.TemporaryDirectory(dir=turns.folder) as own:
        os.chdir(own)
        use_threads(turns.threads)
        contender(Work(**job["work"]), job["options"], turns)


def use_threads(n: int) -> None:
    """Tell torch, if it is there."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(n)


def in_a_line(e: BaseException) -> str:
    """The kind of an exception and the beginning of what it says."""
    said = " ".join(str(e).split())
    kind = type(e).__name__
    return (said if kind == "Missing" else f"{kind}: {said}")[:300]


if __name__ == "__main__":
    main()
