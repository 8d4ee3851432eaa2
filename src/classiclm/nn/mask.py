"""Which positions may be attended to, kept symbolic until a path needs the matrix.

A `Mask` is a small frozen value, so that "just causal" can reach a fused kernel as a flag: a materialised T x S matrix
would make the kernel leave its fast path.

Shape letters used in all of nn/: B batch, T query time, S key time, D model, H heads, K head size, F feed-forward,
V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100  # a target with this id is masked out of the loss


@dataclass(frozen=True)
class Mask:
    """The conjunction of up to four rules. `Mask()` lets everything through.

    causal: a query sees keys up to its own position ("Attention Is All You Need", section 3.2.3).
    keep:   (B, S) boolean, False where a key is padding.
    window: together with causal, a query sees only the last `window` keys, itself included (the locally banded layers
            of GPT-3, section 2.1).
    documents: (B, T) the number of each position's document: a query sees keys of its own document only.
    """

    causal: bool = False
    keep: Tensor | None = None
    window: int | None = None
    documents: Tensor | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not self.causal:
            raise ValueError("a window is a causal band: give causal=True with it")

    def only_causal(self, n_queries: int, n_keys: int) -> bool:
        """True if a kernel's own "causal" flag says all there is to say (queries and keys start together)."""
        return self.causal and self.window is None and self._only_order(n_queries, n_keys)

    def only_banded(self, n_queries: int, n_keys: int) -> bool:
        """True if the mask is a causal band and nothing else, and queries and keys start together."""
        return self.causal and self.window is not None and self._only_order(n_queries, n_keys)

    def _only_order(self, n_queries: int, n_keys: int) -> bool:
        return self.keep is None and self.documents is None and n_queries == n_keys

    def matrix(self, n_queries: int, n_keys: int, device: torch.device) -> Tensor | None:
        """Booleans, True = may attend, broadcastable to (B, H, T, S); None if nothing is masked.

        With a cache there are more keys than queries; the queries are then the last `n_queries` positions. Raises
        ValueError for documents with a cache: their numbers belong to one window.
        """
        allowed = None if self.keep is None else self.keep[:, None, None, :]  # (B, 1, 1, S)
        if self.documents is not None:
            if n_queries != n_keys:
                raise ValueError(f"a mask of documents needs as many queries as keys, not {n_queries} and {n_keys}")
            same = self.documents[:, None, :, None] == self.documents[:, None, None, :]  # (B, 1, T, T)
            allowed = same if allowed is None else allowed & same
        # A single causal query is the last position: it sees every key, unless a window cuts the past off.
        if self.causal and (n_queries > 1 or self.window is not None):
            band = _band(n_queries, n_keys, self.window, device)  # (T, S)
            allowed = band if allowed is None else allowed & band
        if self.keep is not None and allowed is not None:
            # A padded position may see nothing; a softmax over nothing is NaN, which would spread. Nobody reads it.
            allowed = allowed | ~allowed.any(dim=-1, keepdim=True)
        return allowed


def _band(n_queries: int, n_keys: int, window: int | None, device: torch.device) -> Tensor:
    query = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]  # (T, 1)
    key = torch.arange(n_keys, device=device)[None, :]  # (1, S)
    band = key <= query  # (T, S)
    return band if window is None else band & (key > query - window)
