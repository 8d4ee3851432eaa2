"""What a person sees while a run goes on, all of it on stderr: a live view on a terminal, plain lines otherwise."""

import itertools
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Row = dict[str, Any]  # of metrics.jsonl

_WINDOW = 50  # updates that the speed is averaged over
_LINE_EVERY = 10.0  # seconds between plain lines
_FRAME_EVERY = 0.25  # seconds between pictures: drawing takes milliseconds, and a small model's step does, too
_SPARKS = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS = "_.-=+*#@"  # for a terminal that has no others
_SPARK_WIDTH = 30
_SAMPLE_WIDTH = 100  # characters of a sample that are shown


def say(message: str, everywhere: bool = False) -> None:
    """One line on stderr; of several processes only the first speaks, unless it is said everywhere."""
    if everywhere or os.environ.get("RANK", "0") == "0":
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


@dataclass
class History:
    """What the view needs of all rows so far, without keeping them."""

    losses: list[float] = field(default_factory=list)
    last: Row = field(default_factory=dict)
    val_loss: float | None = None  # the latest
    best: tuple[float, int] | None = None  # lowest validation loss, and its step

    def add(self, row: Row) -> None:
        """One more logged step."""
        self.losses.append(math.nan if row["loss"] is None else row["loss"])
        self.last = row
        if "val_loss" in row:
            self.val_loss = row["val_loss"]
            here = (row["val_loss"], row["step"])
            self.best = min(self.best, here) if self.best else here


@dataclass(frozen=True)
class Gauges:
    """What the rows do not say. Whatever is None is not shown."""

    flops_per_token: float | None = None  # of the model, forward and backward
    peak: float | None = None  # FLOPs/s of matrix products that the machine is known to reach
    memory: Callable[[], int | None] | None = None  # bytes in use now

    def share(self, tokens_per_s: float) -> float | None:
        """Which part of the machine's peak the model's own arithmetic takes."""
        if self.flops_per_token is None or self.peak is None:
            return None
        return tokens_per_s * self.flops_per_token / self.peak


class ProgressLog:
    """Shows the rows of one run as they come. A context manager.

    The run goes on from step `start`; `rows` are those of earlier calls, for the curve. `shown` is False on all
    processes but the first.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int,
        rows: Sequence[Row] = (),
        gauges: Gauges = Gauges(),
        shown: bool = True,
        console: Console | None = None,
    ):
        self.label, self.start, self.clock, self.gauges, self.shown = label, start, Clock(total), gauges, shown
        self._last_line = self._last_frame = -math.inf
        self._history = History()
        for row in rows:
            self._history.add(row)
        self._console = console or Console(stderr=True)
        self._live: Live | None = None
        if shown and self._console.is_terminal:
            # No thread that redraws: a picture is made when there is news. stdout stays what it is, for products.
            self._live = Live(console=self._console, auto_refresh=False, transient=True, redirect_stdout=False)

    def __enter__(self) -> "ProgressLog":
        if self._live:
            self._live.start()
            self._draw(self.start, None)  # the first row may be minutes away: a model is compiled, a batch is large
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, row: Row) -> None:
        """One logged step."""
        if not self.shown:
            return
        now = time.monotonic()
        remaining = self.clock.mark(row["step"], now)
        line = f"{self.label}: step {row['step']}/{self.clock.total} {describe(row, remaining)}"
        if self._live is None:
            if "val_loss" in row or now - self._last_line >= _LINE_EVERY:
                say(line)
                self._last_line = now
            return
        self._history.add(row)
        if "val_loss" in row:
            self._console.print(line, highlight=False, markup=False)
        if "val_loss" in row or now - self._last_frame >= _FRAME_EVERY:
            self._draw(row["step"], remaining)
            self._last_frame = now

    def wrote(self, step: int, text: str) -> None:
        """The first line of a sample that has a letter or a sign in it."""
        line = next((line for line in text.splitlines() if line.strip()), "(white space)")
        if self.shown:
            say(f"{self.label}: step {step}/{self.clock.total} writes: {_printable(line)}")

    def _draw(self, step: int, remaining: float | None) -> None:
        if self._live:
            ascii_only = self._console.options.ascii_only
            picture = view(self.label, step, self.clock.total, self._history, remaining, self.gauges, ascii_only)
            self._live.update(picture, refresh=True)


def view(
    label: str,
    step: int,
    total: int,
    history: History,
    remaining: float | None,
    gauges: Gauges = Gauges(),
    ascii_only: bool = False,
) -> RenderableType:
    """The live picture: how far; and after the first row how good and how fast, a line each."""
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True)
    to_go = "" if remaining is None else f"  {format_seconds(remaining)} to go"
    bar.add_row(Text(label), ProgressBar(total=total, completed=step), Text(f"{step:,}/{total:,} steps{to_go}"))
    lines = Table.grid(expand=True)
    lines.add_row(bar)
    if history.last:
        lines.add_row(Text(_how_good(history, ascii_only), no_wrap=True, overflow="ellipsis"))
        lines.add_row(Text(_how_fast(history.last, gauges), no_wrap=True, overflow="ellipsis"))
    return lines


def _how_good(history: History, ascii_only: bool) -> str:
    curve = sparkline(history.losses, _SPARK_WIDTH, _ASCII_SPARKS if ascii_only else _SPARKS)
    parts = [f"{_loss(history.last)} {curve}"]
    if history.val_loss is not None and history.best is not None:
        parts.append(f"val {history.val_loss:.4f} (best {history.best[0]:.4f} at step {history.best[1]:,})")
    return "  ".join(parts)


def _how_fast(row: Row, gauges: Gauges) -> str:
    parts = [f"{row['tokens_per_s']:,.0f} tokens/s"]
    share = gauges.share(row["tokens_per_s"])
    if share is not None:
        parts.append(f"{share:.1%} of this machine's peak")
    in_use = gauges.memory() if gauges.memory else None
    if in_use is not None:
        parts.append(f"{format_bytes(in_use)} in use")
    return ", ".join(parts)


def sparkline(values: Sequence[float], width: int, sparks: str = _SPARKS) -> str:
    """A curve in one line of at most `width` characters: [3, 2, 1] -> "█▄▁". Each character is the mean of its share
    of the values; one that is not finite leaves a gap."""
    n = min(width, len(values))
    edges = [i * len(values) // n for i in range(n + 1)] if n else []
    means = [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    scale = (len(sparks) - 1) / (high - low) if high > low else 0.0
    return "".join(sparks[round((mean - low) * scale)] if math.isfinite(mean) else " " for mean in means)


def describe(row: Row, remaining: float | None) -> str:
    """A row in words: loss, validation loss, speed, time to go."""
    parts = [_loss(row)]
    if "val_loss" in row:
        parts.append(f"val {row['val_loss']:.4f}")
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if remaining is not None:
        parts.append(f"{format_seconds(remaining)} to go")
    return ", ".join(parts)


def _loss(row: Row) -> str:
    return "loss not finite" if row["loss"] is None else f"loss {row['loss']:.4f}"


def _printable(line: str) -> str:
    """A line of anything for a terminal, which would obey control characters; cut to a length."""
    shown = "".join(c if c.isprintable() else " " for c in line).strip()
    return shown if len(shown) <= _SAMPLE_WIDTH else f"{shown[: _SAMPLE_WIDTH - 3]}..."


def format_seconds(seconds: float) -> str:
    """42 s, 3:07 min or 1:02:09 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d} h"


def format_bytes(n: int) -> str:
    """812 MiB or 1.2 GiB."""
    return f"{n / 2**20:.0f} MiB" if n < 2**30 else f"{n / 2**30:.1f} GiB"
