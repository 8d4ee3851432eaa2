"""The one training loop. It knows contracts (a model, an objective, batches by step), never a paper.

Exactness by structure: the learning rate, the batch and the seed of dropout are functions of the step, so the state of
a run is its weights, its moments and one number. On resume: read the newest valid checkpoint, cut the metrics behind
its step, go on.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classiclm.config import to_yaml
from classiclm.data.batches import Batch, derive, rows_of
from classiclm.errors import BAD_INPUT, DIVERGED, Error
from classiclm.files import locked
from classiclm.objectives import Measured, Objective, measure
from classiclm.optim import learning_rate, make_optimizer
from classiclm.train import checkpoint
from classiclm.train.machine import Plan, autocast
from classiclm.train.progress import ProgressLog, say
from classiclm.train.run import Metrics, check_config, write_config, write_environment
from classiclm.train.settings import TrainConfig
from classiclm.train.signals import StopRequest, stop_requests

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


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    step: int
    signal: int | None = None  # the signal that stopped it, after a clean save


class Trainer:
    """Trains `model` in the folder `run`; `fit` may be called again, here or in another process, to go on."""

    def __init__(self, run: Path, config: TrainConfig, plan: Plan, model: nn.Module, task: Task, label: str = "train"):
        self.run, self.config, self.plan, self.task, self.label = run, config, plan, task, label
        self.model = model.to(plan.device)
        self.forward: Callable[..., Any] = _compiled(self.model) if plan.compile else self.model
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(plan.device, enabled=plan.precision == "fp16")
        self.metrics = Metrics(run)
        self.state = checkpoint.State(data=task.fingerprint)
        self.seconds = 0.0  # of training so far, over all calls
        self._stop = StopRequest()

    def fit(self) -> Result:
        """Train up to config.steps, from the newest valid checkpoint if there is one.

        Raises Error: exit 2 for a folder of another config, 3 for changed data, 4 for one that is locked or cannot be
        written, 5 if the loss is not finite.
        """
        with locked(self.run, "checkpoints"), stop_requests(self._stop):
            check_config(self.run, to_yaml(self.config), checkpoint.saved_steps(self.run))
            self._resume()
            if self.state.step < self.config.steps:
                write_config(self.run, to_yaml(self.config))
                write_environment(self.run)
                self._loop()
        return Result(self.state.step, self._stop.number)

    def _loop(self) -> None:
        started = time.monotonic() - self.seconds
        with ProgressLog(self.label, self.config.steps, self.state.step) as progress:
            while self.state.step < self.config.steps and self._stop.number is None:
                row = self._train_step()
                improved = self._validate(row)
                self.seconds = time.monotonic() - started
                if row:
                    row["seconds"] = round(self.seconds, 3)
                    self.metrics.append(row)
                    progress.show(row)
                if improved or self._will_save():
                    self._save()

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step over all micro-batches; the row to be logged, empty if this step is not."""
        step = self.state.step
        torch.manual_seed(derive("dropout", self.config.seed, step))
        batch = self.task.batches(step)
        n_tokens = self.task.n_tokens(batch)
        parts = [self._on_device(part) for part in self.task.parts(batch, self.plan.micro_batch)]
        counts = self._on_device(self.task.objective.counts(batch))
        rate = learning_rate(step, self.state.tokens + n_tokens, self.config)
        logged = self._will_log(step + 1)
        began = self._now(logged)
        loss = torch.zeros((), device=self.plan.device)
        for micro in parts:
            with autocast(self.plan.device, self.plan.precision):
                part = self.task.objective(self.forward, micro).total(counts)
            self.scaler.scale(part).backward()
            loss += part.detach()
        norm = self._update(rate, look=logged or self.plan.device == "cpu")
        self.state.step, self.state.tokens = step + 1, self.state.tokens + n_tokens
        if not logged:
            return {}
        speed = n_tokens / (self._now(True) - began)
        if not math.isfinite(loss.item()):
            raise _diverged(step + 1, "the loss is not finite")
        # Under fp16 a norm may overflow, and the scaler skips the step: JSON has no number for that.
        norm_or_null = norm.item() if math.isfinite(norm.item()) else None
        numbers = {"loss": loss.item(), "lr": rate, "grad_norm": norm_or_null, "tokens_per_s": round(speed, 1)}
        return {"step": self.state.step, "tokens": self.state.tokens, **numbers}

    def _on_device(self, tensors: Batch) -> Batch:
        return {name: tensor.to(self.plan.device) for name, tensor in tensors.items()}

    def _update(self, rate: float, look: bool) -> Tensor:
        """Clip, step, clear; returns the norm before clipping. `look` waits for the norm and refuses a non-finite one
        before it reaches the weights (looking at every step would make a GPU wait)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or math.inf)
        if look and not self.scaler.is_enabled() and not math.isfinite(norm.item()):
            raise _diverged(self.state.step + 1, "the gradient is not finite")
        if look and self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise _diverged(self.state.step + 1, "no scale of the loss keeps the gradient finite")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _validate(self, row: dict[str, Any]) -> bool:
        """Add the validation loss to the row if one is due; True if it is the best so far.

        The best is chosen by the same windows each time; what the last row reports is the whole split.
        """
        last = self.state.step == self.config.steps
        if not self._due(self.config.eval_every):
            return False
        n_windows = None if self.config.eval_windows == "all" else self.config.eval_windows
        sampled = self._measure(n_windows)
        improved = not self.state.best or sampled.total < self.state.best["val_loss"]
        if improved:
            self.state.best = {"step": self.state.step, "val_loss": sampled.total}
        measured = self._measure(None) if last and n_windows is not None else sampled
        row["val_loss"] = measured.total
        if len(measured.terms) > 1:
            row |= {f"val_{name}": value for name, value in measured.terms.items()}
        if self.task.tokens_per_byte is not None:
            row["bits_per_byte"] = measured.total * self.task.tokens_per_byte / math.log(2)
        return improved

    def _measure(self, n_windows: int | None) -> Measured:
        with autocast(self.plan.device, self.plan.precision):
            return measure(self.model, self.task.validated, self.task.validation(n_windows))

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.config.steps

    def _will_save(self) -> bool:
        # Step 1 too: a folder that cannot be written is found out now, not after an hour.
        return self.state.step == 1 or self._due(self.config.save_every) or self._stop.number is not None

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
        if self.scaler.is_enabled():
            self.state.scaler = self.scaler.state_dict()
        self.metrics.flush_to_disk()
        checkpoint.save(self.run, self.model, self.optimizer, self.state, self.task.files)
        best = self.state.best.get("step")
        checkpoint.prune(self.run, self.state.step, self.config.keep, None if best is None else int(best))

    def _resume(self) -> None:
        folder, warnings = checkpoint.newest_valid(self.run)
        for warning in warnings:
            say(f"warning: {warning}")
        if folder is None:
            if checkpoint.saved_steps(self.run):
                fix = "restore the folder from a copy, or choose another --out"
                raise Error(self.run, "has checkpoints, and none of them is valid", fix, BAD_INPUT)
            self.metrics.cut_behind(0)
            return
        state = checkpoint.read_state(folder)
        if state.data != self.task.fingerprint:
            fix = "restore the text the run was started with, or choose another --out"
            raise Error(self.run, "was trained on other data than is there now", fix, BAD_INPUT)
        checkpoint.load_weights(folder, self.model)
        checkpoint.load_moments(folder, self.model, self.optimizer)
        if self.scaler.is_enabled() and state.scaler:
            self.scaler.load_state_dict(state.scaler)
        self.state = state
        rows = self.metrics.cut_behind(state.step)
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        finished = state.step >= self.config.steps
        say(
            f"{self.run} is finished: step {state.step}"
            if finished
            else f"continuing {self.run} from step {state.step}"
        )


def _diverged(step: int, why: str) -> Error:
    fix = "lower --lr or raise --warmup; the same command goes on from the last checkpoint"
    return Error(f"step {step}", f"{why}; training diverged", fix, DIVERGED)


def _compiled(model: nn.Module) -> Callable[..., Any]:
    """The compiled model; whatever cannot be compiled runs as it is, with a warning from torch."""
    torch._dynamo.config.suppress_errors = True
    return torch.compile(model)
