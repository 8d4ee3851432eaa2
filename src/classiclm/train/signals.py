"""SIGINT and SIGTERM as requests: a loop ends after the step in hand, and a save."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """The signal that asks a loop to end, None as long as there is none."""

    number: int | None = None


@contextmanager
def stop_requests(request: StopRequest) -> Iterator[None]:
    """Note signals in `request`; a second one ends the process at once, as KeyboardInterrupt."""
    request.number = None

    def note(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            raise KeyboardInterrupt
        request.number = number

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals stay with whoever owns it
        old = {}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
