"""Beam search: the most probable text rather than a drawn one (Vaswani et al. 2017, section 6.1; Wu et al. 2016).

Of all beginnings of a text only the `beam` likeliest live on. One that has ended scores log p / lp, where
lp = ((5 + len) / 6)^alpha makes up for longer texts being less probable (Wu et al., equation 14). As in the first
public code of the Transformer, `len` counts the new tokens, the end token among them, and each step grows 2 beam
candidates, so that `beam` of them can live on even if every hypothesis could end here.

That code keeps the `beam` best that have ended, and goes on until no living one can beat the worst of them. Wanted here
is the best alone, so it alone is kept, and a sentence is done when no living hypothesis can beat that: the same result,
sooner (a test compares the two).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.sample import check_tokens
from classiclm.nn.base import EncoderDecoder, LanguageModel, Model
from classiclm.nn.mask import Mask

_NEVER = float("-inf")


class Stepper(Protocol):
    """A model as the search sees it: each row is one hypothesis. It starts with one row for each sentence."""

    def __call__(self, tokens: Tensor) -> Tensor:
        """(R, L) all tokens so far -> (R, V) log-probabilities of the next one, in fp32."""

    def select(self, rows: Tensor) -> None:
        """Go on with other hypotheses: row i becomes what row rows[i] was. rows (R',)."""


class Hypothesis(NamedTuple):
    """New tokens without the end token, and their score log p / lp (len counts the end token if there is one)."""

    tokens: list[int]
    score: float


def length_penalty(length: int | Tensor, alpha: float) -> float | Tensor:
    """lp = ((5 + len) / 6)^alpha, Wu et al. 2016, equation 14; len = new tokens with the end token."""
    return ((5 + length) / 6) ** alpha


def beam_search(
    stepper: Stepper, prefixes: Tensor, limits: Tensor, end: int | None, beam: int = 4, alpha: float = 0.6
) -> list[Hypothesis]:
    """The best hypothesis for each of A sentences.

    prefixes (A, L): what each begins with. limits (A,): its most new tokens, the end token included, at least 1. If
    none ends within the limit, or end is None, the likeliest living one is the result. beam = 1 is greedy search.
    Raises ValueError for a beam below 1 or a negative alpha.
    """
    if beam < 1 or not alpha >= 0:
        raise ValueError(f"beam should be at least 1 and alpha at least 0, got {beam} and {alpha}")
    search = _Search(stepper, prefixes, limits, end, beam, alpha)
    while len(search.who):
        search.step()
    return search.best


class _Search:
    """The living hypotheses of the A sentences that are not done: K for each, likeliest first."""

    def __init__(self, stepper: Stepper, prefixes: Tensor, limits: Tensor, end: int | None, beam: int, alpha: float):
        self.stepper, self.end, self.beam, self.alpha = stepper, end, beam, alpha
        self.n_prefix, self.limits = prefixes.shape[1], limits.to(prefixes.device)
        self.tokens = prefixes[:, None]  # (A, K, L)
        self.log_p = torch.zeros(prefixes.shape[0], 1, device=prefixes.device)  # (A, K)
        self.who = list(range(len(prefixes)))  # which sentence each of the A is
        self.best = [Hypothesis([], _NEVER)] * len(prefixes)
        self.best_score = torch.full((len(prefixes),), _NEVER, device=prefixes.device)  # (A,)

    def step(self) -> None:
        """Grow every living hypothesis by a token; sentences that are done leave, and their rows with them."""
        scores, parents, new = self._candidates()  # (A, C) each
        ends = torch.zeros_like(new, dtype=torch.bool) if self.end is None else new == self.end
        self._finish(scores.masked_fill(~ends, _NEVER), parents)
        alive = scores.masked_fill(ends, _NEVER).topk(min(self.beam, scores.shape[1]))  # an ended one grows no further
        parents, new = parents.gather(1, alive.indices), new.gather(1, alive.indices)  # (A, K')
        before = parents[:, :, None].expand(-1, -1, self.tokens.shape[2])
        rows = parents + torch.arange(len(parents), device=new.device)[:, None] * self.tokens.shape[1]
        self.tokens = torch.cat([self.tokens.gather(1, before), new[:, :, None]], dim=2)
        self.log_p = alive.values
        self._leave(rows)

    def _candidates(self) -> tuple[Tensor, Tensor, Tensor]:
        """log p, parent and new token of the likeliest prolongations, (A, C) each, likeliest first."""
        A, K, L = self.tokens.shape
        log_p = self.log_p[:, :, None] + self.stepper(self.tokens.view(A * K, L)).view(A, K, -1)  # (A, K, V)
        # Greedy search is over where its only candidate is the end; a second one would go on from there.
        n = 2 * self.beam if self.beam > 1 else 1
        scores, index = log_p.flatten(1).topk(min(n, log_p[0].numel()))
        return scores, index // log_p.shape[2], index % log_p.shape[2]

    def _finish(self, ended: Tensor, parents: Tensor) -> None:
        """Keep the best of those that end with this token, where it beats all before. ended (A, C): log p or -inf."""
        values, places = ended.max(dim=1)
        scores = values / length_penalty(self.tokens.shape[2] - self.n_prefix + 1, self.alpha)  # (A,)
        for i in (scores > self.best_score).nonzero()[:, 0].tolist():
            self._record(i, int(parents[i, places[i]]), float(scores[i]))
        self.best_score = torch.maximum(self.best_score, scores)

    def _leave(self, rows: Tensor) -> None:
        """Go on with the sentences whose best can still be beaten. rows (A, K): where the living ones come from."""
        length = self.tokens.shape[2] - self.n_prefix
        # log p can only fall, and the penalty divides it by no more than that of the longest text allowed.
        bound = self.log_p[:, 0] / length_penalty(self.limits, self.alpha)
        going_on = (self.limits > length) & (bound > self.best_score)  # (A,)
        for i in (~going_on).nonzero()[:, 0].tolist():
            if self.best[self.who[i]].score == _NEVER:
                self._record(i, 0, float(self.log_p[i, 0] / length_penalty(length, self.alpha)))
        self.who = [who for who, stays in zip(self.who, going_on.tolist(), strict=True) if stays]
        self.tokens, self.log_p, rows = self.tokens[going_on], self.log_p[going_on], rows[going_on]
        self.limits, self.best_score = self.limits[going_on], self.best_score[going_on]
        if self.who:
            self.stepper.select(rows.flatten())

    def _record(self, i: int, k: int, score: float) -> None:
        self.best[self.who[i]] = Hypothesis(self.tokens[i, k, self.n_prefix :].tolist(), score)


class _Translating:
    """The decoder of an encoder-decoder over sources that were encoded once."""

    def __init__(self, model: EncoderDecoder, sources: Sequence[Sequence[int]], n_target: int, use_cache: bool):
        longest = max(map(len, sources))
        rows = [[*source, *[0] * (longest - len(source))] for source in sources]  # the padding's ids do not matter
        lengths = torch.tensor([len(source) for source in sources], device=model.device)
        keep = torch.arange(longest, device=model.device) < lengths[:, None]  # (R, S)
        self.keep = None if keep.all() else keep
        self.model = model
        self.memory = model.encode(torch.tensor(rows, device=model.device), Mask(keep=self.keep))  # (R, S, D)
        self.cache = model.new_cache(n_target, longest) if use_cache else None
        self.sentence = torch.arange(len(sources), device=model.device)  # (R,) whose memory a row reads

    def __call__(self, tokens: Tensor) -> Tensor:
        new = tokens[:, self.cache.length :] if self.cache else tokens
        logits = self.model.decode(new, self.memory, Mask(keep=self.keep), self.cache)  # (R, T, V)
        return logits[:, -1].float().log_softmax(dim=-1)

    def select(self, rows: Tensor) -> None:
        sentence = self.sentence[rows]
        same = torch.equal(sentence, self.sentence)  # then only the prefixes change places, and no memory is copied
        if self.cache is not None:
            (self.cache.own if same else self.cache).select(rows)
        if not same:
            self.sentence, self.memory = sentence, self.memory[rows]
            self.keep = None if self.keep is None else self.keep[rows]


class _Continuing:
    """A language model over growing texts of equal length."""

    def __init__(self, model: LanguageModel, use_cache: bool):
        self.model = model
        self.cache = model.new_cache() if use_cache and model.n_attention else None

    def __call__(self, tokens: Tensor) -> Tensor:
        new = tokens[:, self.cache.length :] if self.cache else tokens
        return self.model(new, cache=self.cache)[:, -1].float().log_softmax(dim=-1)

    def select(self, rows: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(rows)


def translate(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    start: int,
    end: int,
    beam: int = 4,
    alpha: float = 0.6,
    extra: int = 50,
    use_cache: bool = True,
    batch: int = 64,
) -> list[list[int]]:
    """The best translation of each source found by beam search, without start and end token, in the order given.

    Sources are token ids as the model was trained on them (with their end token). A translation has at most len(source)
    + extra tokens with its end token (section 6.1), and never more than the model has positions. beam = 1 is greedy.
    `batch` sources of similar length are searched side by side; in fp32 that changes no result.

    Raises ValueError for ids that are no tokens, an empty source, or settings out of range; Error (exit 3) for a source
    with more tokens than the model has positions.
    """
    check_tokens(sources, model.config.vocab_size)
    _check_lengths(model, sources)
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    found: dict[int, list[int]] = {}
    with _evaluating(model):
        for i in range(0, len(order), batch):
            part = order[i : i + batch]
            together = [sources[j] for j in part]
            found |= zip(part, _translate(model, together, start, end, beam, alpha, extra, use_cache), strict=True)
    return [found[i] for i in range(len(sources))]


def _translate(
    model: EncoderDecoder,
    sources: Sequence[Sequence[int]],
    start: int,
    end: int,
    beam: int,
    alpha: float,
    extra: int,
    use_cache: bool,
) -> list[list[int]]:
    most = [len(source) + extra for source in sources]
    if model.n_ctx is not None:  # the n-th token is read off position n, and the first position holds `start`
        most = [min(limit, model.n_ctx) for limit in most]
    stepper = _Translating(model, sources, max(most), use_cache)
    prefixes = torch.full((len(sources), 1), start, device=model.device)
    return [best.tokens for best in beam_search(stepper, prefixes, torch.tensor(most), end, beam, alpha)]


def _check_lengths(model: EncoderDecoder, sources: Sequence[Sequence[int]]) -> None:
    longest = max(map(len, sources), default=0)
    if model.n_ctx is not None and longest > model.n_ctx:
        why = f"has {longest} tokens, the model has positions for {model.n_ctx}"
        raise Error("source sentence", why, "give a shorter sentence, or one sentence at a time", BAD_INPUT)


def continue_text(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    beam: int = 4,
    alpha: float = 0.6,
    end: int | None = None,
    use_cache: bool = True,
) -> list[int]:
    """The best continuation found by beam search: up to max_new_tokens new tokens, without prompt and end token.

    Raises ValueError for ids that are no tokens, an empty prompt, or settings out of range; Error (exit 3) if prompt
    and new tokens do not fit n_ctx together: a search cannot let go of what it has read.
    """
    check_tokens([prompt], model.config.vocab_size)
    if model.n_ctx is not None and len(prompt) + max_new_tokens > model.n_ctx:
        why = f"{len(prompt)} tokens and {max_new_tokens} new ones do not fit the model's {model.n_ctx} positions"
        fix = "shorten the prompt, ask for fewer with --max_new_tokens, or sample without --beam"
        raise Error("prompt", why, fix, BAD_INPUT)
    if max_new_tokens < 1:
        return []
    with _evaluating(model):
        prefix = torch.tensor([list(prompt)], device=model.device)
        stepper = _Continuing(model, use_cache)
        return beam_search(stepper, prefix, torch.tensor([max_new_tokens]), end, beam, alpha)[0].tokens


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """No dropout and no gradients; the model's mode is left as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
