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
            self.values = torch.empty(B, H, self.n_ctx, v.shape[3], dtype=v.dtype, device=v.device)
        end = self.length + k.shape[2]
        if end > self.n_ctx:
            raise ValueError(f"the cache holds {self.n_ctx} positions, {end} were asked of it")
        self.keys.narrow(2, self.length, k.shape[2]).copy_(k)
        self.values.narrow(2, self.length, k.shape[2]).copy_(v)
        self.length = end
        return self.read()

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values so far, (B, H, S, K). Raises ValueError if there are none."""
        if self.keys is None or self.values is None:
            raise ValueError("the cache is empty")
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def select(self, rows: Tensor) -> None:
        """Go on with other sequences: row i becomes what row rows[i] was. rows (B',)."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._selected(self.keys, rows), self._selected(self.values, rows)

    def _selected(self, buffer: Tensor, rows: Tensor) -> Tensor:
        filled = buffer[rows, :, : self.length]  # the rest holds nothing yet
        fresh = buffer[: len(rows)] if len(rows) <= len(buffer) else buffer.new_empty(len(rows), *buffer.shape[1:])
        fresh[:, :, : self.length] = filled
        return fresh


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

    def select(self, rows: Tensor) -> None:
        """Go on with other sequences, as beam search does: row i becomes what row rows[i] was."""
        for layer in self.layers:
            layer.select(rows)


class DecoderCache:
    """What a decoder with an encoder remembers: its own tokens, and the encoder's output as keys and values."""

    def __init__(self, n_layers: int, n_ctx: int, n_source: int):
        self.own = KVCache(n_layers, n_ctx)
        self.memory = KVCache(n_layers, n_source)

    @property
    def length(self) -> int:
        """How many target tokens have been read."""
        return self.own.length

    def select(self, rows: Tensor) -> None:
        """As `KVCache.select`, for both parts."""
        self.own.select(rows)
        self.memory.select(rows)
