"""Every process shows that it lives, and ends when another one does not.

A collective operation waits for all processes, so one that has died or stands still would keep the others waiting,
on some backends for ever. Here each writes a beat into the store they share, twice a second and from a thread of its
own; each watches the next one in a ring, which costs the store the same for every process. Whoever finds its
neighbour silent writes down who and when, all read it, and all leave with exit code 6.

The thread has to end the process by itself (`os._exit`): the main thread is inside the operation that will not return.
What has to outlive a process is published by rename (files.py), so this is no worse than a kill.
"""

import json
import os
import signal
import threading
import time
from typing import Any, NoReturn

from classiclm.errors import DISTRIBUTED, Error
from classiclm.train.progress import say

_BEAT = 0.5  # seconds between two signs of life
_GRACE = 2.5  # seconds of silence that are enough once an operation has failed; and to say one's own last words


class Heartbeat:
    """The thread of one process; `step` is what the others are told. A context manager.

    A process that leaves by an exception has failed by itself, unless another is found silent: then it was that one.
    """

    def __init__(self, store: Any, rank: int, size: int, timeout: float):
        self.step = 0
        self._store, self._rank, self._timeout = store, rank, timeout
        self._neighbour, self._neighbours_step = (rank + 1) % size, 0
        self._sign = ""  # the neighbour's last
        self._patience = timeout + _GRACE  # with the store
        self._heard = self._reached = time.monotonic()  # the neighbour, and the store
        self._end = threading.Event()

    def __enter__(self) -> "Heartbeat":
        for run in (self._beat, self._watch_store):
            threading.Thread(target=run, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, _: object) -> None:
        if e is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it at once to who is left: last words first
        if isinstance(e, RuntimeError):  # as of an operation that another has not taken part in
            self._write("trouble", "1")
            time.sleep(2 * (_GRACE + _BEAT))  # if so, the thread ends the process
        if e is not None:
            why = str(e) if isinstance(e, Error) else f"{type(e).__name__}: {e}"
            self._report(self._rank, self.step, " ".join(why.split()))
            time.sleep(3 * _BEAT if self._rank == 0 else 0)  # it may keep the store, which the others have yet to read
        self._end.set()

    def _beat(self) -> None:
        """Say that this process lives, hear whether all others do; end the process if not."""
        count = 0
        while not self._end.wait(_BEAT):
            count += 1
            try:
                self._store.set(f"beat/{self._rank}", f"{count} {self.step}")
                failure = self._failure()
            except RuntimeError:  # the store is gone, and with it whoever kept it
                self._patience = _GRACE
                continue
            self._reached = time.monotonic()
            if failure and failure["rank"] != self._rank:
                self._end.wait(_GRACE)  # this process may be about to say the same of itself
                if not self._end.is_set():
                    _leave(failure)

    def _failure(self) -> dict[str, Any] | None:
        """Who has failed, as far as anybody knows."""
        if self._store.check([f"beat/{self._neighbour}"]):
            self._listen(self._store.get(f"beat/{self._neighbour}").decode())
        silent = time.monotonic() - self._heard
        if silent > (_GRACE if self._store.check(["trouble"]) else self._timeout):
            step = max(self.step, self._neighbours_step)  # they go together, and its last beat may be a step ago
            self._report(self._neighbour, step, f"gave no sign of life for {silent:.0f} s")
        return json.loads(self._store.get("failure")) if self._store.check(["failure"]) else None

    def _listen(self, sign: str) -> None:
        if sign != self._sign:
            self._sign, self._heard = sign, time.monotonic()
            self._neighbours_step = int(sign.split()[1])

    def _report(self, rank: int, step: int, why: str) -> None:
        """Write down a failure; the first one stays."""
        self._write("failure", json.dumps({"rank": rank, "step": step, "why": why}))

    def _write(self, key: str, value: str) -> None:
        try:
            self._store.compare_set(key, "", value)
        except RuntimeError:
            say(
                f"warning: rank {self._rank} cannot tell the other processes why it ends: their store is gone",
                everywhere=True,
            )

    def _watch_store(self) -> None:
        """The store may be kept by a process that is stopped: then a call of `_beat` does not even return."""
        while not self._end.wait(_BEAT):
            silent = time.monotonic() - self._reached
            if silent > self._patience:
                why = f"does not answer for {silent:.0f} s, and it keeps the store that all others need"
                _leave({"rank": 0, "step": self.step, "why": why})


def _leave(failure: dict[str, Any]) -> NoReturn:
    fix = "see that process's own messages; the same command goes on from the last checkpoint"
    error = Error(f"rank {failure['rank']}", f"step {failure['step']}: {failure['why']}", fix, DISTRIBUTED)
    say(f"error: {error}", everywhere=True)
    os._exit(DISTRIBUTED)
