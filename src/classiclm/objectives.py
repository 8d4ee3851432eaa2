"""What is minimised. An objective turns (model, batch) into sums, and says how many targets each sum is over.

Sums, not means: the trainer divides each term by its own count over *all* micro-batches and processes, so k micro-
batches of b have exactly the gradient of one batch of k b, also where the counts differ.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from classiclm.errors import Error
from classiclm.nn.mask import IGNORE, Mask

Batch = dict[str, Tensor]

_LOGITS_BYTES = 256 << 20  # fp32 logits of one micro-batch up to here are made at once


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

    If the batch says to which document each token belongs, only the tokens of its own are before it. rows: see `cost`.
    """

    def __init__(self, rows: int | None = None):
        self.rows = rows

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Loss:
        forward = partial(model, batch["inputs"])  # (B, T) -> (B, T, V)
        if "documents" in batch:
            mask = Mask(causal=True, documents=batch["documents"])
            forward = partial(forward, mask=mask, positions=batch["positions"])
        return Loss({"loss": Term(cost(forward, batch["targets"], self.rows), self.counts(batch)["loss"])})


class MaskedLM:
    """Restore the masked tokens, and say whether the second segment follows the first (BERT, section 3.1).

    The loss is the mean over masked tokens plus the mean over sequences (appendix A.2), in nats. Reported as well: the
    share of sequences whose answer is right, and the share whose second segment is random, which a guess has to beat.
    rows: see `InPieces`; None = all logits at once.
    """

    def __init__(self, rows: int | None = None):
        self.rows = rows

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        masked = (batch["targets"] != IGNORE).sum()
        sequences = torch.full_like(masked, len(batch["next"]))
        return {"mlm": masked, "nsp": sequences, "nsp_accuracy": sequences, "nsp_random": sequences}

    def __call__(self, model: Callable[..., Any], batch: Batch) -> Loss:
        forward = partial(model, batch["inputs"], batch["segments"], Mask(keep=batch["keep"]), batch["places"])
        if self.rows is None:
            logits, nsp = forward()  # (B, P, V), (B, 2)
            mlm = nats(logits, batch["targets"])
        else:
            mlm, nsp = forward(read_out=InPieces(batch["targets"], self.rows))  # (), (B, 2)
        counts = self.counts(batch)
        right = (nsp.argmax(dim=-1) == batch["next"]).sum()
        return Loss(
            {
                "mlm": Term(mlm, counts["mlm"]),
                "nsp": Term(nats(nsp, batch["next"]), counts["nsp"]),
                "nsp_accuracy": Term(right, counts["nsp_accuracy"], weight=0.0),
                "nsp_random": Term(batch["next"].sum(), counts["nsp_random"], weight=0.0),
            }
        )


class Translation:
    """Predict each next token of the target from the source and the target so far, in nats.

    Label smoothing (Szegedy et al. 2016; "Attention Is All You Need", section 5.4): the right token is to get the
    probability 1 - smoothing, and each of the V - 1 others an equal share of the rest. rows: see `cost`.
    """

    def __init__(self, smoothing: float = 0.0, rows: int | None = None):
        self.smoothing, self.rows = smoothing, rows

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": (batch["targets"] != IGNORE).sum()}

    def __call__(self, model: Callable[..., Tensor], batch: Batch) -> Loss:
        forward = partial(model, batch["source"], batch["inputs"], Mask(keep=batch["source_keep"]))  # -> (B, T, V)
        loss = cost(forward, batch["targets"], self.rows, self.smoothing)
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
class InPieces:
    """A `ReadOut` that makes the logits of `rows` targets at a time and keeps their cost only.

    With a vocabulary of 50,257, the logits and their gradients are larger than all else that a small model keeps. The
    backward pass makes each piece again, for a third more arithmetic in the output layer. targets (B, T), IGNORE where
    there is none.
    """

    targets: Tensor
    rows: int
    smoothing: float = 0.0

    def __call__(self, logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # (B, T, D) -> ()
        def piece(x: Tensor, targets: Tensor) -> Tensor:  # (rows, D), (rows,) -> ()
            return smoothed_nats(logits(x), targets, self.smoothing)

        states = x.flatten(0, self.targets.ndim - 1).split(self.rows)  # (B * T, D), cut
        targets = self.targets.flatten().split(self.rows)
        with _own_casts(x.device.type):
            costs = [checkpoint(piece, *both, use_reentrant=False) for both in zip(states, targets, strict=True)]
        return torch.stack(costs).sum()


def _own_casts(device: str) -> torch.autocast:
    """Autocast as it is, but with a cast of the output matrix for each piece: the gradients that pieces send to one
    cast would be summed up in its precision, of 8 bits in bf16."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, dtype, enabled, cache_enabled=False)


def cost(forward: Callable[..., Tensor], targets: Tensor, rows: int | None, smoothing: float = 0.0) -> Tensor:
    """`smoothed_nats` of the logits that `forward` makes: all at once, or `rows` at a time, which is the same sum with
    less memory (`InPieces`)."""
    if rows is None:
        return smoothed_nats(forward(), targets, smoothing)
    return forward(read_out=InPieces(targets, rows, smoothing))


def choose_rows(asked: int | Literal["auto"], targets: int, vocab_size: int) -> int | None:
    """How many of a micro-batch's targets have logits at the same time; None = all of them.

    "auto": all, if their fp32 logits take up to 256 MiB, else the largest power of two that does.
    """
    fitting = max(1, _LOGITS_BYTES // (4 * vocab_size))
    if asked == "auto":
        asked = targets if targets <= fitting else 1 << (fitting.bit_length() - 1)
    return asked if asked < targets else None


@dataclass(frozen=True)
class Measured:
    """A loss over many batches: the total that is minimised, and each term's mean."""

    total: float
    terms: dict[str, float]


def measure(model: torch.nn.Module, objective: Objective, batches: Iterable[Batch]) -> Measured:
    """The loss over all batches together, in evaluation mode; the model's mode is left as it was."""
    return measure_counted(model, objective, ((batch, True) for batch in batches))


@torch.no_grad()
def measure_counted(
    model: torch.nn.Module,
    objective: Objective,
    batches: Iterable[tuple[Batch, bool]],
    add_up: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Measured:
    """`measure` of those batches that count; the model runs on the others for nothing, as some processes have to.

    Sums are kept in float64, so that the result does not depend on how the batches are cut. add_up: from this process's
    sums and counts, (terms, 2), to those of all.
    """
    was_training = model.training
    model.eval()
    device = next(chain(model.parameters(), model.buffers())).device
    sums: dict[str, tuple[float, float]] = {}  # name -> sum, count
    weights: dict[str, float] = {}
    try:
        for batch, counts in batches:
            loss = objective(model, {name: tensor.to(device) for name, tensor in batch.items()})
            for name, term in loss.terms.items():
                weights[name] = term.weight
                total, n = sums.get(name, (0.0, 0.0))
                sums[name] = (total + float(term.sum) * counts, n + float(term.count) * counts)
    finally:
        model.train(was_training)
    totals = add_up(torch.tensor(list(sums.values()), dtype=torch.float64))  # (terms, 2)
    means = {name: float(total / n) for name, (total, n) in zip(sums, totals, strict=True)}
    return Measured(sum(weights[name] * means[name] for name in means), means)


def mean_loss(model: torch.nn.Module, objective: Objective, batches: Iterable[Batch]) -> float:
    """The total of `measure`."""
    return measure(model, objective, batches).total
