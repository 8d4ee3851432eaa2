"""The child's side of the harness: it says that it is ready, waits for its turn, works, says how long it took.

Both directions are lines: "go" from the harness, JSON to it. Waiting is a blocking read, which takes no processor time.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

LEAST = 1e-6  # seconds, where a difference of two toys is lost in noise

Seconds = dict[str, float]  # by measure, such as {"decode": 1.2, "prefill": 0.1}


class Missing(Exception):
    """This contender cannot take part here, and why."""


class Turns:
    """The turns of one contender. `folder` is for files that contenders share; `profiling` asks for where time goes."""

    def __init__(
        self, orders: TextIO, answers: TextIO, folder: Path, warm_up: int = 2, threads: int = 1, profiling: bool = False
    ):
        self._orders, self._answers = orders, answers
        self.folder, self.warm_up, self.threads, self.profiling = folder, warm_up, threads, profiling
        self._base = resident()["VmRSS"]

    def imported(self) -> None:
        """Libraries are loaded: memory counts from here."""
        self._base = resident()["VmRSS"]

    def ready(self, n_params: int | None = None, note: str = "", **facts: Any) -> None:
        """Preparation is over. note: what the report says of this contender beside its numbers."""
        self._say(event="ready", n_params=n_params, note=note, **facts)

    def wait(self) -> bool:
        """Until it is this contender's turn; False when there will be none any more."""
        return self._orders.readline().strip() == "go"

    def done(self, seconds: Seconds, **facts: Any) -> None:
        """The turn is over. Peak memory goes along unless `facts` has another one."""
        peak = max(0, resident()["VmHWM"] - self._base)
        self._say(event="done", seconds=seconds, **{"peak": peak, **facts})

    def failed(self, why: str) -> None:
        """This contender is out."""
        self._say(event="failed", why=why)

    def serve(
        self,
        unit: Callable[[], Seconds | None],
        n_params: int | None = None,
        note: str = "",
        measure: str = "step",
        **facts: Any,
    ) -> None:
        """Warm up, then a unit per turn. A unit that returns nothing is timed from outside, under `measure`."""
        for _ in range(self.warm_up):
            unit()
        self.ready(n_params, note, **facts)
        while self.wait():
            began = time.perf_counter()
            seconds = unit()
            self.done(seconds or {measure: time.perf_counter() - began})

    def _say(self, **message: Any) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


def resident() -> dict[str, int]:
    """VmRSS and VmHWM of this process in bytes: resident memory, now and at its highest; 0 where Linux is not."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields.get(name, "0 kB").split()[0]) << 10 for name in ("VmRSS", "VmHWM")}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def decoding(write: Callable[[int], Any], new_tokens: int) -> Callable[[], Seconds]:
    """The unit of a case that writes: `write(n)` continues the prompt by n tokens.

    n new tokens are one pass over the prompt, the prefill, and n - 1 steps; so new_tokens + 2 of them less 2 of them
    are new_tokens steps.
    """

    def unit() -> Seconds:
        prefill, _ = timed(lambda: write(1))
        short, _ = timed(lambda: write(2))
        long, _ = timed(lambda: write(new_tokens + 2))
        return {"decode": max(long - short, LEAST), "prefill": prefill}

    return unit
