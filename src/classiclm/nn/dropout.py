"""Dropout, and the cheap random bits that make it affordable on a CPU.

torch's CPU dropout draws one Bernoulli variable per element, which takes over a third of a small model's training
step. Here each 64-bit random word decides four elements: 16 bits are plenty for a probability.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # a 16-bit slice is uniform over this many values


def scaled_mask(shape: torch.Size, p: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers that are 0 with probability p (rounded to 1/65,536), else 1 over the exact probability of being kept.

    Draws from torch's default generator of the device, so seeding works as everywhere else.
    """
    drop_levels = min(round(p * _LEVELS), _LEVELS - 1)
    n = shape.numel()
    words = torch.empty((n + 3) // 4, dtype=torch.int64, device=device)
    words.random_(-(2**63), None)  # all 64 bits
    slices = words.view(torch.int16)[:n].view(shape)  # uniform over [-32768, 32767]
    # Compared straight into `dtype`: turning booleans into floats would take longer than drawing the bits.
    mask = torch.ge(slices, drop_levels - _LEVELS // 2, out=torch.empty(shape, dtype=dtype, device=device))
    return mask.mul_(_LEVELS / (_LEVELS - drop_levels))


class Dropout(nn.Module):
    """Srivastava et al. 2014, "inverted": kept activations are divided by the probability of being kept.

    On a CPU the mask is made by `scaled_mask`; elsewhere torch's fused kernel is faster.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:  # any shape -> the same
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * scaled_mask(x.shape, self.p, x.dtype, x.device)

    def extra_repr(self) -> str:
        return f"p={self.p}"
