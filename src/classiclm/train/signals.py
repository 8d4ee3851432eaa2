"""SIGINT, SIGTERM and SIGUSR1 as requests: a loop ends after the step in hand, and a save.

SIGUSR1 is what Slurm sends ahead of the end of a job (`--signal=B:USR1@120`).
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ASKING = [number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)) is not None]


class StopRequest:
    """The signal that asks a loop to end, None as long as there is none."""

    number: int | None = None


@contextmanager
def stop_requests(request: StopRequest, patience: float | None = None) -> Iterator[None]:
    """Note signals in `request`; a second one ends the process at once, as KeyboardInterrupt.

    patience: seconds from the first signal after which the process ends anyway, as if it had been killed: for launchers
    that kill soon after they ask, from whose kill no message would come. None = as long as it takes.
    """
    request.number = None
    watchdog: list[threading.Timer] = []

    def note(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            raise KeyboardInterrupt
        request.number = number
        if patience is not None:
            watchdog.append(threading.Timer(patience, os._exit, [128 + number]))
            watchdog[0].daemon = True
            watchdog[0].start()

    try:
        old = {number: signal.signal(number, note) for number in ASKING}
    except ValueError:  # not in the main thread: signals stay with whoever owns it
        old = {}
    try:
        yield
    finally:
        for timer in watchdog:
            timer.cancel()
        for number, handler in old.items():
            signal.signal(number, handler)
