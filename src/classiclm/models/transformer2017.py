"""The Transformer: "Attention Is All You Need" (Vaswani et al., Google 2017, arXiv 1706.03762).

What was new: a translator without recurrence. Words exchange what they know in parallel, by attention alone: the
encoder reads the whole source at once, the decoder writes the target from left to right and looks at its own words and
at the encoder's. All later models of this package are one half of it.

Read in this order: `Transformer2017.encode` and `.decode` below, `PostLNBlock` and `PostLNDecoderBlock` in
nn/blocks.py, `sinusoids` in nn/embedding.py, `MultiHeadAttention` in nn/attention.py, then generate/beam.py; with
sections 3 and 5 of the paper beside them.

    classiclm train transformer2017-multi30k --data multi30k --out runs/de-en
    classiclm generate runs/de-en --prompt "Ein Hund läuft durch den Schnee."
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from classiclm.config import Positive, PositiveFloat, Rate
from classiclm.nn.base import EncoderDecoder
from classiclm.nn.blocks import PostLNBlock, PostLNDecoderBlock
from classiclm.nn.cache import DecoderCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.embedding import PositionEmbedding, ReadOut, TokenEmbedding, as_logits, sinusoids
from classiclm.nn.init import init_2017
from classiclm.nn.mask import Mask
from classiclm.recipe import Deviation, PairRecipe


@dataclass(frozen=True)
class Config:
    """The sizes of one Transformer, as in the columns of Table 3."""

    n_layers: Positive = 6  # N: blocks of the encoder, and as many of the decoder
    d_model: Positive = 512  # width of the states
    n_heads: Positive = 8  # h: attention heads
    d_head: Positive | None = None  # d_k: width of a head's queries and keys; null = d_model / n_heads
    d_value: Positive | None = None  # d_v: width of a head's values; null = d_head
    d_ff: Positive | None = None  # width of the MLP; null = 4 d_model
    positions: Literal["sinusoids", "learned"] = "sinusoids"  # row (E) of Table 3
    n_ctx: Positive = 256  # longest sentence in training, and the number of learned positions
    vocab_size: Positive = 40960  # of the vocabulary that both languages share
    dropout: Rate = 0.1  # on embeddings and sub-layer outputs, not on attention weights
    ln_eps: PositiveFloat = 1e-6  # added to the variance in layer norms

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")


BASE = Config()
BIG = Config(d_model=1024, n_heads=16, dropout=0.3)
PRESETS = {
    "transformer2017-base": BASE,
    "transformer2017-big": BIG,
    # Table 3, row by row. (A): heads at equal cost; (B): narrower keys; (C): size; (D): regularisation, here only
    # what the model knows of it; (E): learned positions.
    "transformer2017-a-h1": dataclasses.replace(BASE, n_heads=1, d_head=512),
    "transformer2017-a-h4": dataclasses.replace(BASE, n_heads=4, d_head=128),
    "transformer2017-a-h16": dataclasses.replace(BASE, n_heads=16, d_head=32),
    "transformer2017-a-h32": dataclasses.replace(BASE, n_heads=32, d_head=16),
    "transformer2017-b-dk16": dataclasses.replace(BASE, d_head=16, d_value=64),
    "transformer2017-b-dk32": dataclasses.replace(BASE, d_head=32, d_value=64),
    "transformer2017-c-n2": dataclasses.replace(BASE, n_layers=2),
    "transformer2017-c-n4": dataclasses.replace(BASE, n_layers=4),
    "transformer2017-c-n8": dataclasses.replace(BASE, n_layers=8),
    "transformer2017-c-d256": dataclasses.replace(BASE, d_model=256, d_head=32, d_ff=2048),
    "transformer2017-c-d1024": dataclasses.replace(BASE, d_model=1024, d_head=128, d_ff=2048),
    "transformer2017-c-ff1024": dataclasses.replace(BASE, d_ff=1024),
    "transformer2017-c-ff4096": dataclasses.replace(BASE, d_ff=4096),
    "transformer2017-d-drop0": dataclasses.replace(BASE, dropout=0.0),
    "transformer2017-d-drop2": dataclasses.replace(BASE, dropout=0.2),
    "transformer2017-d-smooth0": BASE,
    "transformer2017-d-smooth2": BASE,
    "transformer2017-e-learned": dataclasses.replace(BASE, positions="learned"),
    # Ours: a size fit for the 29,000 pairs of Multi30k.
    "transformer2017-multi30k": Config(
        n_layers=3, d_model=256, n_heads=4, d_ff=512, n_ctx=128, vocab_size=8000, dropout=0.3
    ),
}

# Table 3, in millions; the rows without a number have the base model's.
PAPER_PARAMS = {
    "transformer2017-base": "65M",
    "transformer2017-big": "213M",
    "transformer2017-b-dk16": "58M",
    "transformer2017-b-dk32": "60M",
    "transformer2017-c-n2": "36M",
    "transformer2017-c-n4": "50M",
    "transformer2017-c-n8": "80M",
    "transformer2017-c-d256": "28M",
    "transformer2017-c-d1024": "168M",
    "transformer2017-c-ff1024": "53M",
    "transformer2017-c-ff4096": "90M",
}


def _noam(d_model: int, warmup: int = 4000) -> float:
    """The peak of d_model^-0.5 min(step^-0.5, step warmup^-1.5), equation 3: its value at step = warmup."""
    return 1 / math.sqrt(d_model * warmup)


# Sections 5.1 to 5.4: 25,000 tokens a side, Adam (0.9, 0.98, 1e-9) without decay or clipping, 100,000 steps.
_BASE = PairRecipe(
    tokenizer="bpe-40960", steps=100_000, lr=_noam(512), schedule="noam", warmup=4000, beta2=0.98, eps=1e-9,
    weight_decay=0.0, clip=None,
)  # fmt: skip
RECIPES = dict.fromkeys(PRESETS, _BASE) | {
    "transformer2017-big": dataclasses.replace(_BASE, steps=300_000, lr=_noam(1024), keep=20),
    "transformer2017-c-d256": dataclasses.replace(_BASE, lr=_noam(256)),
    "transformer2017-c-d1024": dataclasses.replace(_BASE, lr=_noam(1024)),
    "transformer2017-d-smooth0": dataclasses.replace(_BASE, label_smoothing=0.0),
    "transformer2017-d-smooth2": dataclasses.replace(_BASE, label_smoothing=0.2),
    "transformer2017-multi30k": dataclasses.replace(
        _BASE, tokenizer="bpe-8000", batch=4096, steps=3000, lr=1.5e-3, warmup=800
    ),
}


class Transformer2017(EncoderDecoder):
    """An encoder and a decoder of post-LN blocks around one matrix: both embeddings, and the last layer (3.4)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c = config
        self.n_ctx = c.n_ctx if c.positions == "learned" else None
        self.tok_emb = TokenEmbedding(c.vocab_size, c.d_model)
        if c.positions == "learned":
            self.pos_emb = PositionEmbedding(c.n_ctx, c.d_model)
        self.drop = Dropout(c.dropout)
        sizes = (c.d_model, c.n_heads, c.d_head, c.d_ff, "relu")
        rest: dict[str, Any] = {"dropout": c.dropout, "ln_eps": c.ln_eps, "attn_dropout": 0.0, "d_value": c.d_value}
        self.encoder = nn.ModuleList(PostLNBlock(*sizes, **rest) for _ in range(c.n_layers))
        self.decoder = nn.ModuleList(PostLNDecoderBlock(*sizes, **rest) for _ in range(c.n_layers))
        init_2017(self)

    def encode(self, source: Tensor, mask: Mask | None = None) -> Tensor:
        """(B, S) token ids -> (B, S, D). No padding is masked unless `mask` says so: Mask(keep=...), keep (B, S)."""
        x = self.embed(source, 0)
        for block in self.encoder:
            x = block(x, mask=mask)
        return x

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        memory_mask: Mask | None = None,
        cache: DecoderCache | None = None,
        read_out: ReadOut = as_logits,
    ) -> Tensor:
        """(B, T) token ids and the encoder's output (B, S, D) -> (B, T, V) logits of each next target token.

        With a cache, `target` are the new tokens only, and the memory is projected to keys and values just once.
        `read_out` may make something smaller than logits.
        """
        x = self.embed(target, cache.length if cache else 0)
        for i, block in enumerate(self.decoder):
            own = cache.own.layers[i] if cache else None
            read = cache.memory.layers[i] if cache else None
            x = block(x, memory, Mask(causal=True), memory_mask, own, read)
        return read_out(self.tok_emb.logits, x)  # (B, T, D) -> (B, T, V)

    def embed(self, tokens: Tensor, start: int) -> Tensor:
        """Embeddings times sqrt(d_model), plus positions (sections 3.4 and 3.5): (B, T) -> (B, T, D).

        Raises ValueError past n_ctx if the positions are learned.
        """
        x = self.tok_emb(tokens) * math.sqrt(self.config.d_model)
        return self.drop(x + self._positions(start, tokens.shape[1]))

    def _positions(self, start: int, length: int) -> Tensor:  # (T, D)
        if self.config.positions == "learned":
            return self.pos_emb(start, length)
        return sinusoids(start, length, self.config.d_model, self.device)

    def new_cache(self, n_target: int, n_source: int) -> DecoderCache:
        """An empty cache for so many target and source positions."""
        return DecoderCache(self.config.n_layers, n_target, n_source)


build = Transformer2017

DEVIATIONS = (
    Deviation(
        what="Attention projections have biases",
        why="The paper's equations have none; its first public code has them, and with them the counts of Table 3 "
        "come out, at the 40,960 words of that code",
        effect="65,110,016 parameters in the base model; ten of Table 3's eleven counts to the printed rounding. The "
        "big one is 218.3 M against 213 M, which nobody has explained",
        follows="official code",
    ),
    Deviation(
        what="No dropout on attention weights or inside the MLP",
        why="Section 5.4 names sub-layer outputs and embedding sums only; the first code sets the others to 0 (later "
        "versions do not, and a heading for 'Attention Dropout' is commented out in the paper's source)",
        effect="Less regularisation than in most re-implementations",
        follows="paper",
    ),
    Deviation(
        what="Sines and cosines alternate",
        why="Section 3.5; the official code puts all sines before all cosines and spaces the wavelengths by n - 1",
        effect="None: a fixed permutation of the dimensions, which export to other layouts undoes",
        follows="paper",
    ),
    Deviation(
        what="The decoder's first input is the end-of-text token, and padding is that token too, masked",
        why="The paper says 'offset by one position'; the first code feeds a vector of zeros. A learned row is what "
        "others take",
        effect="None known",
        follows="neither",
    ),
    Deviation(
        what="Byte-level BPE, learnt on both languages together, and no 'target space' embedding",
        why="The paper shares a BPE vocabulary of 'about 37,000' words, whose code splits at spaces first; bytes leave "
        "no word unknown and give back the text exactly. The embedding, constant for one language pair, is not in it",
        effect="BLEU is measured on plain text, so nothing depends on a tokenizer's rejoining",
        follows="neither",
    ),
    Deviation(
        what="The 25,000 tokens of a batch are those of the longer side, padding included",
        why="The paper says 'approximately 25000 source tokens and 25000 target tokens'",
        effect="Fewer of either: a step of Multi30k has 3,734 target tokens in place of 4,096",
        follows="neither",
    ),
    Deviation(
        what="Checkpoints are 250 steps apart and averaged when asked for, with --checkpoint mean-5",
        why="Section 6.1 averages the last 5 or 20, written every 10 minutes: about 1,500 steps of the base model",
        effect="For the paper's runs set --save_every 1500",
        follows="neither",
    ),
    Deviation(
        what="Weights start as in the first public code: U(±√(3 / d_in)), embeddings N(0, 1/√d_model)",
        why="The paper does not say",
        effect="Logits of the tied output layer start at about unit variance",
        follows="official code",
    ),
    Deviation(
        what="The loss of training counts the smoothed labels' own entropy; validation is without smoothing",
        why="The official code subtracts that constant from what it prints",
        effect="Training loss reads higher; gradients are equal, and validation losses can be compared",
        follows="neither",
    ),
)
