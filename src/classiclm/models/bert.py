"""BERT: "Pre-training of Deep Bidirectional Transformers for Language Understanding" (Devlin et al., Google 2018).

What was new: a word is understood from both of its sides. A next-token model may only look left, or it would see what
it has to predict; BERT hides 15 % of the tokens instead and restores them from everything around them (masked language
model, section 3.1), and besides says whether one piece of text follows another (next sentence prediction). The network
is the encoder of 2017 with learned positions and GELU; after pre-training it is fine-tuned on each task.

Read in this order: `BERT.encode` and `BERT.forward` below, `PostLNBlock` in nn/blocks.py, `MaskedLM` in objectives.py,
then data/masked.py, which makes the exercises; with section 3.1 and appendix A of the paper beside them.

    classiclm train bert-shakespeare --data shakespeare --out runs/bert
    classiclm generate runs/bert --prompt "what is thy [MASK] , sir ?"
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classiclm.config import Positive, Rate
from classiclm.nn.base import Model
from classiclm.nn.blocks import PostLNBlock
from classiclm.nn.dropout import Dropout
from classiclm.nn.embedding import PositionEmbedding, ReadOut, TokenEmbedding, as_logits
from classiclm.nn.init import init_bert
from classiclm.nn.mask import Mask
from classiclm.nn.mlp import ACTIVATIONS
from classiclm.nn.norm import LayerNorm
from classiclm.recipe import Deviation, MaskedRecipe

LN_EPS = 1e-12  # the default of TensorFlow 1's layer norm


@dataclass(frozen=True)
class Config:
    """The sizes of one BERT (section 3)."""

    n_layers: Positive = 12  # blocks
    d_model: Positive = 768  # width of the states
    n_heads: Positive = 12  # attention heads
    d_head: Positive | None = None  # width of a head; null = d_model / n_heads
    d_ff: Positive | None = None  # width of the MLP; null = 4 d_model
    n_ctx: Positive = 512  # longest input, in tokens
    n_segments: Positive = 2  # kinds of segment: the first text and the second
    vocab_size: Positive = 30522  # WordPieces of the uncased English vocabulary
    dropout: Rate = 0.1  # on embeddings, attention weights and sub-layer outputs

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")
        if self.n_segments < 2:
            raise ValueError(f"n_segments = {self.n_segments} leaves no second segment")


PRESETS = {
    "bert-base": Config(),
    "bert-large": Config(n_layers=24, d_model=1024, n_heads=16),
    # The smaller models of the official repository (heads of 64 throughout).
    "bert-tiny": Config(n_layers=2, d_model=128, n_heads=2),
    "bert-mini": Config(n_layers=4, d_model=256, n_heads=4),
    "bert-small": Config(n_layers=4, d_model=512, n_heads=8),
    "bert-medium": Config(n_layers=8, d_model=512, n_heads=8),
    # Ours: bert-tiny's shape for a megabyte of text and ten minutes of a laptop.
    "bert-shakespeare": Config(n_layers=2, d_model=128, n_heads=2, n_ctx=64, vocab_size=2048, dropout=0.0),
}

PAPER_PARAMS = {"bert-base": "110M", "bert-large": "340M"}

# Appendix A.2: 256 sequences, 1 M steps, 90 % of them at length 128, warm-up over 10,000 steps to 1e-4 and a linear
# decay, L2 decay of 0.01. The optimizer, without bias correction, is that of the official code.
_PAPER = MaskedRecipe(
    tokenizer="bert", batch=256, steps=1_000_000, lr=1e-4, lr_floor=0.0, schedule="linear", warmup=10_000,
    optimizer="adam-bert", beta2=0.999, eps=1e-6, weight_decay=0.01, clip=1.0, first_ctx=128,
)  # fmt: skip
RECIPES = dict.fromkeys(PRESETS, _PAPER) | {
    "bert-shakespeare": dataclasses.replace(
        _PAPER, tokenizer="wordpiece-2048", batch=64, steps=8000, lr=1e-3, warmup=400, first_ctx=None,
        masking="dynamic",
    ),
}  # fmt: skip


class Logits(NamedTuple):
    """What BERT says of a batch, before softmax."""

    mlm: Tensor  # (B, P, V) of the tokens at the asked places, (B, T, V) if none were named
    nsp: Tensor  # (B, 2): does the second segment follow the first? 0 = it does, 1 = it is from elsewhere


class BERT(Model):
    """A stack of post-LN blocks that see both ways, with a head for masked tokens and one for sentence pairs."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.n_ctx = config.n_ctx
        c = config
        self.tok_emb = TokenEmbedding(c.vocab_size, c.d_model)
        self.pos_emb = PositionEmbedding(c.n_ctx, c.d_model)
        self.seg_emb = TokenEmbedding(c.n_segments, c.d_model)
        self.ln_emb = LayerNorm(c.d_model, LN_EPS)
        self.drop = Dropout(c.dropout)
        self.blocks = nn.ModuleList(
            PostLNBlock(c.d_model, c.n_heads, c.d_head, c.d_ff, "gelu", dropout=c.dropout, ln_eps=LN_EPS)
            for _ in range(c.n_layers)
        )
        self.pooler = nn.Linear(c.d_model, c.d_model)
        self.mlm = MaskedHead(c.d_model, c.vocab_size)
        self.nsp = nn.Linear(c.d_model, 2)
        init_bert(self)

    def encode(self, tokens: Tensor, segments: Tensor | None = None, mask: Mask | None = None) -> Tensor:
        """(B, T) token ids, (B, T) segment ids (all 0 if None) -> (B, T, D). Raises ValueError past n_ctx.

        No padding is masked unless `mask` says so: Mask(keep=...) with keep (B, T).
        """
        segments = torch.zeros_like(tokens) if segments is None else segments
        x = self.tok_emb(tokens) + self.seg_emb(segments) + self.pos_emb(0, tokens.shape[1])  # Figure 2: (B, T, D)
        x = self.drop(self.ln_emb(x))
        for block in self.blocks:
            x = block(x, mask=mask)
        return x

    def pool(self, x: Tensor) -> Tensor:
        """The whole input in one vector: (B, T, D) -> (B, D), from the state of [CLS], its first token."""
        return self.pooler(x[:, 0]).tanh()

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        mask: Mask | None = None,
        places: Tensor | None = None,
        read_out: ReadOut = as_logits,
    ) -> Logits:
        """The pre-training heads. `places` (B, P): the positions to restore, all if None (slower: P V numbers each).

        `read_out` may make something smaller of the masked tokens' logits.
        """
        x = self.encode(tokens, segments, mask)  # (B, T, D)
        asked = x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))  # (B, P, D)
        mlm = read_out(lambda states: self.mlm(states, self.tok_emb), asked)  # (B, P, D) -> (B, P, V)
        return Logits(mlm, self.nsp(self.pool(x)))


class MaskedHead(nn.Module):
    """One more dense layer, then dot products with the token embeddings, and a bias for each token."""

    def __init__(self, d_model: int, vocab_size: int):
        super().__init__()
        self.dense = nn.Linear(d_model, d_model)
        self.ln = LayerNorm(d_model, LN_EPS)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor, embedding: TokenEmbedding) -> Tensor:  # (B, P, D) -> (B, P, V)
        return embedding.logits(self.ln(ACTIVATIONS["gelu"](self.dense(x)))) + self.bias


build = BERT

DEVIATIONS = (
    Deviation(
        what="GELU is the exact form, with erf",
        why="The first release of the official code had it; a commit of February 2019 replaced it by the tanh form. "
        "Others load the published weights with erf",
        effect="The two forms differ by at most 0.0005",
        follows="official code",
    ),
    Deviation(
        what="256 sequences in both phases, of 128 tokens for 90 % of the steps and of 512 for the rest",
        why="Appendix A.2 says both; 256 x 512 is 131,072 and not the 128,000 that it prints, and with 128 "
        "tokens it is a quarter of that",
        effect="42.6 G tokens in 1 M steps, and not 40 epochs of 3.3 G words",
        follows="paper",
    ),
    Deviation(
        what="Behind the warm-up the rate is on the line from lr at step 0 to 0 at the end; the first update has "
        "lr / (warmup + 1)",
        why="The paper says 'linear decay'; the official code counts it from step 0. Its first update has a rate of 0",
        effect="A fall by 1 % where the warm-up ends",
        follows="official code",
    ),
    Deviation(
        what="Sentences are lines and documents are blank-line blocks",
        why="The official code wants its input so, and leaves the splitting to its user",
        effect="Prepare a text accordingly: a line that is no sentence is taken for one",
        follows="official code",
    ),
    Deviation(
        what="Short sequences are drawn one by one, a random segment is never from the same document, and every epoch "
        "has the same number of sequences",
        why="The official program shortens one document in ten, tries ten times for another document, and writes its "
        "sequences to files beforehand; here the batch of a step follows from its number alone",
        effect="One sequence in a hundred is left out of an epoch, another one in each",
        follows="neither",
    ),
    Deviation(
        what="WordPiece vocabularies are learnt by the merges of the tokenizers library",
        why="The original learner was never released",
        effect="A vocabulary of our own differs from what Google would have learnt; the published one is read as it is",
        follows="neither",
    ),
    Deviation(
        what="bert-shakespeare has no dropout, a rate of 1e-3, 64 tokens and masks drawn anew in each epoch",
        why="It is a preset of ours: two blocks on a megabyte of text underfit within its ten minutes",
        effect="See 'what to expect' in docs/papers/bert.md",
        follows="neither",
    ),
)
