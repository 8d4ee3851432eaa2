"""How a run answers a prompt: it draws tokens, searches, translates or fills blanks; and which flags each way takes.

Each way reads a prompt first (`read`, where all that can be wrong with it is told) and answers later (`answer`). An
answer is a dict that is JSON: text, tokens and settings, and what else there is to say.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, cast

from classiclm.config import NonNegative, NonNegativeFloat, Positional, Positive
from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.beam import continue_text, translate
from classiclm.generate.completion import complete
from classiclm.generate.fill import encode_with_masks, fill
from classiclm.generate.packed import Packing
from classiclm.generate.sample import Sampling
from classiclm.generate.text import in_front, pieces
from classiclm.registry import Loaded
from classiclm.train.progress import say

_AT_ONCE = 32  # prompts in one batch
_LENGTH = 200  # tokens, unless --max_new_tokens is given
_EXTRA = 50  # tokens that a translation may have more than its source (Vaswani et al. 2017, section 6.1)


@dataclass(frozen=True)
class GenerateFlags(Sampling):
    """Continue a text with a trained model, translate it, or fill its [MASK]s. The text goes to stdout."""

    run: Annotated[str | None, Positional] = None  # the folder of a run
    prompt: str | None = None  # the text; default: the start of a document, or a new line
    prompts: str | None = None  # a file with one prompt per line, - for standard input
    interactive: bool = False  # keep the model loaded; continue each line that is typed, until an empty one
    max_new_tokens: Positive | None = None  # at most so many; default: 200, or what fits a search; no effect on [MASK]s
    greedy: bool = False  # always the likeliest token (= --temperature 0, or --beam 1)
    beam: Positive | None = None  # search for the likeliest text, keeping so many; default: 4 if the model translates
    alpha: NonNegativeFloat = 0.6  # of the beam's length penalty; 0 = none
    stop: str | None = None  # end before this text
    stop_id: NonNegative | None = None  # end before this token
    seed: NonNegative = 0  # prompt i of several draws with seed + i; equal seeds, equal texts; no effect on a search
    checkpoint: str = "last"  # last, best, a saved step, or mean-5 for the mean of the last five
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    precision: Packing = "fp32"  # of the matrices: fp16 and bf16 write faster, int8 faster still and a little worse
    overflow: Literal["crop", "error"] = "crop"  # what to do with a prompt that does not fit n_ctx
    json: bool = False  # one JSON object per prompt: prompt, text (the new one), tokens, settings ...

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn, --greedy applied."""
        return Sampling(0.0 if self.greedy else self.temperature, self.top_k, self.top_p)

    @property
    def length(self) -> int:
        """The most tokens that are drawn."""
        return self.max_new_tokens or _LENGTH


@dataclass(frozen=True)
class Way:
    """One way of answering. `told` is the reason why a flag that is not among those it takes has no effect."""

    told: str
    takes: frozenset[str]
    read: Callable[[Loaded, str | None, GenerateFlags], Any]
    answer: Callable[[Loaded, Sequence[Any], GenerateFlags], Iterator[dict[str, Any]]]
    continues: bool = False  # the text belongs behind the prompt
    streams: bool = False  # and can be shown as it comes


def choose(loaded: Loaded, flags: GenerateFlags, given: Collection[str]) -> Way:
    """The way of answering that a run and its flags ask for; `given` are the names of the flags on the command line.

    Raises Error (exit 2) for a flag without effect on it, and for more new tokens than a search has room for.
    """
    way = _WAYS[loaded.task, "greedy" if flags.greedy else "beam" if flags.beam else ""]
    for name in sorted(set(given) - _COMMON - way.takes):
        fitting = ", ".join(f"--{taken}" for taken in sorted(way.takes))
        raise Error(f"--{name}", f"has no effect: {way.told}", f"leave it out{fitting and f'; here go {fitting}'}")
    n_ctx = loaded.model.n_ctx
    if way.read is _read_for_search and n_ctx is not None and (flags.max_new_tokens or 0) >= n_ctx:
        why = f"is {flags.max_new_tokens}, and a search has the model's {n_ctx} positions for prompt and new tokens"
        raise Error("--max_new_tokens", why, f"give at most {n_ctx - 1}, or draw tokens without --beam")
    return way


# Next-token models


def _tokens_of(prompt: str | None, loaded: Loaded) -> list[int]:
    """What a next-token model goes on from. Raises Error: exit 2 if that is nothing, 3 for unknown characters."""
    tokens = loaded.tokenizer.beginning if prompt is None else loaded.tokenizer.encode(prompt)
    if not tokens and prompt is None:
        raise Error("--prompt", "is missing, and the vocabulary has no line break to begin with", "give a text")
    if not tokens:
        raise Error("--prompt", "is empty, or nothing but white space to this tokenizer", "give at least one letter")
    return tokens


def _read_for_drawing(loaded: Loaded, prompt: str | None, flags: GenerateFlags) -> list[int]:
    tokens, n_ctx = _tokens_of(prompt, loaded), loaded.model.n_ctx
    if n_ctx is not None and len(tokens) > n_ctx:
        if flags.overflow == "error":
            why = f"has {len(tokens)} tokens, the model reads {n_ctx}"
            raise Error("--prompt", why, "shorten it, or pass --overflow crop", BAD_INPUT)
        say(f"warning: the prompt has {len(tokens)} tokens and the model reads {n_ctx}: only its end is used")
    return tokens


def _draw(loaded: Loaded, prompts: Sequence[list[int]], flags: GenerateFlags) -> Iterator[dict[str, Any]]:
    settings = dataclasses.asdict(flags.sampling) | {"max_new_tokens": flags.length, "stop": flags.stop}
    ids = [] if flags.stop_id is None else [flags.stop_id]
    for start in range(0, len(prompts), _AT_ONCE):
        seed, group = flags.seed + start, prompts[start : start + _AT_ONCE]
        how = (flags.length, flags.sampling, seed, flags.stop, ids)
        for i, completion in enumerate(complete(cast(Any, loaded.model), loaded.tokenizer, group, *how)):
            yield {**dataclasses.asdict(completion), "settings": settings, "seed": seed + i}


class _Start(NamedTuple):
    """What a search goes on from, and its most new tokens, the end token included."""

    tokens: list[int]
    most: int


def _read_for_search(loaded: Loaded, prompt: str | None, flags: GenerateFlags) -> _Start:
    """A search cannot let go of what it has read: prompt and new tokens have to fit the model's positions together."""
    tokens, n_ctx = _tokens_of(prompt, loaded), loaded.model.n_ctx
    if n_ctx is None or len(tokens) + flags.length <= n_ctx:
        return _Start(tokens, flags.length)
    most = flags.max_new_tokens or _room(len(tokens), n_ctx)
    kept = min(len(tokens), n_ctx - most)
    if kept < len(tokens) and flags.overflow == "error":
        why = f"has {len(tokens)} tokens, which with {most} new ones do not fit the model's {n_ctx} positions"
        raise Error("--prompt", why, "shorten it, lower --max_new_tokens, or pass --overflow crop", BAD_INPUT)
    has = f"the prompt has {len(tokens)} tokens and the model reads {n_ctx}"
    say(f"warning: {has}: the search uses the last {kept} and writes at most {most}")
    return _Start(tokens[-kept:], most)


def _room(n_prompt: int, n_ctx: int) -> int:
    """The most new tokens, if nobody said: what the prompt leaves, or half the positions if it leaves none."""
    return min(_LENGTH, n_ctx - n_prompt if n_prompt < n_ctx else n_ctx // 2)


def _search(loaded: Loaded, starts: Sequence[_Start], flags: GenerateFlags) -> Iterator[dict[str, Any]]:
    tokenizer, beam = loaded.tokenizer, cast(int, flags.beam)
    for tokens, most in starts:
        new = continue_text(cast(Any, loaded.model), tokens, most, beam, flags.alpha, tokenizer.end_of_text)
        text = "".join(pieces(new, tokenizer.decode, before=in_front(tokens, tokenizer.beginning)))
        settings = {"beam": beam, "alpha": flags.alpha, "max_new_tokens": most}
        yield {"text": text, "tokens": new, "ended": len(new) < most, "settings": settings}


# Translators


def _read_source(loaded: Loaded, prompt: str | None, flags: GenerateFlags) -> list[int]:
    if not prompt:
        raise Error("--prompt", "is missing", "give the sentence to translate")
    tokens = [*loaded.tokenizer.encode(prompt), cast(int, loaded.tokenizer.end_of_text)]
    n_ctx = loaded.model.n_ctx
    if n_ctx is not None and len(tokens) > n_ctx:
        why = f"has {len(tokens)} tokens, the model has positions for {n_ctx}"
        raise Error("--prompt", why, "give a shorter sentence, or one sentence at a time", BAD_INPUT)
    return tokens


def _translate(loaded: Loaded, sources: Sequence[list[int]], flags: GenerateFlags) -> Iterator[dict[str, Any]]:
    beam, end = 1 if flags.greedy else flags.beam or 4, cast(int, loaded.tokenizer.end_of_text)
    asked, n_ctx = flags.max_new_tokens, loaded.model.n_ctx
    extras = [_EXTRA if asked is None else min(_EXTRA, asked - len(source)) for source in sources]
    found: dict[int, list[int]] = {}
    for extra in set(extras):  # one limit, side by side
        same = [i for i in range(len(sources)) if extras[i] == extra]
        together = [sources[i] for i in same]
        new = translate(cast(Any, loaded.model), together, end, end, beam, flags.alpha, extra)
        found |= zip(same, new, strict=True)
    settings = {"beam": beam, "alpha": flags.alpha, "max_new_tokens": asked}
    for i, source in enumerate(sources):
        most = len(source) + extras[i]
        ended = len(found[i]) < (most if n_ctx is None else min(most, n_ctx))
        yield {"text": loaded.tokenizer.decode(found[i]), "tokens": found[i], "ended": ended, "settings": settings}


# Masked models


def _read_blanks(loaded: Loaded, prompt: str | None, flags: GenerateFlags) -> str:
    encode_with_masks(prompt or "", cast(Any, loaded.tokenizer), loaded.model.config.n_ctx)
    return prompt or ""


def _fill(loaded: Loaded, prompts: Sequence[str], flags: GenerateFlags) -> Iterator[dict[str, Any]]:
    for prompt in prompts:
        yield {**dataclasses.asdict(fill(cast(Any, loaded.model), cast(Any, loaded.tokenizer), prompt)), "settings": {}}


_COMMON = frozenset(
    ["run", "prompt", "prompts", "interactive", "max_new_tokens", "seed", "checkpoint", "device", "precision", "json"]
)
_ONE_BY_ONE = frozenset(["stop", "stop_id", "overflow"])
_EACH_TIME = "--greedy takes the likeliest token each time"
_DRAWING = Way(
    "tokens are drawn one by one, without a search (--beam)",
    _ONE_BY_ONE | {"temperature", "top_k", "top_p"},
    _read_for_drawing,
    _draw,
    continues=True,
    streams=True,
)
_GREEDY = dataclasses.replace(_DRAWING, told=_EACH_TIME, takes=_ONE_BY_ONE | {"greedy"})
_SEARCH = Way(
    "--beam searches for the likeliest whole text: it neither draws tokens nor stops at one",
    frozenset(["beam", "alpha", "overflow"]),
    _read_for_search,
    _search,
    continues=True,
)
_TRANSLATING = Way(
    "this run translates, by a search for the likeliest whole sentence",
    frozenset(["beam", "alpha", "greedy"]),
    _read_source,
    _translate,
)
_TRANSLATING_GREEDILY = dataclasses.replace(_TRANSLATING, told=_EACH_TIME, takes=frozenset(["greedy"]))
_FILLING = Way("this run fills [MASK]s, each with its likeliest token", frozenset(), _read_blanks, _fill)
_WAYS = {
    ("causal", ""): _DRAWING,
    ("causal", "greedy"): _GREEDY,
    ("causal", "beam"): _SEARCH,
    ("pairs", ""): _TRANSLATING,
    ("pairs", "greedy"): _TRANSLATING_GREEDILY,
    ("pairs", "beam"): _TRANSLATING,
    ("masked", ""): _FILLING,
    ("masked", "greedy"): _FILLING,
    ("masked", "beam"): _FILLING,
}
