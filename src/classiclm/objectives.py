"""What is minimised. An objective turns (model, batch) into sums, and says how many targets each sum is over.

Sums, not means: the trainer divides each term by its own count over *all* micro-batches and processes, so k micro-
batches of b have exactly the gradient of one batch of k b, also where the counts differ.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from classiclm.errors import Error
from classiclm.nn.mask import IGNORE, Mask

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Term:
    """One part of a loss: the sum over its targets, how many they are, and its weight in the total.

    A term of weight 0 is only reported.
    """

    sum: Tensor
    count: Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """The terms of a loss by name."""

    terms: dict[str, Term]

    def total(self, counts: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the terms' means, with the given (global) counts as divisors."""
        parts = [term.weight * term.sum / counts[name] for name, term in self.terms.items() if term.weight]
        return torch.stack(parts).sum()


class Objective(Protocol):
    """The contract between the trainer and what is trained for."""

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """The number of targets of each term, from the batch alone."""

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Loss:
        """Run the model; the sums of each term."""


class CausalLM:
    """Predict each next token: the sum of -log p(target | the tokens before it), in nats.

    If the batch says to which document each token belongs, only the tokens of its own are before it.
    """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Loss:
        if "documents" in batch:
            mask = Mask(causal=True, documents=batch["documents"])
            logits = model(batch["inputs"], mask=mask, positions=batch["positions"])  # (B, T) -> (B, T, V)
        else:
            logits = model(batch["inputs"])  # (B, T) -> (B, T, V)
        return Loss({"loss": Term(nats(logits, batch["targets"]), self.counts(batch)["loss"])})


class MaskedLM:
    """Restore the masked tokens, and say whether the second segment follows the first (BERT, section 3.1).

    The loss is the mean over masked tokens plus the mean over sequences (appendix A.2), in nats. Reported as well: the
    share of sequences whose answer is right, and the share whose second segment is random, which a guess has to beat.
    """

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        masked = (batch["targets"] != IGNORE).sum()
        sequences = torch.full_like(masked, len(batch["next"]))
        return {"mlm": masked, "nsp": sequences, "nsp_accuracy": sequences, "nsp_random": sequences}

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Loss:
        mask = Mask(keep=batch["keep"])
        mlm, nsp = model(batch["inputs"], batch["segments"], mask, batch["places"])  # (B, P, V), (B, 2)
        counts = self.counts(batch)
        right = (nsp.argmax(dim=-1) == batch["next"]).sum()
        return Loss(
            {
                "mlm": Term(nats(mlm, batch["targets"]), counts["mlm"]),
                "nsp": Term(nats(nsp, batch["next"]), counts["nsp"]),
                "nsp_accuracy": Term(right, counts["nsp_accuracy"], weight=0.0),
                "nsp_random": Term(batch["next"].sum(), counts["nsp_random"], weight=0.0),
            }
        )


class Translation:
    """Predict each next token of the target from the source and the target so far, in nats.

    Label smoothing (Szegedy et al. 2016; "Attention Is All You Need", section 5.4): the right token is to get the
    probability 1 - smoothing, and each of the V - 1 others an equal share of the rest.
    """

    def __init__(self, smoothing: float = 0.0):
        self.smoothing = smoothing

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Loss:
        logits = model(batch["source"], batch["inputs"], Mask(keep=batch["source_keep"]))  # (B, T, V)
        loss = smoothed_nats(logits, batch["targets"], self.smoothing)
        return Loss({"loss": Term(loss, self.counts(batch)["loss"])})


def nats(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log p(target): logits (..., V), targets (...) with IGNORE where there is none -> ()."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def smoothed_nats(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy with labels of 1 - smoothing for the target and smoothing / (V - 1) for each other token.

    torch's label_smoothing spreads its share over all V tokens, the target included: the same for
    smoothing V / (V - 1). Raises Error (exit 2) if others would get more than the target.
    """
    vocab_size = logits.shape[-1]
    share = smoothing * vocab_size / (vocab_size - 1)
    if share > 1:
        raise Error("label_smoothing", f"{smoothing} leaves the target less than the others", "lower it")
    flat = logits.flatten(0, -2).float()
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORE, reduction="sum", label_smoothing=share)


@dataclass(frozen=True)
class Measured:
    """A loss over many batches: the total that is minimised, and each term's mean."""

    total: float
    terms: dict[str, float]


@torch.no_grad()
def measure(model: torch.nn.Module, objective: Objective, batches: Iterable[Batch]) -> Measured:
    """The loss over all batches together, in evaluation mode; the model's mode is left as it was.

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
    means = {name: sums[name] / counts[name] for name in sums}
    return Measured(sum(weights[name] * means[name] for name in means), means)


def mean_loss(model: torch.nn.Module, objective: Objective, batches: Iterable[Batch]) -> float:
    """The total of `measure`."""
    return measure(model, objective, batches).total
