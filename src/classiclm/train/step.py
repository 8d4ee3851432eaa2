"""One optimizer step: micro-batches, their gradients, and the decision whether these may touch the weights.

The decision comes before the optimizer: a gradient that is not finite, or a spike where skipping those was asked for,
leaves weights and moments as they were, bit for bit. It follows from the norm of the whole gradient, which is the same
in all processes, so all decide alike.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from classiclm.data.batches import Batch, derive
from classiclm.errors import RESOURCE, Error
from classiclm.objectives import Objective
from classiclm.optim import learning_rate
from classiclm.train.distributed import World, add_up, clip_norm
from classiclm.train.machine import Plan, autocast
from classiclm.train.norms import activation_norms, as_numbers, gradient_norms
from classiclm.train.settings import TrainConfig

SPIKE_WINDOW = 128  # gradient norms that a spike is judged by
_FEWEST = 32  # below which none is


@dataclass(frozen=True)
class Outcome:
    """What a step did. Tensors stay on the device until somebody looks."""

    loss: Tensor  # (), over all processes if that was asked for
    norm: Tensor  # (), of the whole gradient, before clipping
    skipped: bool | None  # None where only the device knows
    norms: dict[str, float | None]  # by layer, if they were asked for


class Stepper:
    """Takes the steps of one model. `forward` is the model, compiled or wrapped."""

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        plan: Plan,
        world: World,
    ):
        self.model, self.forward, self.objective, self.optimizer = model, forward, objective, optimizer
        self.config, self.plan, self.world = config, plan, world
        self.scaler = torch.amp.GradScaler(plan.device, enabled=plan.precision == "fp16")
        self.n_skipped = torch.zeros((), device=plan.device)  # steps in a row that were skipped
        # For others, gradients are read and written once more, and a device would have to be waited for.
        heeds = kernel_heeds(optimizer, plan.device, config.strategy)
        self._scales_in_kernel = heeds and not self.scaler.is_enabled()
        self._asks_device = heeds and plan.device != "cpu"

    def __call__(
        self, step: int, tokens: int, batch: Batch, parts: list[Batch], window: list[float], look: bool
    ) -> Outcome:
        """Step 0, 1, ... on a batch, this process's share of which is in `parts`; `tokens` seen up to its end, `window`
        the last norms. With `look`, the outcome has the loss over all processes and the norms by layer.

        Raises Error (exit 4) with the settings that would fit if the device has too little memory.
        """
        ranks = (self.world.rank,) if self.world.size > 1 else ()
        seed = derive("dropout", self.config.seed, step, *ranks)
        # torch.manual_seed asks after every kind of device, which is 1 to 2 % of a small model's step.
        (torch.default_generator if self.plan.device == "cpu" else torch).manual_seed(seed)
        try:
            loss = self._gradients(batch, parts)
        except torch.OutOfMemoryError as e:
            raise out_of_memory(self.plan) from e
        except RuntimeError as e:
            if "DefaultCPUAllocator" not in str(e):
                raise
            raise out_of_memory(self.plan) from e
        self.scaler.unscale_(self.optimizer)
        norms = self._norms(parts[-1]) if look and self.config.log_norms else {}
        norm = clip_norm(self.model, None if self._scales_in_kernel else self.config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, tokens, self.config)
        skipped = self._update(norm, window)
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(self.world.sum(loss) if look else loss, norm, skipped, norms)

    def _gradients(self, batch: Batch, parts: list[Batch]) -> Tensor:
        """Adds up the gradients of all parts; returns the loss."""
        counts = self._on_device(self.objective.counts(batch))
        loss = torch.zeros((), device=self.plan.device)
        for i, part in enumerate(parts, start=1):
            add_up(self.forward, last=i == len(parts))
            with autocast(self.plan.device, self.plan.precision):
                share = self.objective(self.forward, self._on_device(part)).total(counts)
            self.scaler.scale(share).backward()
            loss += share.detach()
        return loss

    def _on_device(self, tensors: Batch) -> Batch:
        return {name: tensor.to(self.plan.device) for name, tensor in tensors.items()}

    def _norms(self, part: Batch) -> dict[str, float | None]:
        """The gradient's norm by layer, and the size of what blocks put out on the last part."""
        with autocast(self.plan.device, self.plan.precision):
            sizes = activation_norms(self.model, lambda: self.objective(self.model, self._on_device(part)))
        return as_numbers(gradient_norms(self.model) | sizes)

    def _update(self, norm: Tensor, window: list[float]) -> bool | None:
        """Let the optimizer step, unless the gradient is bad; whether it was skipped."""
        if self.scaler.is_enabled():  # it looks for itself, and lowers its scale
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return None
        bad = ~norm.isfinite()  # a loss that is not finite has no finite gradient
        if self._scales_in_kernel and self.config.clip is not None:
            self.optimizer.grad_scale = excess(norm, self.config.clip)  # type: ignore[attr-defined]
        if self._asks_device and self.config.skip_spikes is None:
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
            self.n_skipped = (self.n_skipped + 1) * bad
            return None
        is_bad = bool(bad)
        if self.config.skip_spikes is not None and not is_bad:  # of all: machines that differ may round differently
            is_bad = self.world.any(is_spike(norm.item(), window, self.config.skip_spikes))
        self.n_skipped = (self.n_skipped + 1) * is_bad
        if not is_bad:
            self.optimizer.step()
            window[:] = [*window, norm.item()][-SPIKE_WINDOW:] if self.config.skip_spikes else []
        return is_bad


def kernel_heeds(optimizer: torch.optim.Optimizer, device: str, strategy: str) -> bool:
    """Whether the update is one kernel that divides gradients by `grad_scale` as it reads them, and that `found_inf`
    tells on the device to do nothing. The first one for MPS was given both and looked at neither."""
    return type(optimizer) is torch.optim.AdamW and device in ("cpu", "cuda") and strategy != "fsdp"


def excess(norm: Tensor, limit: float) -> Tensor:
    """What gradients of this norm are to be divided by, (), at least 1: as `clip_norm` scales them, in one kernel."""
    return ((norm + 1e-6) / limit).clamp(min=1.0)


def is_spike(norm: float, window: list[float], deviations: float | None) -> bool:
    """Whether a gradient's norm is so many standard deviations above the mean of the last ones; never for None."""
    if deviations is None or len(window) < _FEWEST:
        return False
    mean = math.fsum(window) / len(window)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in window) / len(window))
    return norm > mean + deviations * spread


def out_of_memory(plan: Plan) -> Error:
    """The error that names what would fit."""
    smaller = plan.micro_batch // 2
    ways = [f"--micro_batch {smaller}"] if smaller else []
    ways += ["--recompute", "a smaller --model.n_ctx or model"]
    if plan.precision == "fp32" and plan.device == "cuda":
        ways.insert(1, "--precision bf16")
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in use" if plan.device == "cuda" else ""
    why = f"has too little memory for micro-batches of {plan.micro_batch}{peak}"
    return Error(f"this {plan.device.upper()}", why, f"use {', or '.join(ways)}; see classiclm plan", RESOURCE)
