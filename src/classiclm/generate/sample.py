"""Continuing a text, one token at a time: temperature, top-k, top-p, greedy, stop strings, with and without a cache.

The filters are pure functions of logits. The path without a cache is the oracle of the one with it: in fp32 both give
the same tokens, also past n_ctx.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from classiclm.config import NonNegativeFloat, Positive
from classiclm.nn.base import LanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Greedy if the temperature is 0."""

    temperature: NonNegativeFloat = 0.8  # below 1 sharpens, above 1 flattens; 0 = always the likeliest token
    top_k: Positive | None = None  # draw from the k likeliest only
    top_p: float | None = None  # draw from the likeliest that together have probability p

    def __post_init__(self) -> None:
        if not self.temperature >= 0 or self.temperature == float("inf"):
            raise ValueError(f"temperature should be a number from 0 up, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k should be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p should be above 0 and at most 1, got {self.top_p}")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) with all but the k largest of each row at -inf; ties with the k-th stay."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) with all at -inf but the smallest set of likeliest tokens whose probability reaches p.

    Nucleus sampling (Holtzman et al. 2020, section 3.1). The likeliest token always stays.
    """
    ordered, order = logits.sort(dim=-1, descending=True)  # (B, V)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the likelier tokens add up to
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(dropped, float("-inf"))


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token of each row: logits (B, V) -> (B,)."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def window_start(length: int, n_ctx: int | None) -> int:
    """Where the window begins that a model with n_ctx positions reads of `length` tokens.

    Learned positions end at n_ctx. When the window is full, its second half is kept and read again, so the start moves
    in steps of half a window and depends on nothing but the length.
    """
    if n_ctx is None or length <= n_ctx:
        return 0
    step = n_ctx - n_ctx // 2
    return math.ceil((length - n_ctx) / step) * step


def next_logits(model: LanguageModel, use_cache: bool) -> Callable[[Tensor], Tensor]:
    """A function from all tokens so far, (B, T), to the logits of the next, (B, V); to be called as they grow.

    Without a cache it is the oracle for the path with one: both read the same window.
    """
    cache = model.new_cache() if use_cache and model.n_attention else None
    start = 0

    def step(tokens: Tensor) -> Tensor:
        nonlocal start
        moved, start = start, window_start(tokens.shape[1], model.n_ctx)
        window = tokens[:, start:]
        if cache is None:
            return model(window)[:, -1]
        if moved != start:
            cache.clear()
        return model(window[:, cache.length :], cache=cache)[:, -1]

    return step


@torch.inference_mode()
def stream(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,), up to max_new_tokens times; an equal seed gives equal tokens."""
    model.eval()
    generator = torch.Generator(model.device).manual_seed(seed)
    step = next_logits(model, use_cache)
    for _ in range(max_new_tokens):
        new = draw(step(tokens).float(), sampling, generator)  # (B,)
        tokens = torch.cat([tokens, new[:, None]], dim=1)
        yield new


def generate(
    model: LanguageModel,
    tokens: Tensor,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
) -> Tensor:
    """Continue each row of tokens, (B, T) -> (B, T + max_new_tokens). temperature=0 is greedy.

    Raises ValueError for settings out of range or an empty prompt.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens should be (batch, time) with at least one token, got {tuple(tokens.shape)}")
    was_training = model.training
    try:
        new = list(stream(model, tokens, max_new_tokens, Sampling(temperature, top_k, top_p), seed, use_cache))
    finally:
        model.train(was_training)
    return torch.cat([tokens, *[column[:, None] for column in new]], dim=1)
