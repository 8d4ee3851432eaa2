"""GPT-1: "Improving Language Understanding by Generative Pre-Training" (Radford et al., OpenAI 2018).

What was new: pre-train first, on text that nobody had to label, and then let the same network learn each task from its
few labelled examples, with hardly any change to it. The network is the decoder of 2017 without its encoder: twelve
post-LN blocks that predict the next token, with learned positions and GELU instead of sinusoids and ReLU.

Read in this order: `GPT1.forward` below, `PostLNBlock` in nn/blocks.py, then `GPT2.forward` in gpt2.py to see what
moved; with section 4.1 of the paper beside them.

    classiclm train gpt1-tiny --data shakespeare --out runs/gpt1
    classiclm generate runs/gpt1 --prompt "my lord ,"
"""

from dataclasses import dataclass

from torch import Tensor, nn

from classiclm.config import Positive, Rate
from classiclm.nn.base import LanguageModel
from classiclm.nn.blocks import PostLNBlock
from classiclm.nn.cache import KVCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.embedding import PositionEmbedding, ReadOut, TokenEmbedding, as_logits
from classiclm.nn.init import init_gpt1
from classiclm.nn.mask import Mask
from classiclm.recipe import Deviation, Recipe


@dataclass(frozen=True)
class Config:
    """The sizes of one GPT-1 (section 4.1)."""

    n_layers: Positive = 12  # blocks
    d_model: Positive = 768  # width of the states
    n_heads: Positive = 12  # attention heads
    d_head: Positive | None = None  # width of a head; null = d_model / n_heads
    d_ff: Positive | None = None  # width of the MLP; null = 4 d_model
    n_ctx: Positive = 512  # longest input, in tokens
    vocab_size: Positive = 40478  # 40,000 merges, 238 characters with and without end of word, <unk>, line break
    dropout: Rate = 0.1  # on embeddings, attention weights and sub-layer outputs

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")


PRESETS = {
    "gpt1-117m": Config(),
    # Ours, for first tries on a laptop.
    "gpt1-tiny": Config(n_layers=4, d_model=128, n_heads=4, n_ctx=128, vocab_size=2000),
}

PAPER_PARAMS = {"gpt1-117m": "117M"}  # as GPT-2's paper and the release call it; this paper prints no count

# Section 4.1: batches of 64 sequences of 512 tokens, 100 epochs of BooksCorpus (about 1 G tokens, so about 3 M steps),
# warm-up over 2,000 updates to 2.5e-4, a cosine down to 0, decay 0.01 "on all non bias or gain weights". Optimizer and
# clipping as in the released code for fine-tuning, the only one there is.
RECIPES = {
    "gpt1-117m": Recipe(
        tokenizer="gpt1", batch=64, steps=3_000_000, lr=2.5e-4, lr_floor=0.0, warmup=2000, optimizer="adam-gpt1",
        beta2=0.999, weight_decay=0.01, clip=1.0,
    ),
    "gpt1-tiny": Recipe(
        tokenizer="gpt1-bpe-2000", batch=16, steps=1000, lr=1e-3, lr_floor=0.0, warmup=200, optimizer="adam-gpt1",
        beta2=0.999, weight_decay=0.01, clip=1.0,
    ),
}  # fmt: skip


class GPT1(LanguageModel):
    """A stack of post-LN blocks over token and position embeddings, read out by the token embedding itself.

    h_0 = U W_e + W_p, h_l = block(h_(l-1)), P(u) = softmax(h_n W_e^T): equation 2.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.n_ctx, self.n_attention = config.n_ctx, config.n_layers
        self.tok_emb = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_emb = PositionEmbedding(config.n_ctx, config.d_model)
        self.drop = Dropout(config.dropout)
        c = config
        self.blocks = nn.ModuleList(
            PostLNBlock(c.d_model, c.n_heads, c.d_head, c.d_ff, "gelu_tanh", dropout=c.dropout)
            for _ in range(c.n_layers)
        )
        init_gpt1(self)

    def forward(
        self,
        tokens: Tensor,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        read_out: ReadOut = as_logits,
    ) -> Tensor:
        """(B, T) token ids -> (B, T, V) logits of each next token.

        With a cache, `tokens` are the new ones only. `positions` (B, T) are for sequences that do not all begin at the
        first column. `read_out` may make something smaller than logits. Raises ValueError past n_ctx.
        """
        start = cache.length if cache else 0
        x = self.drop(self.tok_emb(tokens) + self.pos_emb(start, tokens.shape[1], positions))  # (B, T, D)
        for i, block in enumerate(self.blocks):
            x = block(x, mask=mask or Mask(causal=True), cache=cache.layers[i] if cache else None)
        return read_out(self.tok_emb.logits, x)  # (B, T, D) -> (B, T, V); the last block has normalised x already


build = GPT1

DEVIATIONS = (
    Deviation(
        what="Token and position embeddings are two matrices, and only tokens can be predicted",
        why="The released code keeps both, and three task tokens, in one matrix whose every row is a class of the "
        "softmax: positions are predictable there. Equation 2 of the paper has two matrices",
        effect="116,534,784 parameters without the task tokens; published weights give the same logits for tokens",
        follows="paper",
    ),
    Deviation(
        what="Dropout on the sum of the embeddings",
        why="The released code drops entries of the embedding matrix itself, once a step, so that the tied softmax "
        "sees the same holes; the paper says 'embedding dropouts' and no more",
        effect="None when generating; none known in training",
        follows="paper",
    ),
    Deviation(
        what="3,000,000 steps",
        why="The paper trains for 100 epochs of a corpus that is no longer distributed, and prints no number of steps",
        effect="Set --steps for a corpus of another size",
        follows="paper",
    ),
    Deviation(
        what="The first update has lr / (warmup + 1), and the cosine begins where the warm-up ends",
        why="In the released code the first update has a rate of 0, and its cosine runs from step 0 and so jumps at "
        "the end of the warm-up",
        effect="None expected",
        follows="paper",
    ),
    Deviation(
        what="Text is not repaired by ftfy, and words are split by our own rules in place of spaCy's",
        why="Both are heavy, and spaCy's rules change between versions; ours are fixed, and compared with the original "
        "pipeline in the tests",
        effect="Equal tokens on every line of WikiText-2's validation split and of tiny Shakespeare; web addresses "
        "with capitals, HTML entities and rare forms are cut otherwise",
        follows="neither",
    ),
)
