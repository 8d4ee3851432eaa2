"""classiclm generate: continue a text, streamed as it is written."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from classiclm import registry
from classiclm.config import NonNegative, Positional, Positive, parse_flags, validate
from classiclm.data.tokenizers import Tokenizer
from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.sample import Sampling, stream
from classiclm.generate.text import pieces
from classiclm.train import machine
from classiclm.train.progress import say


@dataclass(frozen=True)
class GenerateFlags(Sampling):
    """Continue a text with a trained model. The text goes to stdout as it is written."""

    run: Annotated[str | None, Positional] = None  # the folder of a run
    prompt: str | None = None  # the text to continue; default: the start of a document, or a new line
    max_new_tokens: Positive = 200  # how many tokens to write at most
    greedy: bool = False  # always the likeliest token (= --temperature 0)
    stop: str | None = None  # end before this text
    seed: NonNegative = 0  # an equal seed writes an equal text
    checkpoint: str = "last"  # last, best or a saved step
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    overflow: Literal["crop", "error"] = "crop"  # what to do with a prompt longer than n_ctx


def main(argv: Sequence[str], prog: str) -> int:
    """Load, encode the prompt, write."""
    flags = validate(GenerateFlags, parse_flags(GenerateFlags, argv, prog), "the command line")
    if flags.run is None:
        raise Error("RUN", "is missing", f"name the folder of a run, as in {prog} runs/a")
    loaded = registry.open_run(flags.run, flags.checkpoint, machine.look(flags.device).device)
    tokens = _encode(flags.prompt, loaded.tokenizer)
    _check_length(flags, len(tokens), loaded.model.n_ctx)
    print(flags.prompt or "", end="", flush=True)
    for text in pieces(
        _new_tokens(loaded, tokens, flags), loaded.tokenizer.decode, flags.stop, loaded.tokenizer.end_of_text
    ):
        print(text, end="", flush=True)
    print()
    return 0


def _encode(prompt: str | None, tokenizer: Tokenizer) -> list[int]:
    if prompt is None:
        return tokenizer.encode("\n") if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    if not prompt:
        raise Error("--prompt", "is empty", "give at least one character, or leave the flag out")
    return tokenizer.encode(prompt)


def _check_length(flags: GenerateFlags, length: int, n_ctx: int | None) -> None:
    if n_ctx is None or length <= n_ctx:
        return
    if flags.overflow == "error":
        why = f"has {length} tokens, the model reads {n_ctx}"
        raise Error("--prompt", why, "shorten it, or pass --overflow crop", BAD_INPUT)
    say(f"warning: the prompt has {length} tokens and the model reads {n_ctx}: only its end is used")


def _new_tokens(loaded: registry.Loaded, tokens: list[int], flags: GenerateFlags) -> Iterator[int]:
    sampling = Sampling(0.0 if flags.greedy else flags.temperature, flags.top_k, flags.top_p)
    start = torch.tensor([tokens], device=loaded.model.device)  # (1, T)
    for column in stream(loaded.model, start, flags.max_new_tokens, sampling, flags.seed):
        yield int(column[0])
