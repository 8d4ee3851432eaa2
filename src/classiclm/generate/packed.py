"""Matrices laid out for writing text: each new token reads all of them once, so fewer bytes are more tokens.

    fp32   in the order in which oneDNN's kernels read them, which few rows at a time gain most from
    bf16   the same in half the bytes; fastest where many rows are multiplied at a time
    fp16   half the bytes, too, and an eighth of the rounding; fastest for one text, on x86
    int8   a scale for each row of a matrix, and whole numbers from -127 to 127; a little of the quality goes

Only matrices change. Sums between blocks, norms, attention and sampling stay in fp32, and no model knows of this:
`pack` puts other modules in the place of those that training needs. They compute the same with fewer calls, which is
what a small model spends its time on. What it gains is measured in benchmarks/, what it costs by
`classiclm evaluate --precision`.
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
from classiclm.nn.dropout import Dropout
from classiclm.nn.embedding import TokenEmbedding
from classiclm.nn.norm import LayerNorm

Packing = Literal["fp32", "bf16", "fp16", "int8"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LEVELS = 127  # the largest of the whole numbers
_FEW = 32  # rows up to which int8 is multiplied as it is; more are worth a bf16 copy of the matrix


class Packed(nn.Module):
    """x W^T + b with W in fp32, bf16 or fp16: (..., K) -> (..., N), in fp32 or in W's type.

    Every class here that is called for each token sets `__call__`: nn.Module's own looks for hooks, which costs as much
    as adding two vectors does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.product = _product(weight.detach(), None if bias is None else bias.detach(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)

    __call__ = forward


def _product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """x -> x W^T + b. On a CPU W is reordered once, instead of at every product as in F.linear.

    The overloads are named because looking for them takes longer than a cast.
    """
    on_cpu = weight.device.type == "cpu"
    if on_cpu and dtype is torch.float16 and torch.backends.quantized.engine in ("x86", "fbgemm"):
        halves = torch.ops.quantized.linear_prepack_fp16(weight.float(), bias)  # turned into fp32 in registers
        of_halves = torch.ops.quantized.linear_dynamic_fp16.default._op  # the overload looks for script objects first
        return lambda x: of_halves(x, halves)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if not on_cpu or dtype is torch.float16 or not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x.to(dtype), weight, bias)
    reordered, linear = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x.to(dtype), reordered, bias, "none", [], "")


class Eighths(nn.Module):
    """x W^T + b with W in whole numbers and a scale for each of its rows: (..., K) -> (..., N) in bf16, with b fp32."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__()
        numbers, scales = quantize(weight.detach())
        self.register_buffer("numbers", numbers)  # (N, K)
        self.register_buffer("scales", scales)  # (N,)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.parts = self.numbers, self.scales, self.bias  # at hand: nn.Module looks longer for buffers

    numbers: Tensor
    scales: Tensor
    bias: Tensor | None

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of W, in fp32: (...) -> (..., K)."""
        return F.embedding(index, self.numbers).float() * self.scales[index, None]

    def forward(self, x: Tensor) -> Tensor:
        numbers, scales, bias = self.parts
        shape = x.shape
        flat = x.reshape(-1, shape[-1]).bfloat16()  # (rows, K)
        if flat.shape[0] <= _FEW and x.device.type == "cpu":
            y = torch._weight_int8pack_mm(flat, numbers, scales)  # (rows, N)
        else:
            y = F.linear(flat, numbers.bfloat16()) * scales
        y = y.view(*shape[:-1], -1)
        return y if bias is None else y + bias

    __call__ = forward


Matrix = Packed | Eighths
Make = Callable[[Tensor, Tensor | None], Matrix]  # of a weight and a bias


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
    """`TokenEmbedding` over a packed matrix, and over a plain one in the same type, as rows of a packed one have no
    place of their own."""

    def __init__(self, weight: Tensor, make: Make):
        super().__init__()
        self.matrix = make(weight, None)
        plain = weight.detach().to(self.matrix.dtype) if isinstance(self.matrix, Packed) else None
        self.register_buffer("plain", plain)  # (V, D)

    plain: Tensor | None

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        if isinstance(self.matrix, Eighths):
            return self.matrix.rows(tokens)
        assert self.plain is not None
        return F.embedding(tokens, self.plain).float()

    def logits(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V)
        """As `TokenEmbedding.logits`."""
        return self.matrix(x).float()


class PackedNorm(nn.Module):
    """What `LayerNorm` computes."""

    def __init__(self, norm: LayerNorm):
        super().__init__()
        weight, bias = norm.weight.detach(), None if norm.bias is None else norm.bias.detach()
        self.norm = partial(torch.layer_norm, normalized_shape=weight.shape, weight=weight, bias=bias, eps=norm.eps)

    def forward(self, x: Tensor) -> Tensor:  # (..., D) -> (..., D)
        return self.norm(x)

    __call__ = forward


class Through(nn.Module):
    """What is left of dropout."""

    p = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return x

    __call__ = forward


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
        heads = self.qkv(x).float()
        if len(set(self.widths)) > 1:
            q, k, v = (self._split(part) for part in heads.split(self.widths, dim=-1))
        else:  # fewer calls: (B, T, 3 H K) -> (3, B, H, T, K)
            q, k, v = heads.view(*heads.shape[:2], 3, self.n_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        return q, k, v

    __call__ = MultiHeadAttention.forward


def pack(model: nn.Module, precision: Packing = "fp32") -> nn.Module:
    """The model itself, its matrices now in `precision`; it can no longer be trained, saved or moved.

    Raises Error (exit 2) for an unknown precision.
    """
    if precision not in get_args(Packing):
        raise Error("precision", f"{precision} is unknown", f"use one of: {', '.join(get_args(Packing))}")
    make: Make = Eighths if precision == "int8" else partial(Packed, dtype=_DTYPES[precision])
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        block.attn = PackedAttention(block.attn, make)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, _packed(child, make))
    return model.eval()


def _packed(module: nn.Module, make: Make) -> nn.Module:
    """What takes the place of a module: itself, if nothing here does its work."""
    if isinstance(module, LayerNorm):
        return PackedNorm(module)
    if isinstance(module, Dropout):
        return Through()
    if isinstance(module, nn.Linear):
        return make(module.weight, module.bias)
    if isinstance(module, TokenEmbedding):
        return PackedEmbedding(module.weight, make)
    return module
