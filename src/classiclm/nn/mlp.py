"""The position-wise feed-forward network ("Attention Is All You Need", section 3.3) and its activations."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,  # Transformer 2017
    "gelu": F.gelu,  # BERT: the exact form, with erf
    "gelu_tanh": partial(F.gelu, approximate="tanh"),  # GPT-1, GPT-2, GPT-3
}


class MLP(nn.Module):
    """act(x W1 + b1) W2 + b2, the same for every position: (B, T, D) -> (B, T, D)."""

    def __init__(self, d_model: int, d_ff: int, act: str, bias: bool = True):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=bias)
        self.act = ACTIVATIONS[act]
        self.down = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))  # (B, T, D) -> (B, T, F) -> (B, T, D)
