"""classiclm generate: continue, translate or complete texts, with whatever kind of model a run holds.

A next-token model continues, and its text is streamed as it is written; a translation model translates; a masked model
fills the blanks.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from classiclm import registry
from classiclm.config import NonNegative, NonNegativeFloat, Positional, Positive, parse_flags, validate
from classiclm.data.tokenizers import Tokenizer
from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.beam import continue_text, translate
from classiclm.generate.completion import Completion, complete
from classiclm.generate.fill import fill
from classiclm.generate.sample import Sampling, stream
from classiclm.generate.text import pieces
from classiclm.train import machine
from classiclm.train.progress import say

_AT_ONCE = 32  # prompts in one batch


@dataclass(frozen=True)
class GenerateFlags(Sampling):
    """Continue a text with a trained model, translate it, or fill its [MASK]s. The text goes to stdout."""

    run: Annotated[str | None, Positional] = None  # the folder of a run
    prompt: str | None = None  # the text; default: the start of a document, or a new line
    prompts: str | None = None  # a file with one prompt per line, - for standard input
    interactive: bool = False  # keep the model loaded; continue each line that is typed, until an empty one
    max_new_tokens: Positive = 200  # how many tokens to write at most
    greedy: bool = False  # always the likeliest token (= --temperature 0, or --beam 1)
    beam: Positive | None = None  # search for the likeliest text, keeping so many; default: 4 if the model translates
    alpha: NonNegativeFloat = 0.6  # of the beam's length penalty; 0 = none
    stop: str | None = None  # end before this text
    stop_id: NonNegative | None = None  # end before this token
    seed: NonNegative = 0  # an equal seed writes an equal text; prompt i of several takes seed + i
    checkpoint: str = "last"  # last, best, a saved step, or mean-5 for the mean of the last five
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    overflow: Literal["crop", "error"] = "crop"  # what to do with a prompt longer than n_ctx
    json: bool = False  # one JSON object per prompt: text, tokens, log-probabilities, settings

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn, --greedy applied."""
        return Sampling(0.0 if self.greedy else self.temperature, self.top_k, self.top_p)


def main(argv: Sequence[str], prog: str) -> int:
    """Load, encode, write: one prompt, many, or a conversation."""
    flags: GenerateFlags = validate(GenerateFlags, parse_flags(GenerateFlags, argv, prog), "the command line")
    if flags.run is None:
        raise Error("RUN", "is missing", f"name the folder of a run, as in {prog} runs/a")
    if sum((flags.prompt is not None, flags.prompts is not None, flags.interactive)) > 1:
        raise Error("--prompt, --prompts, --interactive", "exclude one another", "give one of them")
    loaded = registry.open_run(flags.run, flags.checkpoint, machine.look(flags.device).device)
    if loaded.task != "causal" or flags.beam is not None:
        _answer_all(loaded, flags)
    elif flags.interactive:
        _converse(loaded, flags)
    elif flags.prompts is not None or flags.json:
        _write_all(loaded, _read_prompts(flags), flags)
    else:
        _write_one(loaded, flags.prompt, flags)
    return 0


def _answer_all(loaded: registry.Loaded, flags: GenerateFlags) -> None:
    """What is not streamed: translations, filled blanks, the outcome of a search. One answer per prompt or line."""
    if flags.interactive:
        _converse(loaded, flags, lambda run, prompt, changed: _answer(run, [prompt], changed))
    else:
        _answer(loaded, _read_prompts(flags), flags)


def _answer(loaded: registry.Loaded, prompts: Sequence[str | None], flags: GenerateFlags) -> None:
    for prompt, answer in zip(prompts, _ANSWERS[loaded.task](loaded, prompts, flags), strict=True):
        print(json.dumps({"prompt": prompt, **answer}) if flags.json else answer["text"], flush=True)


def _search(loaded: registry.Loaded, prompts: Sequence[str | None], flags: GenerateFlags) -> Iterator[dict[str, Any]]:
    beam, end, decode = flags.beam or 1, loaded.tokenizer.end_of_text, loaded.tokenizer.decode
    for prompt in prompts:
        tokens = _encode(prompt, loaded, flags)
        written = continue_text(cast(Any, loaded.model), tokens, flags.max_new_tokens, beam, flags.alpha, end)
        text = "".join(pieces(written, decode, before=_encoded(prompt, tokens)))
        yield {"text": (prompt or "") + text, "tokens": written}


def _translate(
    loaded: registry.Loaded, prompts: Sequence[str | None], flags: GenerateFlags
) -> Iterator[dict[str, Any]]:
    if not all(prompts):
        raise Error("--prompt", "is missing", "give the sentence to translate")
    beam = flags.beam or (1 if flags.greedy else 4)
    end = cast(int, loaded.tokenizer.end_of_text)
    sources = [[*loaded.tokenizer.encode(prompt or ""), end] for prompt in prompts]
    for tokens in translate(cast(Any, loaded.model), sources, end, end, beam, flags.alpha):
        yield {"text": loaded.tokenizer.decode(tokens), "tokens": tokens}


def _fill(loaded: registry.Loaded, prompts: Sequence[str | None], flags: GenerateFlags) -> Iterator[dict[str, Any]]:
    for prompt in prompts:
        filled = fill(cast(Any, loaded.model), cast(Any, loaded.tokenizer), prompt or "")
        yield {"text": filled.text, "candidates": filled.candidates}


_ANSWERS = {"causal": _search, "pairs": _translate, "masked": _fill}


def _write_one(loaded: registry.Loaded, prompt: str | None, flags: GenerateFlags) -> None:
    """To stdout, as it comes."""
    tokens = _encode(prompt, loaded, flags)
    stop_ids = {flags.stop_id, loaded.tokenizer.end_of_text}
    print(prompt or "", end="", flush=True)
    new, decode = _until(_new_tokens(loaded, tokens, flags), stop_ids), loaded.tokenizer.decode
    for text in pieces(new, decode, flags.stop, before=_encoded(prompt, tokens)):
        print(text, end="", flush=True)
    print()


def _encoded(prompt: str | None, tokens: list[int]) -> list[int]:
    """The tokens of what is printed in front of the continuation: none where there is no prompt."""
    return tokens if prompt else []


def _new_tokens(loaded: registry.Loaded, tokens: list[int], flags: GenerateFlags) -> Iterator[int]:
    for step in stream(cast(Any, loaded.model), [tokens], flags.max_new_tokens, flags.sampling, flags.seed):
        yield step.tokens[0]


def _until(tokens: Iterator[int], stop_ids: set[int | None]) -> Iterator[int]:
    for token in tokens:
        if token in stop_ids:
            return
        yield token


def _write_all(loaded: registry.Loaded, prompts: Sequence[str | None], flags: GenerateFlags) -> None:
    """Each prompt with its continuation, in the order given, as a batch."""
    for start in range(0, len(prompts), _AT_ONCE):
        group = prompts[start : start + _AT_ONCE]
        encoded = [_encode(prompt, loaded, flags) for prompt in group]
        ids = [] if flags.stop_id is None else [flags.stop_id]
        settings = (flags.max_new_tokens, flags.sampling, flags.seed + start, flags.stop, ids)
        completions = complete(cast(Any, loaded.model), loaded.tokenizer, encoded, *settings)
        for i, (prompt, completion) in enumerate(zip(group, completions, strict=True)):
            if flags.json:
                print(json.dumps(_as_json(prompt, completion, flags, flags.seed + start + i)))
            else:
                print(f"{prompt or ''}{completion.text}\n")


def _as_json(prompt: str | None, completion: Completion, flags: GenerateFlags, seed: int) -> dict[str, Any]:
    settings = dataclasses.asdict(flags.sampling) | {"max_new_tokens": flags.max_new_tokens, "stop": flags.stop}
    return {"prompt": prompt, **dataclasses.asdict(completion), "settings": settings, "seed": seed}


def _read_prompts(flags: GenerateFlags) -> list[str | None]:
    if flags.prompts is None:
        return [flags.prompt]
    try:
        text = sys.stdin.read() if flags.prompts == "-" else Path(flags.prompts).read_text(encoding="utf-8")
    except OSError as e:
        raise Error(
            flags.prompts, e.strerror or "cannot be read", "name a text file, one prompt per line", BAD_INPUT
        ) from e
    except UnicodeDecodeError as e:
        raise Error(flags.prompts, "is not UTF-8 text", "convert it to UTF-8", BAD_INPUT) from e
    prompts = [line for line in text.splitlines() if line]
    if not prompts:
        raise Error(flags.prompts, "has no prompt", "write one prompt per line", BAD_INPUT)
    return list(prompts)


def _converse(
    loaded: registry.Loaded,
    flags: GenerateFlags,
    write: Callable[[registry.Loaded, str | None, GenerateFlags], None] = _write_one,
) -> None:
    """A prompt per line of standard input; a mistake in one does not end the session."""
    say("type a text; an empty line ends")
    for turn, line in enumerate(sys.stdin):
        if not line.strip("\n"):
            return
        try:
            write(loaded, line.rstrip("\n"), dataclasses.replace(flags, seed=flags.seed + turn))
        except Error as e:
            say(f"error: {e}")


def _encode(prompt: str | None, loaded: registry.Loaded, flags: GenerateFlags) -> list[int]:
    """The tokens of a prompt. Raises Error: exit 2 if empty, 3 for unknown characters or, if asked, its length."""
    tokens = _beginning(loaded.tokenizer) if prompt is None else loaded.tokenizer.encode(prompt)
    if not tokens:
        raise Error("--prompt", "is empty", "give at least one character, or leave the flag out")
    n_ctx = loaded.model.n_ctx
    if n_ctx is not None and len(tokens) > n_ctx:
        if flags.overflow == "error":
            why = f"has {len(tokens)} tokens, the model reads {n_ctx}"
            raise Error("--prompt", why, "shorten it, or pass --overflow crop", BAD_INPUT)
        say(f"warning: the prompt has {len(tokens)} tokens and the model reads {n_ctx}: only its end is used")
    return tokens


def _beginning(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("\n") if tokenizer.end_of_text is None else [tokenizer.end_of_text]
