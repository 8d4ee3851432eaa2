"""Commands from their start to their end, as somebody who types them waits for them."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import fixtures
from benchmarks.turns import Turns
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
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}

    peaks: list[int] = []

    def unit() -> dict[str, float]:
        began = time.perf_counter()
        with Path("stderr").open("w+") as said:
            child = subprocess.Popen(
                [sys.executable, *words], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said
            )
            _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise RuntimeError((Path("stderr").read_text().strip().splitlines() or ["failed"])[-1])
        peaks.append(usage.ru_maxrss << 10)
        return {"command": seconds}

    for _ in range(turns.warm_up):
        unit()
    turns.ready(note=options.get("note", ""))
    while turns.wait():
        turns.done(unit(), peak=max(peaks))


def _place(word: str, work: Work, folder: Path) -> str | Path:
    if word == "RUN":
        return fixtures.need("run", work, folder)
    if word == "EXPORT":
        return fixtures.need("run", work, folder) / "hf"
    return THEIRS if word == "THEIRS" else word
