"""Blocks are named topologies, never flags: one class per way of joining attention, MLP, residuals and norms.

All take the same arguments and have the same member names, so that two topologies can be compared by one word. Each
class builds only the norms that it uses.
"""

from torch import Tensor, nn

from classiclm.nn.attention import MultiHeadAttention
from classiclm.nn.cache import LayerCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.mask import Mask
from classiclm.nn.mlp import MLP
from classiclm.nn.norm import LayerNorm


class Block(nn.Module):
    """What all blocks are made of: attentions, one MLP, `n_norms` layer norms, dropout on what a sub-layer puts out."""

    attentions: tuple[str, ...] = ("attn",)
    n_norms = 0
    attn: MultiHeadAttention

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_head: int | None = None,
        d_ff: int | None = None,  # None = 4 d_model
        act: str = "gelu_tanh",
        bias: bool = True,
        dropout: float = 0.0,
        ln_eps: float = 1e-5,
        attn_dropout: float | None = None,  # of the attention weights; None = dropout
        d_value: int | None = None,
    ):
        super().__init__()
        attn_dropout = dropout if attn_dropout is None else attn_dropout
        for name in self.attentions:
            setattr(self, name, MultiHeadAttention(d_model, n_heads, d_head, bias, attn_dropout, d_value))
        self.mlp = MLP(d_model, d_ff or 4 * d_model, act, bias)
        self.drop = Dropout(dropout)
        for i in range(1, self.n_norms + 1):
            setattr(self, f"ln{i}", LayerNorm(d_model, ln_eps, bias))


class PlainBlock(Block):
    """Communicate, then compute. The ladder's first stack: nothing helps the gradient past a layer."""

    def forward(self, x: Tensor, mask: Mask | None = None, cache: LayerCache | None = None) -> Tensor:
        x = self.drop(self.attn(x, mask=mask, cache=cache))
        return self.drop(self.mlp(x))


class ResidualBlock(Block):
    """Each sub-layer adds to x instead of replacing it (He et al. 2015). The ladder only."""

    def forward(self, x: Tensor, mask: Mask | None = None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(x, mask=mask, cache=cache))
        return x + self.drop(self.mlp(x))


class PostLNBlock(Block):
    """LayerNorm(x + Sublayer(x)): Transformer 2017 (section 3.1), GPT-1, BERT."""

    n_norms = 2
    ln1: LayerNorm
    ln2: LayerNorm

    def forward(self, x: Tensor, mask: Mask | None = None, cache: LayerCache | None = None) -> Tensor:
        x = self.ln1(x + self.drop(self.attn(x, mask=mask, cache=cache)))
        return self.ln2(x + self.drop(self.mlp(x)))


class PostLNDecoderBlock(Block):
    """A PostLNBlock with a third sub-layer between the two: attention over the encoder's output (2017, section 3.1)."""

    attentions = ("attn", "cross")
    n_norms = 3
    cross: MultiHeadAttention
    ln1: LayerNorm
    ln2: LayerNorm
    ln3: LayerNorm

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        memory: Tensor,  # (B, S, D)
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        cache: LayerCache | None = None,
        memory_cache: LayerCache | None = None,
    ) -> Tensor:
        x = self.ln1(x + self.drop(self.attn(x, mask=mask, cache=cache)))
        x = self.ln2(x + self.drop(self.cross(x, memory, mask=memory_mask, cache=memory_cache)))
        return self.ln3(x + self.drop(self.mlp(x)))


class PreLNBlock(Block):
    """x + Sublayer(LayerNorm(x)): GPT-2 ("moved to the input of each sub-block", section 2.3), GPT-3."""

    n_norms = 2
    ln1: LayerNorm
    ln2: LayerNorm

    def forward(self, x: Tensor, mask: Mask | None = None, cache: LayerCache | None = None) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x), mask=mask, cache=cache))
        return x + self.drop(self.mlp(self.ln2(x)))
