"""The configuration of a run: a recipe, a model, a text, and how often to look."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from classiclm.config import NonNegative, Positional, Positive, PositiveFloat
from classiclm.data.corpora import Data
from classiclm.recipe import Recipe

Auto = Literal["auto"]

# What may differ when a run is continued: its length, and how often it logs, measures, samples and saves.
MAY_CHANGE = (
    *(
        "steps",
        "log_every",
        "eval_every",
        "eval_windows",
        "save_every",
        "keep",
        "keep_every",
        "async_save",
        "tracker",
        "log_norms",
        "sample_every",
        "sample_prompt",
    ),
    *("strategy", "copies", "timeout"),
)


@dataclass(frozen=True)
class TrainConfig(Recipe):
    """Train a model from scratch, or go on with the run in --out.

    Settings come from the preset, then --config FILE.yaml, then flags.
    """

    preset: Annotated[str | None, Positional] = None  # which model and recipe; `classiclm models` lists them
    data: Data = Data()  # named corpus, text file or folder
    seed: NonNegative = 1337  # of the weights, the order of the text and dropout
    device: Auto | Literal["cpu", "cuda", "mps"] = "auto"  # where to compute
    precision: Auto | Literal["fp32", "bf16", "fp16"] = "auto"  # of the matrix products
    micro_batch: Auto | Positive = "auto"  # how much at once, in the unit of batch; the gradients of a step add up
    compile: Auto | bool = "auto"  # torch.compile: auto = on a GPU
    attention: Auto | Literal["written", "fused"] = "auto"  # which of the two equal paths
    log_every: Positive = 10  # steps between rows of metrics.jsonl
    eval_every: Positive = 250  # steps between validations
    eval_windows: Positive | Literal["all"] = 256  # windows, or sentence pairs, per validation; the last takes all
    skip_bad: Positive = 5  # steps in a row whose gradient is not finite, and so not used, before training gives up
    skip_spikes: PositiveFloat | None = None  # also skip gradients so many standard deviations above the last 128
    strategy: Literal["none", "ddp", "fsdp"] = "none"  # of several processes, which torchrun starts
    copies: Positive = 1  # fsdp: how many times the whole model is kept; each group of processes shards its own (HSDP)
    timeout: Positive = 300  # seconds that processes wait for one another
    loss_chunk: Auto | Positive = "auto"  # logits made at a time; auto: all, unless they take more than 256 MiB
    recompute: bool = False  # activation checkpointing: less memory for a third more arithmetic
    save_every: Positive = 250  # steps between checkpoints
    keep: Positive = 2  # newest checkpoints to keep, besides the best
    async_save: bool = False  # write checkpoints in a thread while training goes on; takes memory for a copy
    keep_every: Positive | None = None  # checkpoints of every so many steps to keep for good
    tracker: Literal["none", "wandb", "tensorboard"] = "none"  # where rows go besides metrics.jsonl
    sample_every: Positive | None = None  # steps between samples of what the model writes, in OUT/samples; null = none
    sample_prompt: str | None = None  # what samples continue, translate or fill; default: nothing, or validation text
    log_norms: bool = False  # add each layer's gradient norm and each block's activation size to the rows
    model: Any = None  # the sizes: --model.n_layers N and so on
