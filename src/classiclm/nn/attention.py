"""Multi-head attention ("Attention Is All You Need", section 3.2): written out for reading, fused for running.

`attend_written` is the equation. `attend_fused` calls torch's kernel, and `attend_banded` keeps either of them from
working on keys outside the band. `attend` chooses by a fixed rule; tests hold all of them together, values and
gradients, for every kind of mask.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classiclm.nn.cache import LayerCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.mask import Mask

CPU_WRITTEN_UP_TO = 512  # keys
PATHS = ("auto", "written", "fused")


def attend_written(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: Dropout) -> Tensor:
    """softmax(Q K^T / sqrt(d_k)) V, equation 1. q (..., T, K); k, v (..., S, K) -> (..., T, K).

    allowed: True where a query may attend, broadcastable to (..., T, S); None = everywhere.
    """
    # Scaling Q is the same as scaling Q K^T, and cheaper; so is adding -inf to filling it in.
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)  # (..., T, S)
    if allowed is not None:
        scores = scores + torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, float("-inf"))
    weights = dropout(scores.softmax(dim=-1))  # each query's weights sum to 1
    return weights.to(v.dtype) @ v  # (..., T, S) @ (..., S, K) -> (..., T, K)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: Dropout) -> Tensor:
    """The same in one kernel; arguments as in `attend_written`."""
    p = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=p)


def attend_causal_fused(q: Tensor, k: Tensor, v: Tensor, dropout: Dropout) -> Tensor:
    """One kernel that knows "causal" by itself and never holds the T x T matrix."""
    p = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def attend_banded(q: Tensor, k: Tensor, v: Tensor, window: int, dropout: Dropout, path: str) -> Tensor:
    """Causal attention to the last `window` keys, in memory T x 2 window instead of T x T.

    The text is cut into blocks of `window`: a query's band lies within its own block and the one before.
    q, k, v (B, H, T, K) -> (B, H, T, K).
    """
    T = q.shape[2]
    fill = -T % window  # up to a whole number of blocks, N
    q, k, v = (F.pad(x, (0, 0, 0, fill)).unflatten(2, (-1, window)) for x in (q, k, v))  # (B, H, N, W, K)
    k, v = (torch.cat([F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x], dim=3) for x in (k, v))  # (B, H, N, 2W, K)
    query = torch.arange(window, 2 * window, device=q.device)[:, None]  # (W, 1), counted from the block before
    key = torch.arange(2 * window, device=q.device)[None, :]  # (1, 2W)
    band = (key <= query) & (key > query - window)  # (W, 2W)
    first = torch.arange(q.shape[2], device=q.device)[:, None, None] == 0  # (N, 1, 1): nothing is before block 0
    allowed = band & ~(first & (key < window))  # (N, W, 2W)
    if path == "written":
        blocks = attend_written(q, k, v, allowed, dropout)  # (B, H, N, W, K)
    else:  # the kernels take four dimensions: heads and blocks share one
        mask = allowed.repeat(q.shape[1], 1, 1)  # (H * N, W, 2W)
        blocks = attend_fused(q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask, dropout).view_as(q)
    return blocks.flatten(2, 3)[:, :, :T]  # (B, H, T, K)


def choose_path(device: torch.device, n_keys: int, dropping: bool) -> str:
    """The rule behind "auto", from measurements: on a CPU torch's fused kernel has no dropout (it falls back to a slow
    path) and only overtakes the written-out products when the T x S matrix outgrows the cache."""
    written = device.type == "cpu" and (dropping or n_keys <= CPU_WRITTEN_UP_TO)
    return "written" if written else "fused"


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, dropout: Dropout, path: str = "auto") -> Tensor:
    """Attention by the named path: q (B, H, T, K); k, v (B, H, S, K) -> (B, H, T, K)."""
    T, S = q.shape[2], k.shape[2]
    if path == "auto":
        dropping = dropout.training and dropout.p > 0
        # One query has no T x S matrix: what counts is the number of calls.
        path = "fused" if T == 1 and not dropping else choose_path(q.device, S, dropping)
    if mask.window is not None and mask.only_banded(T, S) and 2 * mask.window <= T:
        return attend_banded(q, k, v, mask.window, dropout, path)
    if path == "fused" and mask.only_causal(T, S):
        return attend_causal_fused(q, k, v, dropout)
    function = attend_written if path == "written" else attend_fused
    return function(q, k, v, mask.matrix(T, S, q.device), dropout)


class MultiHeadAttention(nn.Module):
    """H attentions side by side in spaces of K = d_head dimensions, joined by a linear layer (section 3.2.2).

    Self-attention if `memory` is None, else cross-attention: queries from x, keys and values from memory (B, S, D).
    A cache collects the keys and values of all x so far, or keeps those of the memory.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int | None = None,  # of queries and keys; None = d_model / n_heads
        bias: bool = True,
        dropout: float = 0.0,  # of the attention weights
        d_value: int | None = None,  # of values; None = d_head
    ):
        super().__init__()
        self.n_heads = n_heads
        self.path = "auto"  # one of PATHS; `set_attention_path` changes it for a whole model
        d_head = d_head or d_model // n_heads
        d_value = d_value or d_head
        self.q = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.v = nn.Linear(d_model, n_heads * d_value, bias=bias)
        self.o = nn.Linear(n_heads * d_value, d_model, bias=bias)
        self.dropout = Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:  # (B, T, D) -> (B, T, D)
        if memory is not None and cache is not None and cache.length:
            q, (k, v) = self._split(self.q(x)), cache.read()  # a memory does not change: it was projected at first
        else:
            q, k, v = self.project(x, x if memory is None else memory)
            if cache is not None:
                k, v = cache.append(k, v)  # (B, H, S, K)
        heads = attend(q, k, v, mask or Mask(), self.dropout, self.path)  # (B, H, T, K)
        return self.o(heads.transpose(1, 2).flatten(2))  # (B, T, H, K) -> (B, T, H * K) -> (B, T, D)

    def project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x (B, T, D), keys and values of the source (B, S, D): (B, H, T, K) and twice (B, H, S, K)."""
        parts = (self.q, self.k, self.v)
        # Whatever stands in for one of them (low-rank adapters, say) is called as it is.
        if self.training and source is x and all(type(part) is nn.Linear for part in parts) and will_copy(self.q):
            return self._project_at_once(x, parts)
        return self._split(self.q(x)), self._split(self.k(source)), self._split(self.v(source))

    def _project_at_once(self, x: Tensor, parts: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """One product in place of three: x is cast once, and its gradient is added up inside."""
        weight = torch.cat([part.weight for part in parts])  # three of (H K, D) -> (3 H K, D)
        bias = torch.cat([part.bias for part in parts]) if self.q.bias is not None else None
        heads = F.linear(x, weight, bias)  # (B, T, 3 H K)
        q, k, v = heads.split([part.out_features for part in parts], dim=-1)
        return self._split(q), self._split(k), self._split(v)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, T, H * K) -> (B, H, T, K)


def will_copy(linear: nn.Linear) -> bool:
    """Whether autocast makes a copy of this matrix, and keeps it until the backward pass.

    If so, a copy of three joined ones takes no more memory; else it would: under FSDP, even what others hold.
    """
    return torch.is_autocast_enabled(linear.weight.device.type) and linear.weight.dtype == torch.float32


def set_attention_path(model: nn.Module, path: str) -> None:
    """Make every attention of the model take the named path ("auto", "written" or "fused")."""
    if path not in PATHS:
        raise ValueError(f"no attention path {path!r}; there are {', '.join(PATHS)}")
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module.path = path
