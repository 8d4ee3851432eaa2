"""Matrices in 16 or 8 bits, for writing text: each new token reads all of them once, so fewer bytes are more tokens.

    fp16   for one text: torch's product of a matrix and a vector reads fp16 as fast as memory gives it
    bf16   for several texts: there are kernels for products of bf16 matrices
    int8   a scale for each row of a matrix, and whole numbers from -127 to 127; a little of the quality goes

Only matrices change. Sums between blocks, norms, attention and sampling stay in fp32, and no model knows of this:
`pack` puts other modules in the place of linear layers and token embeddings. What it gains is measured in benchmarks/,
what it costs by `classiclm evaluate --precision`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classiclm.errors import Error
from classiclm.nn.attention import MultiHeadAttention
from classiclm.nn.blocks import Block
from classiclm.nn.embedding import TokenEmbedding

Packing = Literal["fp32", "fp16", "bf16", "int8"]

_LEVELS = 127  # the largest of the whole numbers
_FEW = 32  # rows up to which int8 is multiplied as it is; more are worth a bf16 copy of the matrix


class Halves(nn.Module):
    """x W^T + b with W in fp16 or bf16: (..., K) fp32 -> (..., N) fp32.

    On a CPU, torch has a fast product of an fp16 matrix with one vector only: more are multiplied in the type `wide`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, wide: torch.dtype = torch.bfloat16):
        super().__init__()
        self.wide = wide
        self.register_buffer("weight", weight.detach().to(dtype))  # (N, K)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    weight: Tensor
    bias: Tensor | None

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of W, in fp32: (...) -> (..., K)."""
        return F.embedding(index, self.weight).float()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if x.device.type == "cpu" and (weight.dtype is not torch.float16 or not is_row(x)):
            weight = weight.to(self.wide)
        y = F.linear(x.to(weight.dtype), weight).float()
        return y if self.bias is None else y + self.bias


class Eighths(nn.Module):
    """x W^T + b with W in whole numbers and a scale for each of its rows: (..., K) fp32 -> (..., N) fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, wide: torch.dtype = torch.bfloat16):
        super().__init__()
        self.wide = wide
        numbers, scales = quantize(weight.detach())
        self.register_buffer("numbers", numbers)  # (N, K)
        self.register_buffer("scales", scales)  # (N,)
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    numbers: Tensor
    scales: Tensor
    bias: Tensor | None

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of W, in fp32: (...) -> (..., K)."""
        return F.embedding(index, self.numbers).float() * self.scales[index, None]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (rows, K)
        if x.device.type == "cpu" and len(flat) <= _FEW:
            y = torch._weight_int8pack_mm(flat.bfloat16(), self.numbers, self.scales)  # (rows, N)
        else:
            y = F.linear(flat.to(self.wide), self.numbers.to(self.wide)) * self.scales.to(self.wide)
        y = y.float().unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


Matrix = Halves | Eighths
Make = Callable[[Tensor, Tensor | None], Matrix]  # of a weight and a bias


def is_row(x: Tensor) -> bool:
    """Whether (..., K) is one vector."""
    return x.numel() == x.shape[-1]


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers and scales that are nearest to a matrix (N, K): int8 (N, K), bf16 (N,).

    A row's scale is the least bf16 number that keeps its largest weight within 127, so it has no error of its own.
    """
    least = weight.abs().amax(dim=1) / _LEVELS  # (N,)
    scales = least.bfloat16()
    above = torch.nextafter(scales, torch.full_like(scales, torch.inf))
    scales = torch.where(scales.float() < least, above, scales)
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)  # a row of zeros
    return (weight / scales.float()[:, None]).round().to(torch.int8), scales


class PackedEmbedding(nn.Module):
    """`TokenEmbedding` over a packed matrix."""

    def __init__(self, matrix: Matrix):
        super().__init__()
        self.matrix = matrix

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return self.matrix.rows(tokens)

    def logits(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V)
        """As `TokenEmbedding.logits`."""
        return self.matrix(x)


class PackedAttention(MultiHeadAttention):
    """Self-attention whose queries, keys and values are one product."""

    def __init__(self, attn: MultiHeadAttention, make: Make):
        nn.Module.__init__(self)  # not the parent's, which would make matrices of its own
        self.n_heads, self.path, self.dropout = attn.n_heads, attn.path, attn.dropout
        parts = (attn.q, attn.k, attn.v)
        self.widths = [part.out_features for part in parts]
        biases = [part.bias.detach() for part in parts if part.bias is not None]
        self.qkv = make(torch.cat([part.weight.detach() for part in parts]), torch.cat(biases) if biases else None)
        self.o = make(attn.o.weight, attn.o.bias)  # type: ignore[assignment]

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(x)
        if len(set(self.widths)) > 1:
            q, k, v = (self._split(part) for part in heads.split(self.widths, dim=-1))
        else:  # fewer calls: (B, T, 3 H K) -> (3, B, H, T, K)
            q, k, v = heads.unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v


def pack(model: nn.Module, precision: Packing, fast_bf16: bool = True) -> nn.Module:
    """The model itself, its matrices now in `precision`; it can no longer be trained or saved.

    fast_bf16: whether this machine multiplies bf16 faster than fp32, so that many rows at once are multiplied in bf16.
    Raises Error (exit 2) for an unknown precision.
    """
    if precision not in get_args(Packing):
        raise Error("precision", f"{precision} is unknown", f"use one of: {', '.join(get_args(Packing))}")
    if precision == "fp32":
        return model
    make = _maker(precision, torch.bfloat16 if fast_bf16 else torch.float32)
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attn = PackedAttention(block.attn, make)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _packed(child, make))
    return model.eval()


def _maker(precision: Packing, wide: torch.dtype) -> Make:
    if precision == "int8":
        return partial(Eighths, wide=wide)
    return partial(Halves, dtype=torch.float16 if precision == "fp16" else torch.bfloat16, wide=wide)


def _packed(module: nn.Module, make: Make) -> nn.Module:
    """What takes the place of a module: itself, if it has no matrix of its own."""
    if isinstance(module, nn.Linear):
        return make(module.weight, module.bias)
    if isinstance(module, TokenEmbedding):
        return PackedEmbedding(make(module.weight, None))
    return module
