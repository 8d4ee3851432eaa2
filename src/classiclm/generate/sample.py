"""Continuing a text, one token at a time: temperature, top-k, top-p, greedy, stop strings, with and without a cache.

The filters are pure functions of logits. The path without a cache is the oracle of the one with it: in fp32 both give
the same tokens, also past n_ctx.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from classiclm.config import NonNegativeFloat, Positive
from classiclm.nn.base import LanguageModel
from classiclm.nn.mask import Mask


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


def draw(logits: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """The next token of each row: logits (B, V) -> (B,). Row i takes one random number from its own generator."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.double() / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, V)
    uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    threshold = uniform[:, None] * cumulative[:, -1:]  # in [0, total): the token found has a probability above 0
    return (cumulative <= threshold).sum(dim=-1)


def window_start(length: int, n_ctx: int | None) -> int:
    """Where the window begins that a model with n_ctx positions reads of `length` tokens.

    Learned positions end at n_ctx. When the window is full, its second half is kept and read again, so the start moves
    in steps of half a window and depends on nothing but the length.
    """
    if n_ctx is None or length <= n_ctx:
        return 0
    step = n_ctx - n_ctx // 2
    return math.ceil((length - n_ctx) / step) * step


class Reader:
    """Reads growing texts of unequal length and gives the logits of each one's next token.

    Each text is read through its own window; the windows are set side by side, padded on the left. With a cache only
    the newest tokens are read, until a window moves and all is read again. Without one (the oracle) all is read anew.
    """

    def __init__(self, model: LanguageModel, use_cache: bool):
        self.model, self.device = model, model.device
        self.cache = model.new_cache() if use_cache and model.n_attention else None
        self.starts: list[int] = []
        self.pads: list[int] = []

    def next_logits(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """All tokens so far of each text -> (B, V)."""
        starts = [window_start(len(text), self.model.n_ctx) for text in texts]
        again = self.cache is None or starts != self.starts
        if again:
            lengths = [len(text) - start for text, start in zip(texts, starts, strict=True)]
            self.starts, self.pads = starts, [max(lengths) - length for length in lengths]
            if self.cache is not None:
                self.cache.clear()
        width = len(texts[0]) - self.starts[0] + self.pads[0]  # columns, the same for all
        new = width if again or self.cache is None else width - self.cache.length
        columns = [
            [0] * pad + list(text[start:]) for text, start, pad in zip(texts, self.starts, self.pads, strict=True)
        ]
        tokens = torch.tensor([row[-new:] for row in columns], device=self.device)  # (B, T)
        return self._read(tokens, width)[:, -1]

    def _read(self, tokens: Tensor, width: int) -> Tensor:
        if not any(self.pads):
            return self.model(tokens, cache=self.cache)
        pads = torch.tensor(self.pads, device=tokens.device)[:, None]  # (B, 1)
        place = torch.arange(width, device=tokens.device)  # (S,)
        positions = (place[None, -tokens.shape[1] :] - pads).clamp(min=0)  # (B, T)
        mask = Mask(causal=True, keep=place >= pads)  # (B, S)
        return self.model(tokens, mask=mask, cache=self.cache, positions=positions)


@dataclass(frozen=True)
class Step:
    """One new token for each text, and the logits (B, V) that they were drawn from."""

    tokens: list[int]
    logits: Tensor

    @property
    def log_probabilities(self) -> list[float]:
        """Of each token: what the model itself gave it, before any filter. Computed when asked for."""
        new = torch.tensor(self.tokens, device=self.logits.device)[:, None]  # (B, 1)
        return self.logits.log_softmax(dim=-1).gather(-1, new)[:, 0].tolist()


@torch.inference_mode()
def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    use_cache: bool = True,
) -> Iterator[Step]:
    """Yield the next token of every text, up to max_new_tokens times; prompts may differ in length.

    Text i draws from a stream of its own, seeded with seed + i, so that in fp32 a batch writes what its texts would one
    by one with those seeds.
    """
    model.eval()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    reader, texts = Reader(model, use_cache), [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        logits = reader.next_logits(texts).float()  # (B, V)
        new = draw(logits, sampling, generators).tolist()
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        yield Step(new, logits)


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

    Raises ValueError for settings out of range, an empty prompt, or ids that are no tokens of the model.
    """
    if tokens.ndim != 2 or tokens.shape[1] == 0:
        raise ValueError(f"tokens should be (batch, time) with at least one token, got {tuple(tokens.shape)}")
    rows = generate_texts(model, tokens.tolist(), max_new_tokens, temperature, top_k, top_p, seed, use_cache)
    return torch.tensor(rows, device=tokens.device)


def generate_texts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    use_cache: bool = True,
    stop_ids: Collection[int] = (),
) -> list[list[int]]:
    """Continue prompts of any lengths; a text ends behind its first new token in stop_ids, or when it is long enough.

    Raises ValueError as `generate` does.
    """
    check_tokens(prompts, model.config.vocab_size)
    texts, open_ = [list(prompt) for prompt in prompts], set(range(len(prompts)))
    was_training = model.training
    try:
        for step in stream(model, prompts, max_new_tokens, Sampling(temperature, top_k, top_p), seed, use_cache):
            for i in sorted(open_):
                texts[i].append(step.tokens[i])
            open_ -= {i for i in open_ if step.tokens[i] in stop_ids}
            if not open_:
                break
    finally:
        model.train(was_training)
    return texts


def check_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse what an embedding would fail on (on a GPU, the whole process with it). Raises ValueError."""
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt should have at least one token")
        wrong = [token for token in prompt if type(token) is not int or not 0 <= token < vocab_size]
        if wrong:
            raise ValueError(f"token ids should be from 0 to {vocab_size - 1}, got {wrong[0]!r}")
