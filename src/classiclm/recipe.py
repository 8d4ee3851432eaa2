"""Recipes: how a paper, or its official code, trains a model. Each model file has a literal table of them.

A recipe's class says what kind of learning it is (`task`): the next token of a text, the masked tokens of sentence
pairs, or translation. That is all that the training commands need to know of a paper.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from classiclm.config import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Rate, Share


@dataclass(frozen=True)
class Recipe:
    """Learn to predict the next token of a text: the ladder and the GPTs."""

    task: ClassVar[str] = "causal"
    tokenizer: str = "char"  # char, bpe-N, gpt1-bpe-N, wordpiece-N, gpt1, gpt2, bert, or the path of a tokenizer.json
    batch: Positive = 64  # sequences in one optimizer step
    steps: Positive = 5000  # optimizer steps
    lr: PositiveFloat = 1e-3  # peak learning rate
    lr_floor: Rate = 0.1  # the last learning rate, as a share of the peak
    schedule: Literal["cosine", "linear", "noam"] = "cosine"  # what follows the warm-up; noam = 1/sqrt(step)
    warmup: NonNegative = 100  # steps of linear warm-up
    optimizer: Literal["adamw", "muon", "adam-gpt1", "adam-bert"] = "adamw"  # or as GPT-1's and BERT's code have it
    beta1: Rate = 0.9  # Adam
    beta2: Rate = 0.99  # Adam
    eps: PositiveFloat = 1e-8  # Adam
    weight_decay: NonNegativeFloat = 0.1  # decoupled, on matrices only
    clip: PositiveFloat | None = 1.0  # largest norm of the whole gradient; null = no clipping


@dataclass(frozen=True)
class TokenRecipe(Recipe):
    """As `Recipe`, with a rate that follows the tokens seen and a batch that grows with them: GPT-3 (appendix B)."""

    warmup_tokens: Positive | None = None  # with decay_tokens: the warm-up, counted in tokens instead of steps
    decay_tokens: Positive | None = None  # tokens at which the cosine ends; from there on the rate stays at its floor
    ramp_tokens: NonNegative = 0  # tokens over which the batch grows linearly from ramp_from to its full size
    ramp_from: Positive = 1  # sequences in the first step of such a ramp

    def __post_init__(self) -> None:
        if (self.warmup_tokens is None) != (self.decay_tokens is None):
            raise ValueError("warmup_tokens and decay_tokens go together")
        if self.decay_tokens is not None and self.warmup_tokens is not None and self.decay_tokens <= self.warmup_tokens:
            raise ValueError("decay_tokens should be more than warmup_tokens")
        if self.ramp_tokens and self.ramp_from > self.batch:
            raise ValueError(f"ramp_from = {self.ramp_from} is more than batch = {self.batch}")


@dataclass(frozen=True)
class MaskedRecipe(Recipe):
    """Learn to restore masked tokens, and to tell whether one segment follows the other: BERT (section 3.1)."""

    task: ClassVar[str] = "masked"
    masking: Literal["static", "dynamic"] = "static"  # static: n_sets times, then repeated; dynamic: anew in each epoch
    n_sets: Positive = 10  # how many differently cut and masked copies of the text static masking makes
    mask_share: Annotated[Share, Field(gt=0)] = 0.15  # of the tokens are to be predicted
    mask_token: Share = 0.8  # of those become [MASK]
    mask_random: Share = 0.1  # of those become a random token; the rest stay as they are
    short_share: Share = 0.1  # of the sequences are cut to a random shorter length
    first_ctx: Positive | None = None  # tokens of a sequence in the first phase of training; null = n_ctx throughout
    first_share: Rate = 0.9  # of the steps belong to that phase

    def __post_init__(self) -> None:
        if self.mask_token + self.mask_random > 1 + 1e-9:
            raise ValueError("mask_token + mask_random is more than 1")


@dataclass(frozen=True)
class PairRecipe(Recipe):
    """Learn to translate: the 2017 Transformer. A batch is counted in tokens, as in its section 5.1."""

    task: ClassVar[str] = "pairs"
    batch: Positive = 25_000  # tokens in one optimizer step, on the longer of the two sides, padding included
    data: str = "multi30k"  # named corpus of sentence pairs, or a folder with them
    label_smoothing: Rate = 0.1  # probability that the target gives away to all other tokens
    keep: Positive = 5  # newest checkpoints to keep, besides the best: these may be averaged (section 6.1)


@dataclass(frozen=True)
class Deviation:
    """One difference between a paper, its official code and ours, as data: read by people, required by a test."""

    what: str
    why: str
    effect: str
    follows: str  # "paper", "official code" or "neither"
