"""The one training loop. It knows contracts (a model, an objective, batches by step), never a paper.

Exactness by structure: the learning rate, the batch and the seed of dropout are functions of the step, so the state of
a run is its weights, its moments and one number. On resume: read the newest valid checkpoint, cut the metrics behind
its step, go on.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from classiclm.config import to_yaml
from classiclm.data.batches import Batch, rows_of
from classiclm.errors import BAD_INPUT, DIVERGED, RESOURCE, Error
from classiclm.files import locked
from classiclm.objectives import Measured, Objective
from classiclm.optim import make_optimizer
from classiclm.train import checkpoint
from classiclm.train.compiling import Compiled
from classiclm.train.distributed import World, distribute, measure_share, share
from classiclm.train.gauges import known_peak, memory_in_use
from classiclm.train.machine import Plan, autocast
from classiclm.train.progress import Gauges, ProgressLog, say
from classiclm.train.recompute import recompute_blocks
from classiclm.train.run import Metrics, check_config, write_config, write_environment
from classiclm.train.samples import FOLDER as SAMPLES
from classiclm.train.samples import Sampler, Write
from classiclm.train.savers import AsyncSaver, Saver
from classiclm.train.settings import TrainConfig
from classiclm.train.signals import StopRequest, stop_requests
from classiclm.train.step import Outcome, Stepper
from classiclm.train.trackers import Tracker, make_tracker

_PATIENCE = 25.0  # seconds from a signal to the end; torchrun kills 30 seconds after it asks
_SMALLEST_SCALE = 1e-3  # fp16: a scaler that has come down so far will not find a scale that works


@dataclass(frozen=True)
class Task:
    """What is learnt: batches by step, the validation batches, and what has to travel with the weights."""

    objective: Objective
    batches: Callable[[int], Batch]  # step 0, 1, ... -> its batch
    n_tokens: Callable[[Batch], int]  # how many tokens of a batch count as seen
    validation: Callable[[int | None], Iterable[Batch]]  # number of windows, None = all
    validated: Objective  # what is measured on them
    tokens_per_byte: float | None  # of the validation text; None where bits per byte have no meaning
    fingerprint: str  # of the training data
    files: dict[str, str] = field(default_factory=dict)  # name -> text, saved with each checkpoint
    parts: Callable[[Batch, int], Iterable[Batch]] = rows_of  # a batch in micro-batches of the given size
    sample: Write | None = None  # what a model writes, for a person to see


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    step: int
    signal: int | None = None  # the signal that stopped it, after a clean save


class Trainer:
    """Trains `model` in the folder `run`; `fit` may be called again, here or in another process, to go on."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        plan: Plan,
        model: nn.Module,
        task: Task,
        label: str = "train",
        world: World | None = None,  # the processes that train together; None = this one alone
    ):
        self.run, self.config, self.plan, self.task, self.label = run, config, plan, task, label
        self.world = world or World()
        self.model = model.to(plan.device)
        if config.recompute:
            recompute_blocks(self.model)
        if config.optimizer == "muon" and config.strategy == "fsdp":
            fix = "use --strategy ddp, or --optimizer adamw"
            raise Error("optimizer muon", "of this torch cannot move matrices that are shared out", fix)
        shared = distribute(self.model, config.strategy, self.world, plan.precision, config.copies)
        forward: Callable[..., Any] = Compiled(shared) if plan.compile else shared
        self.optimizer = make_optimizer(self.model, config)
        self.stepper = Stepper(self.model, forward, task.objective, self.optimizer, config, plan, self.world)
        self.metrics = Metrics(run)
        self.sampler = Sampler(run, self.model, task.sample, config, plan, self.world)
        self.state = checkpoint.State(data=task.fingerprint)
        self.seconds = 0.0  # of training so far, over all calls
        self._rows: list[dict[str, Any]] = []  # of earlier calls
        saver = AsyncSaver if config.async_save and self.world.size == 1 else Saver
        self.saver = saver(run, config.keep, config.keep_every, self.world)
        self._unsaved = False  # whether the last save failed
        self.signal: int | None = None  # that has stopped the last call
        self._stop = StopRequest()

    def fit(self) -> Result:
        """Train up to config.steps, from the newest valid checkpoint if there is one.

        Raises Error: exit 2 for a folder of another config, 3 for changed data, 4 for one that is locked or cannot be
        written, 5 if the loss is not finite.
        """
        lock = locked(self.run, "checkpoints", SAMPLES) if self.world.is_main else nullcontext()
        patience = _PATIENCE if self.world.size > 1 else None
        with lock, stop_requests(self._stop, patience):
            if self.world.is_main:
                check_config(self.run, to_yaml(self.config), checkpoint.saved_steps(self.run))
            self._resume()
            if self.state.owed or self.state.step < self.config.steps or self.sampler.owes(self.state.step):
                if self.world.is_main:
                    write_config(self.run, to_yaml(self.config))
                    write_environment(self.run)
                self._loop()
        return Result(self.state.step, self.signal)

    def _loop(self) -> None:
        started, c = time.monotonic() - self.seconds, self.config
        peak = known_peak(self.plan.device, self.plan.precision)
        gauges = Gauges(self._flops_per_token(), peak, lambda: memory_in_use(self.plan.device))
        tracker_name = c.tracker if self.world.is_main else "none"
        with (
            ProgressLog(self.label, c.steps, self.state.step, self._rows, gauges, self.world.is_main) as progress,
            make_tracker(tracker_name, self.run, yaml.safe_load(to_yaml(c)), self._standing_rows()) as tracker,
        ):
            self._agree_to_stop()
            self._sample(progress, tracker)  # one that a signal has broken off
            while self.signal is None and (self.state.owed or self.state.step < c.steps):
                was_owed = bool(self.state.owed)
                row = self.state.owed or self._train_step()
                improved = self._validate(row)
                self.seconds = time.monotonic() - started
                if row and not self.state.owed and self.world.is_main:
                    row["seconds"] = round(self.seconds, 3)
                    self.metrics.append(row)
                    progress.show(row)
                    tracker.log(row)
                self._sample(progress, tracker)
                self._agree_to_stop()
                if improved or was_owed or self._will_save():
                    self._save()
            self.saver.close()

    def _flops_per_token(self) -> float:
        """Six for each weight, two forward and four backward; attention's own products are left out."""
        return 6.0 * sum(parameter.numel() for parameter in self.model.parameters())

    def _agree_to_stop(self) -> bool:
        """If any process has got a signal, all stop at the same step."""
        self.signal = self.world.largest(self._stop.number or 0) or None
        return self.signal is not None

    def _sample(self, progress: ProgressLog, tracker: Tracker) -> None:
        """Write and show what the model writes, if it is time for it."""
        text = self.sampler(self.state.step, self._agree_to_stop)
        if text is not None:
            progress.wrote(self.state.step, text)
            tracker.log({"step": self.state.step, "sample": text})

    def _standing_rows(self) -> list[dict[str, Any]]:
        """Rows and samples of earlier calls, for a tracker."""
        samples = self.sampler.files.rows() if self.config.tracker != "none" else []
        return sorted([*self._rows, *samples], key=lambda row: row["step"])

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step over all micro-batches; the row to be logged, empty if this step is not."""
        state, step = self.state, self.state.step
        batch = self.task.batches(step)
        self.world.at_step(step + 1)
        parts = share(batch, self.task.parts, self.plan.micro_batch, self.world)
        n_tokens = self.task.n_tokens(batch)
        logged = self._will_log(step + 1)
        began = self._now(logged)
        outcome = self.stepper(step, state.tokens + n_tokens, batch, parts, state.window, logged)
        state.step, state.tokens = step + 1, state.tokens + n_tokens
        if logged or self.plan.device == "cpu":
            self._check(outcome)
        if not logged:
            return {}
        speed = n_tokens / (self._now(True) - began)
        rate = self.optimizer.param_groups[0]["lr"]
        numbers = {"loss": _finite(outcome.loss), "lr": rate, "grad_norm": _finite(outcome.norm)}
        flag = {"skipped": True} if state.skipped else {}
        numbers |= {"tokens_per_s": round(speed, 1), **outcome.norms}
        return {"step": state.step, "tokens": state.tokens, **numbers, **flag}

    def _check(self, outcome: Outcome) -> None:
        """Wait for the device, and give up where skipping does not help. Raises Error (exit 5)."""
        state, scaler = self.state, self.stepper.scaler
        state.skipped = int(self.stepper.n_skipped)
        if state.skipped and outcome.skipped is not None:
            say(f"warning: step {state.step}: {_why_skipped(outcome)}; the step was skipped")
        if state.skipped >= self.config.skip_bad:
            raise self._diverged(f"the gradient of {state.skipped} steps in a row could not be used")
        if scaler.is_enabled() and scaler.get_scale() < _SMALLEST_SCALE:
            raise self._diverged("no scale of the loss keeps the gradient finite")

    def _diverged(self, why: str) -> Error:
        saved = [step for step in checkpoint.saved_steps(self.run) if step <= self.state.step]
        last = f"the last checkpoint is that of step {saved[-1]}" if saved else "there is no checkpoint"
        fix = f"lower --lr or raise --warmup; {last}, from which the same command goes on"
        return Error(f"step {self.state.step}", f"{why}; training diverged", fix, DIVERGED)

    def _validate(self, row: dict[str, Any]) -> bool:
        """Add the validation loss to the row if one is due; True if it is the best so far.

        The best is chosen by the same windows each time; what the last row reports is the whole split. A signal breaks
        it off: then the row is owed, and finished when the run goes on.
        """
        last = self.state.step == self.config.steps
        if not self._due(self.config.eval_every):
            return False
        n_windows = None if self.config.eval_windows == "all" else self.config.eval_windows
        sampled = self._measure(n_windows)
        measured = self._measure(None) if last and n_windows is not None and self.signal is None else sampled
        self.state.owed = row if self.signal is not None else {}
        if self.state.owed:
            return False
        if not math.isfinite(sampled.total + measured.total):
            say(f"warning: step {self.state.step}: the validation loss is not finite")
            return False
        improved = not self.state.best or sampled.total < self.state.best["val_loss"]
        if improved:
            self.state.best = {"step": self.state.step, "val_loss": sampled.total}
        row["val_loss"] = measured.total
        if len(measured.terms) > 1:
            row |= {f"val_{name}": value for name, value in measured.terms.items()}
        if self.task.tokens_per_byte is not None:
            row["bits_per_byte"] = measured.total * self.task.tokens_per_byte / math.log(2)
        return improved

    def _measure(self, n_windows: int | None) -> Measured:
        with autocast(self.plan.device, self.plan.precision):
            batches = self._until_asked_to_stop(self.task.validation(n_windows))
            return measure_share(self.model, self.task.validated, batches, self.world)

    def _until_asked_to_stop(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """At least one batch."""
        for batch in batches:
            yield batch
            if self._agree_to_stop():
                return

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.config.steps

    def _will_save(self) -> bool:
        # Step 1 too: a folder that cannot be written is found out now, not after an hour.
        return self.state.step == 1 or self._due(self.config.save_every) or self.signal is not None

    def _will_log(self, step: int) -> bool:
        c = self.config
        return step in (1, c.steps) or step % c.log_every == 0 or step % c.eval_every == 0

    def _now(self, wait: bool) -> float:
        """Monotonic seconds, after the device has finished what it was given if `wait`."""
        if wait and self.plan.device == "cuda":
            torch.cuda.synchronize()
        if wait and self.plan.device == "mps":
            torch.mps.synchronize()
        return time.monotonic()

    def _save(self) -> None:
        """Save, or warn that it did not work: the next time it has to, and so it does at the end."""
        try:
            self._save_now()
        except Error as e:
            last = self.state.step >= self.config.steps or self.signal is not None
            if e.code != RESOURCE or last or self._unsaved or self.state.step == 1:
                raise
            say(f"warning: {e} Training goes on, and the next save is the last attempt.")
            self._unsaved = True
        else:
            self._unsaved = False

    def _save_now(self) -> None:
        self.state.skipped = int(self.stepper.n_skipped)
        if self.stepper.scaler.is_enabled():
            self.state.scaler = self.stepper.scaler.state_dict()
        if self.world.is_main:
            self.metrics.flush_to_disk()
        self.saver.save(self.model, self.optimizer, self.state, self.task.files)

    def _resume(self) -> None:
        newest = self.world.gather(self._newest_step() if self.world.is_main else None)[0]  # one verifies it for all
        if newest is None:
            if self.world.is_main:
                self.metrics.cut_behind(self.state.step)  # 0, unless this object has trained and could not save
                self.sampler.files.cut_behind(self.state.step)
            return
        folder = checkpoint.folder_of(self.run, newest)
        state = checkpoint.read_state(folder)
        if state.data != self.task.fingerprint:
            fix = "restore the text the run was started with, or choose another --out"
            raise Error(self.run, "was trained on other data than is there now", fix, BAD_INPUT)
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_moments(folder, self.model, self.optimizer)
        if self.stepper.scaler.is_enabled() and state.scaler:
            self.stepper.scaler.load_state_dict(state.scaler)
        self.saver.trust(newest)
        self.state = state
        self.stepper.n_skipped.fill_(state.skipped)
        reported = state.step - bool(state.owed)
        rows = self._rows = self.metrics.cut_behind(reported) if self.world.is_main else []
        if self.world.is_main:
            self.sampler.files.cut_behind(state.step)
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        finished = state.step >= self.config.steps and not state.owed
        say(f"{self.run} is finished: step {newest}" if finished else f"continuing {self.run} from step {newest}")

    def _newest_step(self) -> int | None:
        """The newest valid checkpoint's, None if there is no checkpoint. Raises Error (exit 3) if none is valid."""
        folder, warnings = checkpoint.newest_valid(self.run)
        for warning in warnings:
            say(f"warning: {warning}")
        if folder is None and checkpoint.saved_steps(self.run):
            fix = "restore the folder from a copy, or choose another --out"
            raise Error(self.run, "has checkpoints, and none of them is valid", fix, BAD_INPUT)
        return None if folder is None else int(folder.name.rpartition("-")[2])


def _finite(number: Tensor) -> float | None:
    """A number for JSON, which has none for infinity."""
    return number.item() if math.isfinite(number.item()) else None


def _why_skipped(outcome: Outcome) -> str:
    if not math.isfinite(outcome.loss.item()):
        return "the loss is not finite"
    if not math.isfinite(outcome.norm.item()):
        return "the gradient is not finite"
    return f"the gradient has norm {outcome.norm.item():.3g}, far above the ones before"
