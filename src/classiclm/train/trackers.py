"""The rows of a run in W&B or TensorBoard as well, for whoever names one. metrics.jsonl stays the truth.

A tracker is given the rows that stand, those of metrics.jsonl up to the checkpoint, and makes its own files hold just
these before it goes on: after a kill no step is there twice and none is missing, and a tracker that was named late has
the whole history. Samples (samples.py) are rows of their own, {"step": 250, "sample": "..."}, and come as text. It
works in a thread of its own and can neither stop nor slow a run: whatever goes wrong in it, also that it hangs, is one
warning, and the run goes on without it.

    wandb        RUN/wandb, offline if nobody is logged in or WANDB_MODE=offline; `wandb sync` sends it later
    tensorboard  RUN/tensorboard; `tensorboard --logdir RUN/tensorboard` shows it
"""

import importlib
import json
import os
import queue
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from classiclm.extras import need
from classiclm.files import make_folder, write_file
from classiclm.train.progress import say

Row = dict[str, Any]  # of metrics.jsonl, or a sample
Name = Literal["none", "wandb", "tensorboard"]

_PATIENCE = 60.0  # seconds that one answer of a tracker may take at the end of a run
_WAITING = 50_000  # rows that may wait for a tracker


class Sink(Protocol):
    """Where rows go. Each call may fail or block as it likes."""

    def log(self, row: Row) -> None:
        """One more row."""

    def close(self, failed: bool) -> None:
        """No more rows; `failed` if an error ended the run."""


class Tracker:
    """What the trainer sees: a context manager that takes rows and never raises. This one drops them ("none")."""

    def log(self, row: Row) -> None:
        """One logged step, as in metrics.jsonl. Returns at once."""

    def close(self, failed: bool) -> None:
        """No more rows; waits for what is on its way, for a limited time."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


class Background(Tracker):
    """Feeds a sink from a thread of its own. The first fault switches it off, with one warning."""

    def __init__(self, name: str, make: Callable[[], Sink], patience: float = _PATIENCE, waiting: int = _WAITING):
        self.name, self.patience = name, patience
        self._rows: queue.Queue[Row | bool] = queue.Queue(waiting)  # a boolean ends it: has the run failed?
        self._is_off, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, args=(make,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """One logged step. A tracker that is too far behind is taken to hang."""
        self._put(dict(row))

    def close(self, failed: bool) -> None:
        """Waits up to `patience` seconds; what has not arrived by then can be had from metrics.jsonl."""
        self._put(failed)
        if not self._is_off:
            self._thread.join(self.patience)
            if self._thread.is_alive():
                self._switch_off(f"it has not finished within {self.patience:.0f} s")

    def _put(self, item: Row | bool) -> None:
        try:
            if not self._is_off:
                self._rows.put_nowait(item)
        except queue.Full:
            self._switch_off(f"{self._rows.maxsize} rows wait for it")

    def _work(self, make: Callable[[], Sink]) -> None:
        try:
            sink = make()
            while not isinstance(item := self._rows.get(), bool):
                sink.log(item)
            sink.close(item)
        except BaseException as e:  # packages are known to leave by SystemExit, too
            self._switch_off((str(e).strip() or type(e).__name__).splitlines()[0])

    def _switch_off(self, why: str) -> None:
        with self._lock:
            if not self._is_off:
                self._is_off = True
                say(f"warning: tracker {self.name} is off: {why} (the run goes on; metrics.jsonl has every row)")


class WandB:
    """Weights & Biases, under one run id for the life of the folder (RUN/tracker.json)."""

    def __init__(self, run: Path, config: dict[str, Any], rows: Sequence[Row]):
        wandb = need("wandb", "track")
        name = run.resolve().name
        run_id = _run_id(run)
        # An offline file cannot be cut; it is made anew, from the rows that stand.
        for old in (run / "wandb").glob(f"offline-run-*-{run_id}*"):
            shutil.rmtree(old, ignore_errors=True)
        settings = wandb.Settings(console="off", silent=True, init_timeout=_PATIENCE, finish_timeout=_PATIENCE / 2)
        wandb.setup(settings)
        # Never ask at the keyboard for a key in the middle of a training.
        mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
        project = os.environ.get("WANDB_PROJECT", "classiclm")
        self._run = wandb.init(
            dir=str(run), id=run_id, name=name, project=project, config=config, resume="allow", mode=mode
        )
        self._first = self._run.step  # online, the server may have rows already; those done again are equal
        for row in rows:
            self.log(row)

    def log(self, row: Row) -> None:
        """Under the row's own step. W&B takes steps in order only, so what it has already is not sent again."""
        if row["step"] >= self._first:
            self._run.log({key: value for key, value in row.items() if value is not None}, step=row["step"])

    def close(self, failed: bool) -> None:
        """Mark the run as finished or failed."""
        self._run.finish(exit_code=int(failed))


def _run_id(run: Path) -> str:
    """The id of this folder, made at the first call. Not in a checkpoint: equal weights are to be equal bytes there."""
    path = run / "tracker.json"
    if path.is_file():
        return str(json.loads(path.read_bytes())["wandb"])
    run_id = uuid.uuid4().hex[:8]
    write_file(path, json.dumps({"wandb": run_id}).encode())
    return run_id


class TensorBoard:
    """Event files, through the tensorboard package alone (torch's writer would import much more for the same bytes).

    Numbers are rounded to fp32 there, and "step" is not one of them but the place of the others.
    """

    def __init__(self, run: Path, config: dict[str, Any], rows: Sequence[Row]):
        need("tensorboard", "track")
        self._proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._summary = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        records = importlib.import_module("tensorboard.summary.writer.record_writer")
        self._seconds = 0.0  # of the last row that had them: a sample has none
        self._began = time.time() - max((row.get("seconds", 0.0) for row in rows), default=0.0)
        folder = make_folder(run / "tensorboard")
        old = list(folder.glob("events.out.tfevents.*"))
        # A new file rather than a new end of the old one, which a reader may have open.
        self._writer = records.RecordWriter((folder / f"events.out.tfevents.{time.time():.6f}").open("xb"))
        self._write(file_version="brain.Event:2")
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._write(session_log=start, step=0)  # a TensorBoard that is looking forgets what it had of later steps
        self._write(summary=self._summary.Summary(value=[self._text("config", json.dumps(config, indent=2))]))
        for row in rows:
            self._add(row)
        self._writer.flush()
        for path in old:
            # Emptied, and deleted the next time: a TensorBoard that has it open would not go on from a lost file.
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()

    def log(self, row: Row) -> None:
        """One event, on the disk at once."""
        self._add(row)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()

    def _add(self, row: Row) -> None:
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
        values = [self._summary.Summary.Value(tag=key, simple_value=number) for key, number in numbers.items()]
        values += [self._text(key, text) for key, text in row.items() if isinstance(text, str)]
        self._seconds = row.get("seconds", self._seconds)
        wall_time = self._began + self._seconds
        self._write(summary=self._summary.Summary(value=values), step=row["step"], wall_time=wall_time)

    def _text(self, tag: str, text: str) -> Any:
        """A value for the text page; four spaces make it a block of code there."""
        tensor = importlib.import_module("tensorboard.compat.proto.tensor_pb2").TensorProto
        types = importlib.import_module("tensorboard.compat.proto.types_pb2")
        block = "\n".join(f"    {line}" for line in text.splitlines())
        metadata = self._summary.SummaryMetadata(
            plugin_data=self._summary.SummaryMetadata.PluginData(plugin_name="text")
        )
        value = tensor(dtype=types.DT_STRING, string_val=[block.encode()])
        return self._summary.Summary.Value(tag=tag, metadata=metadata, tensor=value)

    def _write(self, wall_time: float | None = None, **content: Any) -> None:
        event = self._proto.Event(wall_time=wall_time or self._began, **content)
        self._writer.write(event.SerializeToString())


_SINKS: dict[str, Callable[[Path, dict[str, Any], Sequence[Row]], Sink]] = {"wandb": WandB, "tensorboard": TensorBoard}


def make_tracker(name: Name, run: Path, config: dict[str, Any], rows: Sequence[Row]) -> Tracker:
    """The tracker of that name for the folder `run`. `config` is what config.yaml holds, `rows` are those that stand:
    what `Metrics.cut_behind` returns, none for a new run. Only the first of many processes should name one."""
    if name == "none":
        return Tracker()
    sink, standing = _SINKS[name], [dict(row) for row in rows]
    return Background(name, lambda: sink(run, config, standing))
