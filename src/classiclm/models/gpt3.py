"""GPT-3: "Language Models are Few-Shot Learners" (Brown et al., OpenAI 2020, arXiv 2005.14165).

What was new: scale, and what came with it. A GPT-2 a hundred times larger does tasks from a few examples in its prompt,
without a single gradient step ("in-context learning"). The network is GPT-2's (section 2.1: "the same model and
architecture as GPT-2"), with a context of 2,048 tokens and attention layers that are dense and locally banded in turn.

Read in this order: `GPT3.layer_mask` below, `GPT2` in gpt2.py, then `attend_banded` in nn/attention.py; with sections
2.1 and 2.3, Table 2.1 and appendix B of the paper beside them.

    model = classiclm.GPT3.from_preset("small")   # 125 M parameters, fresh weights
    classiclm train gpt3-tiny --data shakespeare --out runs/g3
"""

import dataclasses
from dataclasses import dataclass

from classiclm.config import Positive
from classiclm.models import gpt2
from classiclm.nn.mask import Mask
from classiclm.recipe import Deviation, TokenRecipe


@dataclass(frozen=True)
class Config(gpt2.Config):
    """The sizes of one GPT-3. `band` is the width of the locally banded layers; null makes every layer dense."""

    n_ctx: Positive = 2048  # longest input, in tokens
    band: Positive | None = 256  # keys that a banded layer sees, the query's own included; null = all layers dense


# Table 2.1, with two misprints set right by the parameter counts of Table D.1: XL has 16 heads (printed: 24, which
# would be 1.52 G parameters; GPT-Neo took 32), and 13B has d_model 5120 (printed: 5140, against 40 heads of 128).
PRESETS = {
    "gpt3-small": Config(n_layers=12, d_model=768, n_heads=12),
    "gpt3-medium": Config(n_layers=24, d_model=1024, n_heads=16),
    "gpt3-large": Config(n_layers=24, d_model=1536, n_heads=16),
    "gpt3-xl": Config(n_layers=24, d_model=2048, n_heads=16),
    "gpt3-2.7b": Config(n_layers=32, d_model=2560, n_heads=32),
    "gpt3-6.7b": Config(n_layers=32, d_model=4096, n_heads=32),
    "gpt3-13b": Config(n_layers=40, d_model=5120, n_heads=40),
    "gpt3-175b": Config(n_layers=96, d_model=12288, n_heads=96),
    # Ours, for first tries on a laptop.
    "gpt3-tiny": Config(n_layers=4, d_model=128, n_heads=4, n_ctx=128, vocab_size=512, band=32),
}

# What Table D.1 counts.
PAPER_PARAMS = {
    "gpt3-small": "125M",
    "gpt3-medium": "356M",
    "gpt3-large": "760M",
    "gpt3-xl": "1,320M",
    "gpt3-2.7b": "2,650M",
    "gpt3-6.7b": "6,660M",
    "gpt3-13b": "12,850M",
    "gpt3-175b": "174,600M",
}

# Table 2.1: batch and learning rate. Appendix B: beta2 0.95, 300 G tokens in all, warm-up over 375 M, cosine to 10 % at
# 260 G and flat from there on, the batch growing from 32 k tokens. 0.5 M tokens are 256 windows, and so on.
_RECIPE = TokenRecipe(
    tokenizer="gpt2",
    beta2=0.95,
    weight_decay=0.1,
    clip=1.0,
    warmup_tokens=375_000_000,
    decay_tokens=260_000_000_000,
    ramp_from=16,
)


def _recipe(batch: int, lr: float, ramp_tokens: int, steps: int) -> TokenRecipe:
    return dataclasses.replace(_RECIPE, batch=batch, lr=lr, ramp_tokens=ramp_tokens, steps=steps)


_G = 1_000_000_000
RECIPES = {
    "gpt3-small": _recipe(256, 6.0e-4, 4 * _G, 591_581),
    "gpt3-medium": _recipe(256, 3.0e-4, 4 * _G, 591_581),
    "gpt3-large": _recipe(256, 2.5e-4, 4 * _G, 591_581),
    "gpt3-xl": _recipe(512, 2.0e-4, 6 * _G, 304_170),
    "gpt3-2.7b": _recipe(512, 1.6e-4, 6 * _G, 304_170),
    "gpt3-6.7b": _recipe(1024, 1.2e-4, 8 * _G, 157_562),
    "gpt3-13b": _recipe(1024, 1.0e-4, 10 * _G, 161_189),
    "gpt3-175b": _recipe(1536, 0.6e-4, 12 * _G, 111_355),
    "gpt3-tiny": TokenRecipe(
        tokenizer="bpe-512", batch=16, steps=1500, lr=2e-3, beta2=0.95, warmup_tokens=100_000,
        decay_tokens=1_800_000, ramp_tokens=500_000, ramp_from=2,
    ),
}  # fmt: skip


class GPT3(gpt2.GPT2):
    """GPT-2 with alternating layers: 0, 2, ... see everything before them, 1, 3, ... only the last `band` tokens."""

    def layer_mask(self, layer: int, mask: Mask) -> Mask:
        """Dense for even layers, locally banded for odd ones (section 2.1; the order is our choice)."""
        banded = self.config.band is not None and layer % 2 == 1
        return dataclasses.replace(mask, window=self.config.band) if banded else mask


build = GPT3

DEVIATIONS = (
    Deviation(
        what="Banded layers are 256 tokens wide, and the odd ones (0 is dense)",
        why="The paper says 'alternating dense and locally banded sparse' and no more: width, block size and order "
        "are unpublished. GPT-Neo alternates in the same order",
        effect="Unknown to anybody outside; --model.band null makes all layers dense, which is what most others train",
        follows="neither",
    ),
    Deviation(
        what="XL has 16 heads and 13B a d_model of 5120",
        why="Table 2.1 prints 24 heads and 5140; the counts of Table D.1 (1,320 M and 12,850 M) are only met by these",
        effect="1,315,723,264 and 12,853,386,240 parameters; as printed, XL would have 1.52 G",
        follows="paper",
    ),
    Deviation(
        what="The batch ramps from 32,768 tokens over 4 G (small to large), 6 G (XL, 2.7B), 8, 10 and 12 G tokens",
        why="Appendix B says 'over the first 4-12 billion tokens, depending on the model size'",
        effect="Small: at most 4 % of the run",
        follows="paper",
    ),
    Deviation(
        what="0.5 M, 1 M, 2 M and 3.2 M tokens a step are 256, 512, 1,024 and 1,536 windows of 2,048",
        why="Round numbers of the table, as multiples of the ramp's first batch; others do the same",
        effect="175B takes 3.15 M tokens a step",
        follows="neither",
    ),
    Deviation(
        what="Weight decay acts on all matrices, embeddings included",
        why="The paper gives 0.1 and does not say on what",
        effect="Small",
        follows="neither",
    ),
)
