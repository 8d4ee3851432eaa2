"""The ladder: twelve language models from a table of character pairs to a GPT, each one idea above the one before.

It follows no single paper; the road is that of Karpathy's lecture "Let's build GPT" (ng-video-lecture, 2023), and the
rungs are those of the history: Shannon's letter pairs (1948), Bahdanau's attention (2014) as self-attention and in
several heads (Vaswani et al. 2017), the residual connection (He et al. 2015), layer normalisation (Ba et al. 2016)
behind and before each sub-layer, dropout (Srivastava et al. 2014), and size.

Read the classes in their order, then `LADDER`: each entry says what changes against the entry above it, and nothing
else does. Rung 12 has GPT-2's topology and parameter names; given GPT-2's sizes and weights it gives GPT-2's logits.

    classiclm ladder --data shakespeare --out runs/ladder
    classiclm ladder show 8
    classiclm ladder diff 8 9
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from classiclm.config import Positive, Rate
from classiclm.nn.attention import MultiHeadAttention
from classiclm.nn.base import LanguageModel
from classiclm.nn.blocks import Block, PlainBlock, PostLNBlock, PreLNBlock, ResidualBlock
from classiclm.nn.cache import KVCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.embedding import PositionEmbedding, ReadOut, TokenEmbedding, as_logits
from classiclm.nn.init import init_fan_in
from classiclm.nn.mask import Mask
from classiclm.nn.norm import LayerNorm
from classiclm.recipe import Deviation, Recipe


@dataclass(frozen=True)
class Config:
    """The sizes of one rung; a rung ignores those it has no use for (a table has no heads)."""

    rung: Annotated[int, Field(ge=1, le=12)] = 12  # which of the twelve
    n_layers: Positive = 1  # blocks
    d_model: Positive = 64  # width
    n_heads: Positive = 1  # attention heads
    d_ff: Positive = 64  # width of the MLP
    n_ctx: Positive = 64  # longest input, in tokens
    vocab_size: Positive = 65  # characters
    dropout: Rate = 0.0  # on embeddings, attention weights and sub-layer outputs

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")


class Bigram(LanguageModel):
    """A table: the row of the present token holds the logits of the next. It knows nothing of the tokens before."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.table = TokenEmbedding(config.vocab_size, config.vocab_size)
        init_fan_in(self)

    def forward(
        self,
        tokens: Tensor,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        read_out: ReadOut = as_logits,
    ) -> Tensor:
        """(B, T) -> (B, T, V)."""
        return read_out(self.table, tokens)


class Embedded(LanguageModel, ABC):
    """What rungs 2 to 12 share: tokens and positions become vectors, `body` mixes them, dot products read them out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.n_ctx, self.n_attention = config.n_ctx, config.n_layers
        self.tok_emb = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_emb = PositionEmbedding(config.n_ctx, config.d_model)
        self.drop = Dropout(config.dropout)
        self.add_body(config)
        init_fan_in(self)

    def forward(
        self,
        tokens: Tensor,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        read_out: ReadOut = as_logits,
    ) -> Tensor:
        """(B, T) -> (B, T, V). With a cache, `tokens` are the new ones only. Raises ValueError past n_ctx."""
        start = cache.length if cache else 0
        x = self.drop(self.tok_emb(tokens) + self.pos_emb(start, tokens.shape[1], positions))  # (B, T, D)
        x = self.body(x, mask or Mask(causal=True), cache)  # (B, T, D)
        return read_out(self.tok_emb.logits, x)  # (B, T, V)

    @abstractmethod
    def add_body(self, config: Config) -> None:
        """Make the modules of the body."""

    @abstractmethod
    def body(self, x: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        """(B, T, D) -> (B, T, D): the only place where positions exchange anything."""


class Attention(Embedded):
    """Each position gathers from the ones before it what its query asks for."""

    def add_body(self, config: Config) -> None:
        self.attn = MultiHeadAttention(config.d_model, config.n_heads)

    def body(self, x: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        return self.attn(x, mask=mask, cache=cache.layers[0] if cache else None)


class PlainStack(Embedded):
    """Blocks of attention and MLP, each replacing what came before."""

    block: ClassVar[type[Block]] = PlainBlock

    def add_body(self, config: Config) -> None:
        c = config
        self.blocks = nn.ModuleList(
            self.block(c.d_model, c.n_heads, d_ff=c.d_ff, dropout=c.dropout) for _ in range(c.n_layers)
        )

    def body(self, x: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, mask=mask, cache=cache.layers[i] if cache else None)
        return x


class ResidualStack(PlainStack):
    """Blocks that add to what came before."""

    block = ResidualBlock


class PostLNStack(PlainStack):
    """Blocks that add, then normalise."""

    block = PostLNBlock


class PreLNStack(PlainStack):
    """Blocks that normalise what they read, then add; one more norm before the read-out."""

    block = PreLNBlock

    def add_body(self, config: Config) -> None:
        super().add_body(config)
        self.ln_f = LayerNorm(config.d_model)

    def body(self, x: Tensor, mask: Mask, cache: KVCache | None) -> Tensor:
        return self.ln_f(super().body(x, mask, cache))


@dataclass(frozen=True)
class Rung:
    """One entry of the ladder: its name, its idea, its class, and the sizes that change against the rung before."""

    name: str
    idea: str
    model: type[LanguageModel]
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


LADDER = (
    Rung("bigram table", "Look up the next character by the present one.", Bigram),
    Rung("one attention head", "Look at all characters so far, weighted by relevance.", Attention),
    Rung("multi-head", "Four smaller lookups at once instead of one.", Attention, {"n_heads": 4}),
    Rung("+ MLP", "Think about what was gathered, at each position by itself.", PlainStack),
    Rung("three blocks", "Repeat gather-and-think three times.", PlainStack, {"n_layers": 3}),
    Rung("+ residual", "Each layer adds a correction instead of replacing its input.", ResidualStack),
    Rung("+ wide MLP", "Think in four times as many dimensions.", ResidualStack, {"d_ff": 256}),
    Rung("post-LN", "Normalise behind each addition, as in 2017.", PostLNStack),
    Rung("pre-LN", "Normalise what a layer reads, leave the sum alone, as in GPT-2.", PreLNStack),
    Rung(
        "+ dropout",
        "Switch off a random twentieth of the activations while learning.",
        PreLNStack,
        {"dropout": 0.05},
    ),
    Rung("deeper", "Six blocks instead of three.", PreLNStack, {"n_layers": 6}),
    Rung("scaled up", "Twice the width and context.", PreLNStack, {"d_model": 128, "d_ff": 512, "n_ctx": 128}),
)


def config_of(rung: int) -> Config:
    """The sizes of a rung: all changes up to it, one over the other."""
    sizes: dict[str, Any] = {}
    for step in LADDER[:rung]:
        sizes |= step.changes
    return Config(rung=rung, **sizes)


def build(config: Config) -> LanguageModel:
    """The model of config.rung, with fresh weights."""
    return LADDER[config.rung - 1].model(config)


PRESETS = {f"ladder-{rung}": config_of(rung) for rung in range(1, 13)}
# With a GPU there is time for nanoGPT's size.
PRESETS["ladder-12-gpu"] = dataclasses.replace(config_of(12), d_model=384, n_heads=6, d_ff=1536, n_ctx=256, dropout=0.2)

PAPER_PARAMS: dict[str, str] = {}  # no paper printed any

# One recipe for all, 2,048 characters a step. A table needs a larger rate: its logits have to travel far, and each
# entry is seen seldom.
_RECIPE = Recipe(tokenizer="char", batch=32, steps=4000, lr=5e-3, lr_floor=0.1, warmup=100, weight_decay=0.01)
RECIPES = dict.fromkeys(PRESETS, _RECIPE) | {
    "ladder-1": dataclasses.replace(_RECIPE, lr=1e-2),
    "ladder-12": dataclasses.replace(_RECIPE, batch=16),  # of windows twice as long
    "ladder-12-gpu": dataclasses.replace(_RECIPE, batch=64, steps=5000, lr=1e-3, weight_decay=0.1),
}

DEVIATIONS = (
    Deviation(
        what="From rung 2 on the output layer is the token embedding, without bias, and attention has biases",
        why="The lecture unties them and gives queries, keys and values none; here the ladder has to end in GPT-2",
        effect="A few thousand parameters fewer on each rung",
        follows="neither",
    ),
    Deviation(
        what="64 wide with a context of 64, and one recipe for all; residuals and the wide MLP are rungs of their own",
        why="The lecture is 32 wide with a context of 8 until its last step, and adds both with the three blocks",
        effect="Lower losses than the lecture's on rungs 2 to 9; the two do not compare",
        follows="neither",
    ),
    Deviation(
        what="tanh GELU in every MLP",
        why="The lecture uses ReLU; GPT-2 does not, and a change of activation is no rung of its own",
        effect="Small",
        follows="neither",
    ),
    Deviation(
        what="Weights start at N(0, 1/√d_in) on all rungs",
        why="GPT-2's 0.02 would let signals die in every linear layer of the stacks without residuals",
        effect="Averaging and GELU still shrink a signal on rung 5, but the linear layers are not to blame",
        follows="neither",
    ),
)
