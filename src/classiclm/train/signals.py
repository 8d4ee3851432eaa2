"""SIGINT, SIGTERM and SIGUSR1: a loop of training ends after the step in hand and a save, all else where it stands.

SIGUSR1 is what Slurm sends ahead of the end of a job (`--signal=B:USR1@120`).

`stop_requests` is for a loop that has something to save: it only notes the signal. `interruptible` is for all else,
whose files are whole or absent at every instant: it unwinds as Ctrl-C does. In both, a second signal ends the process
at once, and so does the end of patience. A thread sees to that, for Python itself hears of a signal only when the main
thread is back from what it called: a flush to a slow disk, a collective operation whose other side is dead.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

ASKING = [number for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (number := getattr(signal, name, None)) is not None]
_ONE_SIGNAL = 0.25  # seconds: `timeout` and other launchers signal a process and then its group, which is one request
_UNWINDING = 1.0  # seconds for leaving a command that has nothing to save
_CURSOR = "\x1b[?25h"  # makes a terminal show it again


class StopRequest:
    """The signal that asks to end, None as long as there is none."""

    number: int | None = None


def farewell(number: int) -> str:
    """What to say of a process that was stopped by this signal, and what to do next."""
    return f"stopped by signal {number}; what was finished is kept, and the same command goes on from there"


@contextmanager
def stop_requests(request: StopRequest, patience: float | None = None) -> Iterator[None]:
    """Note the first signal in `request`.

    patience: seconds from then after which the process ends anyway, as if it had been killed: for launchers that kill
    soon after they ask, from whose kill no message would come. None = as long as it takes.
    """
    with _heard(request, lambda frame: None, patience, None):
        yield


@contextmanager
def interruptible(request: StopRequest, afterwards: signal.Handlers | None = None) -> Iterator[None]:
    """The first signal is noted and raises KeyboardInterrupt; a process that this has not ended soon is ended.

    afterwards: how signals are handled behind the block; None = as before.
    """
    old_hook = sys.unraisablehook

    def interrupt(frame: FrameType | None) -> None:
        if _is_importing(frame):  # where extension modules take it for an error of their own, and print it
            _leave(request.number or 0)
        raise KeyboardInterrupt

    def hook(unraisable: Any) -> None:
        """Raised in a finaliser or the like, from which nothing is passed on."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt) and request.number is not None:
            _leave(request.number)
        old_hook(unraisable)

    sys.unraisablehook = hook
    try:
        with _heard(request, interrupt, _UNWINDING, afterwards):
            yield
    finally:
        sys.unraisablehook = old_hook


@contextmanager
def _heard(
    request: StopRequest,
    act: Callable[[FrameType | None], None],
    patience: float | None,
    afterwards: signal.Handlers | None,
) -> Iterator[None]:
    """Handle signals by noting the first and acting on it, under watch. Blocks may be nested: the inner one hears."""
    request.number = None
    if threading.current_thread() is not threading.main_thread():  # signals stay with whoever owns it
        yield
        return
    is_over = False

    def note(number: int, frame: FrameType | None) -> None:
        if request.number is None and not is_over:
            request.number = number
            act(frame)

    with _Watch(patience):
        old = {number: signal.signal(number, note) for number in ASKING}
        try:
            yield
        finally:
            is_over = True
            for number, handler in old.items():
                signal.signal(number, handler if afterwards is None else afterwards)


class _Watch(threading.Thread):
    """Ends the process `patience` seconds after the first signal, or at a second one."""

    def __init__(self, patience: float | None):
        super().__init__(name="signals", daemon=True)
        self._patience = math.inf if patience is None else patience
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)

    def __enter__(self) -> None:
        self.start()
        self._old = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old)
        self._mouth.close()
        self.join()
        self._ear.close()

    def run(self) -> None:
        """Listen until the other end is closed."""
        if hasattr(signal, "pthread_sigmask"):  # a thread that were handed signals would take them from who holds them
            signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        first, began = self._next(math.inf), time.monotonic()
        while first is not None:
            number = self._next(began + self._patience - time.monotonic())
            if number is None:
                return
            if number == 0 or time.monotonic() - began > _ONE_SIGNAL:
                _leave(number or first)

    def _next(self, seconds: float) -> int | None:
        """The next signal; 0 if none comes in time, None at the end."""
        give_up = time.monotonic() + seconds
        while True:
            left = give_up - time.monotonic()
            self._ear.settimeout(None if left == math.inf else max(left, 1e-3))
            try:
                heard = self._ear.recv(1)
            except TimeoutError:
                return 0
            if not heard:
                return None
            if heard[0] in ASKING:  # others may have handlers too
                return heard[0]


def _leave(number: int) -> NoReturn:
    """End as if killed: files in the making have other names than finished ones, and the next start sweeps them."""
    shown = _CURSOR if os.isatty(2) else ""
    os.write(2, f"{shown}{farewell(number)}\n".encode())
    os._exit(128 + number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_globals.get("__name__") != "importlib._bootstrap":
        frame = frame.f_back
    return frame is not None


def _be_deaf() -> None:
    signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):  # or the signals of a child would be heard by its parent
    os.register_at_fork(after_in_child=_be_deaf)
