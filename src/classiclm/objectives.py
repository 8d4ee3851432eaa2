"""What is minimised. An objective turns (model, batch) into sums, and says how many targets each sum is over.

Sums, not means: the trainer divides each term by its own count over *all* micro-batches and processes, so k micro-
batches of b have exactly the gradient of one batch of k b, also where the counts differ.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target with this id counts for nothing


@dataclass(frozen=True)
class Term:
    """One part of a loss: the sum over its targets, how many they are, and its weight in the total."""

    sum: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """The terms of a loss by name."""

    terms: dict[str, Term]

    def total(self, counts: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms' means, with the given (global) counts as divisors."""
        parts = [term.weight * term.sum / counts[name] for name, term in self.terms.items()]
        return torch.stack(parts).sum()


class Objective(Protocol):
    """The contract between the trainer and what is trained for."""

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The number of targets of each term, from the batch alone."""

    def __call__(self, model: Callable[..., Tensor], batch: dict[str, Tensor]) -> Loss:
        """Run the model; the sums of each term."""


class CausalLM:
    """Predict each next token: the sum of -log p(target | the tokens before it), in nats."""

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: Callable[..., Tensor], batch: dict[str, Tensor]) -> Loss:
        logits = model(batch["inputs"])  # (B, T) -> (B, T, V)
        targets = batch["targets"]
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
        return Loss({"loss": Term(nats, self.counts(batch)["loss"])})


@torch.no_grad()
def mean_loss(model: torch.nn.Module, objective: Objective, batches: Iterable[dict[str, Tensor]]) -> float:
    """The total loss over all batches together, in evaluation mode; the model's mode is left as it was.

    Sums are kept in float64, so that the result does not depend on how the batches are cut.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    weights: dict[str, float] = {}
    try:
        for batch in batches:
            loss = objective(model, {name: tensor.to(device) for name, tensor in batch.items()})
            for name, term in loss.terms.items():
                sums[name] = sums.get(name, 0.0) + float(term.sum)
                counts[name] = counts.get(name, 0.0) + float(term.count)
                weights[name] = term.weight
    finally:
        model.train(was_training)
    return sum(weights[name] * sums[name] / counts[name] for name in sums)
