"""Token embeddings, and positions: learned ones and sinusoids.

The token embedding of the GPTs is also the matrix of their last linear layer ("tied" weights: Press and Wolf 2017), so
`TokenEmbedding` offers both directions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What a model does with its last states (..., D), given the function that turns them into logits (..., V).
ReadOut = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def as_logits(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V)
    """The plain `ReadOut`: all logits. `objectives.InPieces` is the one that never holds them all."""
    return logits(x)


class TokenEmbedding(nn.Module):
    """A row of D numbers for each of V tokens."""

    def __init__(self, vocab_size: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return F.embedding(tokens, self.weight)

    def logits(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V)
        """The tied output layer: a token's logit is the dot product of x with that token's embedding."""
        return F.linear(x, self.weight)


class PositionEmbedding(nn.Module):
    """A learned row of D numbers for each of n_ctx positions (GPT-1, section 4.1)."""

    def __init__(self, n_ctx: int, d_model: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ctx, d_model))

    def forward(self, start: int, length: int, positions: Tensor | None = None) -> Tensor:  # -> (T, D) or (B, T, D)
        """Rows start ... start + length - 1, or those of `positions` (B, T) where each sequence begins elsewhere.

        Raises ValueError past n_ctx: there is no row for such a position.
        """
        if positions is not None:
            return F.embedding(positions, self.weight)  # (B, T, D)
        if start + length > len(self.weight):
            raise ValueError(f"position {start + length - 1} is past the last of n_ctx = {len(self.weight)}")
        return self.weight[start : start + length]  # (T, D)


def sinusoids(start: int, length: int, d_model: int, device: torch.device) -> Tensor:
    """Fixed positions ("Attention Is All You Need", section 3.5): (T, D) for start ... start + length - 1.

    Dimensions 2i and 2i + 1 are the sine and cosine of position / 10000^(2i / d_model): wavelengths from 2 pi to
    10000 * 2 pi. Any length has positions, also one that training never saw.
    """
    exact = torch.float32 if device.type == "mps" else torch.float64  # an fp32 angle is 6e-5 off at position 1,000
    position = torch.arange(start, start + length, device=device, dtype=exact)[:, None]  # (T, 1)
    even = torch.arange(0, d_model, 2, device=device, dtype=exact)  # (D / 2,)
    angle = position * torch.exp(even * (-math.log(10_000.0) / d_model))  # (T, D / 2)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :d_model].float()  # (T, D), interleaved
