"""What is to be done: a network, a batch, and the random ids that all contenders get. Needs nothing but torch."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["causal", "masked", "pairs"]
IGNORE = -100  # a target that does not count
MASK_SHARE = 0.15


@dataclass(frozen=True)
class Work:
    """The sizes of a network and of one unit of work; JSON can hold it."""

    kind: Kind
    preset: str  # ours, whose recipe is taken
    n_layers: int
    d_model: int
    n_heads: int
    n_ctx: int  # positions that the network has
    vocab_size: int
    batch: int  # sequences, or pairs of them, in one optimizer step or one generation
    length: int  # tokens of each; of the prompt, where something is written
    dropout: float = 0.0
    bias: bool = True
    new_tokens: int = 0  # to write
    seed: int = 1337

    @property
    def d_ff(self) -> int:
        """Width of the MLP."""
        return 4 * self.d_model

    @property
    def n_places(self) -> int:
        """Masked positions of a sequence."""
        return max(1, math.ceil(MASK_SHARE * self.length))

    @property
    def n_tokens(self) -> int:
        """Tokens that one step reads, of targets where there are pairs."""
        return self.batch * self.length

    def with_sizes(self, **sizes: Any) -> "Work":
        """The same with other numbers."""
        return dataclasses.replace(self, **sizes)


def batches(work: Work, n: int = 4) -> list[dict[str, Any]]:
    """n batches of uniformly drawn ids, in the form that our objectives take; the same for the same seed.

    causal: inputs, targets (B, T).  pairs: source, inputs, targets (B, T), source_keep (B, T), all True.
    masked: inputs, segments, keep (B, T), all of it text; places, targets (B, P), ascending; next (B,).
    """
    make = {"causal": _causal, "masked": _masked, "pairs": _pairs}[work.kind]
    return [make(work, _draws(work.seed + i, work.vocab_size)) for i in range(n)]


def prompt(work: Work) -> Any:
    """(B, T) ids to continue."""
    return _draws(work.seed, work.vocab_size)(work.batch, work.length)


def _draws(seed: int, vocab_size: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randint(vocab_size, shape, generator=generator)


def _causal(work: Work, draw: Any) -> dict[str, Any]:
    ids = draw(work.batch, work.length + 1)
    return {"inputs": ids[:, :-1].contiguous(), "targets": ids[:, 1:].contiguous()}


def _pairs(work: Work, draw: Any) -> dict[str, Any]:
    import torch

    targets = draw(work.batch, work.length)
    source = draw(work.batch, work.length)
    inputs = targets.roll(1, dims=1)
    return {
        "source": source,
        "source_keep": torch.ones_like(source, dtype=torch.bool),
        "inputs": inputs,
        "targets": targets,
    }


def _masked(work: Work, draw: Any) -> dict[str, Any]:
    import torch

    B, T, P = work.batch, work.length, work.n_places
    inputs = draw(B, T)
    segments = (torch.arange(T) >= T // 2).long().expand(B, T).contiguous()
    places = torch.arange(P).mul(T).div(P, rounding_mode="floor").expand(B, P).contiguous()  # spread evenly
    return {
        "inputs": inputs,
        "segments": segments,
        "keep": torch.ones(B, T, dtype=torch.bool),
        "places": places,
        "targets": draw(B, P),
        "next": draw(B) % 2,
    }
