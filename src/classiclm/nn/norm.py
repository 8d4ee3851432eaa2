"""Layer normalisation (Ba, Kiros and Hinton 2016), written out and fused."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Equations 3 and 4 of the paper, for reading; `LayerNorm` computes the same in one kernel.

    The variance divides by D, not by D - 1.
    """
    mean = x.mean(dim=-1, keepdim=True)  # (..., 1)
    variance = (x - mean).pow(2).mean(dim=-1, keepdim=True)
    y = (x - mean) / torch.sqrt(variance + eps) * weight
    return y if bias is None else y + bias


class LayerNorm(nn.Module):
    """Normalises each vector to mean 0 and variance 1, then applies a learnt gain and (optionally) bias: (..., D)."""

    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
