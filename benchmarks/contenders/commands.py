"""Commands from their start to their end, as somebody who types them waits for them."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import fixtures
from benchmarks.turns import Missing, Turns, resident
from benchmarks.work import Work

THEIRS = """
import sys
from transformers import AutoTokenizer, GPT2LMHeadModel
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = GPT2LMHeadModel.from_pretrained(sys.argv[1])
tokens = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=1, do_sample=False)[0]))
"""


def command(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """A process of this interpreter; RUN and EXPORT in its words are a run of ours and its export."""
    words = [str(_place(word, work, turns.folder)) for word in options["words"]]
    for _ in range(turns.warm_up):
        run(words)
    turns.ready(note=options.get("note", ""))
    while turns.wait():
        ran = run(words)
        first = {} if ran.first is None else {"first output": ran.first}
        turns.done({"command": ran.seconds, **first}, peak=ran.peak)


def recipe(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """A whole recipe of ours on Shakespeare, in each round from another seed, and the loss that it ends with."""
    words = ["-m", "classiclm", "train", options["preset"], "--data", "shakespeare", "--device", "cpu", "--out", "run"]
    words += ["--steps", str(options["steps"])] if options["steps"] else []
    _need_shakespeare()
    turns.ready(note=options["note"])
    seed = 0
    while turns.wait():
        seed += 1
        shutil.rmtree("run", ignore_errors=True)
        ran = run([*words, "--seed", str(seed)])
        last = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[-1])
        turns.done({"recipe": ran.seconds}, peak=ran.peak, loss=last["val_loss"])


def _need_shakespeare() -> None:
    """Raises Missing where the text is neither at hand nor to be had."""
    from classiclm.data.corpora import Data, read_documents
    from classiclm.errors import Error

    try:
        read_documents(Data("shakespeare"))
    except Error as e:
        raise Missing(str(e)) from e


class Ran(NamedTuple):
    """Seconds to the end of a process and to the first byte on its stdout, and its peak memory in bytes."""

    seconds: float
    first: float | None  # None: it said nothing
    peak: int | None  # None: not known


def run(words: list[str], folder: Path | None = None) -> Ran:
    """A process of this interpreter, from start to end. Raises RuntimeError with its last line.

    Linux counts what this process had when it started the other one as the other's: below that, nothing is known.
    """
    own = resident()["VmHWM"]
    began = time.perf_counter()
    with Path("stderr").open("w+") as said:
        child = subprocess.Popen(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            bufsize=0,
        )
        assert child.stdout is not None
        first = time.perf_counter() - began if child.stdout.read(1) else None
        child.stdout.read()
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError((Path("stderr").read_text().strip().splitlines() or ["failed"])[-1])
    peak = usage.ru_maxrss << 10
    return Ran(seconds, first, peak if peak > own else None)


def _place(word: str, work: Work, folder: Path) -> str | Path:
    if word == "RUN":
        return fixtures.need("run", work, folder)
    if word == "EXPORT":
        return fixtures.need("run", work, folder) / "hf"
    return THEIRS if word == "THEIRS" else word
