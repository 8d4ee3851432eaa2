"""The key-value cache: what a decoder has already computed for the tokens it has read.

Without it, writing the n-th token costs a forward pass over all n; with it, over one. A cache is an argument of the
forward pass, never a state of the modules. Its memory is allocated once, for n_ctx positions.
"""

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one attention layer: two buffers (B, H, n_ctx, K), filled up to `length`."""

    def __init__(self, n_ctx: int):
        self.n_ctx = n_ctx
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, H, T, K) keys and values; return all so far, (B, H, S, K)."""
        if self.keys is None or self.values is None:
            B, H, _, K = k.shape
            self.keys = torch.empty(B, H, self.n_ctx, K, dtype=k.dtype, device=k.device)
            self.values = torch.empty_like(self.keys)
        end = self.length + k.shape[2]
        if end > self.n_ctx:
            raise ValueError(f"the cache holds {self.n_ctx} positions, {end} were asked of it")
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One `LayerCache` per layer, and the number of positions read so far."""

    def __init__(self, n_layers: int, n_ctx: int):
        self.layers = [LayerCache(n_ctx) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """How many positions have been read (0 for a model without attention)."""
        return self.layers[0].length if self.layers else 0

    def clear(self) -> None:
        """Forget everything, keep the memory."""
        for layer in self.layers:
            layer.length = 0
