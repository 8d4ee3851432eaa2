"""GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al., OpenAI 2019).

What was new: nothing but size and care. GPT-1's decoder, up to thirteen times larger, trained on web pages that people
had found worth a link, writes stories and does tasks that nobody trained it for, if only the prompt looks like the
task. Four changes to the network (section 2.3): layer norm moves to the input of each sub-block, one more norm follows
the last block, the weights that write into the residual stream start smaller, and the context doubles to 1,024 tokens.

Read in this order: `GPT2.forward` below, then `PreLNBlock` in nn/blocks.py, then `MultiHeadAttention` in
nn/attention.py, with section 2.3 of the paper beside them.

    classiclm train gpt2-shakespeare-cpu --data shakespeare --out runs/a
    classiclm generate runs/a --prompt "ROMEO:"
"""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from classiclm.config import Positive, Rate
from classiclm.nn.base import LanguageModel
from classiclm.nn.blocks import PreLNBlock
from classiclm.nn.cache import KVCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.embedding import PositionEmbedding, ReadOut, TokenEmbedding, as_logits
from classiclm.nn.init import init_gpt2
from classiclm.nn.mask import Mask
from classiclm.nn.norm import LayerNorm
from classiclm.recipe import Deviation, Recipe


@dataclass(frozen=True)
class Config:
    """The sizes of one GPT-2. `d_head` and `d_ff` are d_model / n_heads and 4 d_model unless set."""

    n_layers: Positive = 12  # blocks
    d_model: Positive = 768  # width of the residual stream
    n_heads: Positive = 12  # attention heads
    d_head: Positive | None = None  # width of a head; null = d_model / n_heads
    d_ff: Positive | None = None  # width of the MLP; null = 4 d_model
    n_ctx: Positive = 1024  # longest input, in tokens
    vocab_size: Positive = 50257  # 256 bytes + 50,000 merges + end of text
    bias: bool = True  # biases in linear layers and norms
    dropout: Rate = 0.0  # on embeddings, attention weights and sub-layer outputs

    def __post_init__(self) -> None:
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(f"n_heads = {self.n_heads} does not divide d_model = {self.d_model}")


# Table 2 of the paper; heads from the released hyper-parameter files (d_head = 64 throughout).
PRESETS = {
    "gpt2-124m": Config(n_layers=12, d_model=768, n_heads=12),
    "gpt2-355m": Config(n_layers=24, d_model=1024, n_heads=16),
    "gpt2-774m": Config(n_layers=36, d_model=1280, n_heads=20),
    "gpt2-1558m": Config(n_layers=48, d_model=1600, n_heads=25),
    # nanoGPT's two recipes for the characters of Shakespeare (README, "quick start").
    "gpt2-shakespeare-cpu": Config(4, 128, 4, n_ctx=64, vocab_size=65, bias=False),
    "gpt2-shakespeare": Config(6, 384, 6, n_ctx=256, vocab_size=65, bias=False, dropout=0.2),
    # The first one with twice the context, for a recipe of ours.
    "gpt2-shakespeare-fast": Config(4, 128, 4, n_ctx=128, vocab_size=65, bias=False),
}

# What the paper's Table 2 prints. OpenAI: "wrong due to an error" (openai/gpt-2, README); GPT-1's vocabulary of 40,478
# in place of 50,257 gives just these numbers.
PAPER_PARAMS = {"gpt2-124m": "117M", "gpt2-355m": "345M", "gpt2-774m": "762M", "gpt2-1558m": "1542M"}

# The paper does not print its recipe. These settings are nanoGPT's for 124M, for batches of about half a million tokens
# (the paper: 512 sequences); the learning rates of the larger ones are those of GPT-3's sizes (its Table 2.1).
_WEB = Recipe(tokenizer="gpt2", batch=480, steps=600_000, lr=6e-4, warmup=2000, beta2=0.95)
_SHAKESPEARE = Recipe(tokenizer="char", batch=64, steps=5000, lr=1e-3, warmup=100, beta2=0.99)
RECIPES = {
    "gpt2-124m": _WEB,
    "gpt2-355m": dataclasses.replace(_WEB, lr=3e-4),
    "gpt2-774m": dataclasses.replace(_WEB, lr=2.5e-4),
    "gpt2-1558m": dataclasses.replace(_WEB, lr=2e-4),
    # Under a minute on two CPU cores. nanoGPT's README has 1.88, from sampled batches.
    "gpt2-shakespeare-cpu": dataclasses.replace(_SHAKESPEARE, batch=12, steps=2000),
    # nanoGPT's README: three minutes on an A100, best validation loss 1.4697.
    "gpt2-shakespeare": _SHAKESPEARE,
    # 1.57 in about a minute on two CPU cores; 1,400 steps of AdamW at a rate of 4e-3 came to 1.69.
    "gpt2-shakespeare-fast": dataclasses.replace(
        _SHAKESPEARE, batch=16, steps=1000, lr=1e-2, lr_floor=0.0, optimizer="muon"
    ),
}


class GPT2(LanguageModel):
    """A stack of pre-LN blocks over token and position embeddings, read out by the token embedding itself."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.n_ctx, self.n_attention = config.n_ctx, config.n_layers
        self.tok_emb = TokenEmbedding(config.vocab_size, config.d_model)
        self.pos_emb = PositionEmbedding(config.n_ctx, config.d_model)
        self.drop = Dropout(config.dropout)
        c = config
        self.blocks = nn.ModuleList(
            PreLNBlock(c.d_model, c.n_heads, c.d_head, c.d_ff, "gelu_tanh", c.bias, c.dropout)
            for _ in range(c.n_layers)
        )
        self.ln_f = LayerNorm(config.d_model, bias=config.bias)  # "an additional layer normalization", section 2.3
        init_gpt2(self, config.n_layers)

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
        mask = mask or Mask(causal=True)
        for i, block in enumerate(self.blocks):
            x = block(x, mask=self.layer_mask(i, mask), cache=cache.layers[i] if cache else None)
        return read_out(self.tok_emb.logits, self.ln_f(x))  # (B, T, D) -> (B, T, V)

    def layer_mask(self, layer: int, mask: Mask) -> Mask:
        """What layer 0, 1, ... may see of what `mask` allows: here, all of it."""
        return mask


build = GPT2

DEVIATIONS = (
    Deviation(
        what="Residual projections start at 0.02 / √(2 n_layers); position embeddings at 0.02",
        why="Section 2.3 asks for 1/√N with N residual layers; the released model.py has neither the factor nor "
        "0.02 for positions (it uses 0.01). The reading 'two residual layers per block' is the common one",
        effect="The residual stream starts with the same size at any depth",
        follows="paper",
    ),
    Deviation(
        what="Dropout is 0 in the four published sizes",
        why="Neither the paper nor the released code says; GPT-1 used 0.1, and all models still underfit (section 3)",
        effect="Right for one pass over web text; set --model.dropout 0.1 for small corpora",
        follows="neither",
    ),
    Deviation(
        what="Optimizer, schedule, steps and a batch of 480 are nanoGPT's for 124M; larger sizes take GPT-3's rates",
        why="The paper prints only the batch, 512 sequences, and says that the learning rate was tuned by hand",
        effect="About 2.85 nats per token on OpenWebText after 300 G tokens at 124 M (nanoGPT, README)",
        follows="neither",
    ),
    Deviation(
        what="gpt2-shakespeare-fast moves the matrices of blocks with Muon (Jordan et al. 2024)",
        why="It shows how far the same network comes in the minute that nanoGPT's recipe takes; nothing else uses it",
        effect="A validation loss of 1.57 in place of 1.90 in less time, on a CPU",
        follows="neither",
    ),
    Deviation(
        what="`bias=False` exists, and the Shakespeare presets use it",
        why="They follow nanoGPT's recipes, which leave biases out of linear layers and norms",
        effect="Slightly fewer parameters; the four published sizes keep their biases",
        follows="neither",
    ),
)
