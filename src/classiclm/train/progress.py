"""What a person sees while a run goes on, all of it on stderr: a live bar on a terminal, plain lines otherwise."""

import sys
import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

_WINDOW = 50  # updates that the speed is averaged over
_LINE_EVERY = 10.0  # seconds between plain lines


def say(message: str) -> None:
    """One line on stderr."""
    print(message, file=sys.stderr, flush=True)


class Clock:
    """Remaining time from a rolling window of (time, step), so that a pause or a slow start is soon forgotten."""

    def __init__(self, total: int):
        self.total = total
        self._marks: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def mark(self, step: int, now: float) -> float | None:
        """Seconds to go after `step`, None before there are two marks. `now` is any monotonic time in seconds."""
        self._marks.append((now, step))
        (then, first), (_, last) = self._marks[0], self._marks[-1]
        if last == first:
            return None
        return (self.total - step) * (now - then) / (last - first)


class ProgressLog:
    """Shows the rows of one run as they come. A context manager."""

    def __init__(self, label: str, total: int, start: int):
        self.label, self.clock = label, Clock(total)
        self._last_line = -_LINE_EVERY
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[row]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(label, total=total, completed=start, row="")

    def __enter__(self) -> "ProgressLog":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, row: dict[str, Any]) -> None:
        """One logged step."""
        now = time.monotonic()
        text = describe(row, self.clock.mark(row["step"], now))
        if self._bar:
            self._bar.update(self._task, completed=row["step"], row=text)
            if "val_loss" in row:
                self._bar.console.print(f"{self.label}: step {row['step']}/{self.clock.total} {text}", highlight=False)
        elif "val_loss" in row or now - self._last_line >= _LINE_EVERY:
            say(f"{self.label}: step {row['step']}/{self.clock.total} {text}")
            self._last_line = now


def describe(row: dict[str, Any], remaining: float | None) -> str:
    """A row in words: loss, validation loss, speed, time to go."""
    parts = [f"loss {row['loss']:.4f}"]
    if "val_loss" in row:
        parts.append(f"val {row['val_loss']:.4f}")
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if remaining is not None:
        parts.append(f"{format_seconds(remaining)} to go")
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """42 s, 3:07 min or 1:02:09 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"
