"""classiclm generate: continue, translate or complete texts, with whatever kind of model a run holds.

A next-token model continues, and its text is streamed as it is written; a translation model translates; a masked model
fills the blanks. How is told in `answers.py`; here is what comes in and goes out.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from classiclm.commands.answers import GenerateFlags, Way, choose
from classiclm.config import parse_flags, validate
from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.packed import pack
from classiclm.generate.sample import stream
from classiclm.generate.text import in_front, pieces
from classiclm.registry import Loaded, open_run
from classiclm.train import machine
from classiclm.train.progress import say


class Prompt(NamedTuple):
    """A text to answer, None for the start of one; and the file and line it came from, if it did."""

    text: str | None
    place: str | None = None


def main(argv: Sequence[str], prog: str) -> int:
    """Load, read, answer: one prompt, many, or a conversation."""
    given = parse_flags(GenerateFlags, argv, prog)
    flags: GenerateFlags = validate(GenerateFlags, given, "the command line")
    if flags.run is None:
        raise Error("RUN", "is missing", f"name the folder of a run, as in {prog} runs/a")
    if sum((flags.prompt is not None, flags.prompts is not None, flags.interactive)) > 1:
        raise Error("--prompt, --prompts, --interactive", "exclude one another", "give one of them")
    loaded = open_run(flags.run, flags.checkpoint, machine.look(flags.device).device)
    way = choose(loaded, flags, [name for name, value in given.items() if value is not None])
    pack(loaded.model, flags.precision)
    if flags.interactive:
        _converse(loaded, way, flags)
    else:
        _write(loaded, way, _prompts(flags), flags)
    return 0


def _write(loaded: Loaded, way: Way, prompts: Sequence[Prompt], flags: GenerateFlags) -> None:
    """The answers to stdout, in the order given. All prompts are read first: a bad line leaves nothing half written."""
    read = [_read(loaded, way, prompt, flags) for prompt in prompts]
    if way.streams and flags.prompts is None and not flags.json:
        _stream(loaded, prompts[0].text, read[0], flags)
        return
    for prompt, answer in zip(prompts, way.answer(loaded, read, flags), strict=True):
        if flags.json:
            shown = json.dumps({"prompt": prompt.text, **answer})
        else:
            shown = (prompt.text or "") + answer["text"] if way.continues else answer["text"]
        between = "\n" if way.continues and flags.prompts and not flags.json else ""  # texts may have lines
        print(shown + between, flush=True)


def _read(loaded: Loaded, way: Way, prompt: Prompt, flags: GenerateFlags) -> Any:
    """What the way makes of a prompt. Raises Error as it does; for a line of a file, one that names it (exit 3)."""
    try:
        return way.read(loaded, prompt.text, flags)
    except Error as e:
        if prompt.place is None:
            raise
        why, _, fix = str(e).removeprefix("--prompt: ").removesuffix(".").rpartition(". Fix: ")
        raise Error(prompt.place, why, fix, BAD_INPUT) from e


def _stream(loaded: Loaded, prompt: str | None, tokens: list[int], flags: GenerateFlags) -> None:
    """Prompt and continuation to stdout, as it comes."""
    tokenizer = loaded.tokenizer
    new = _until(_new_tokens(loaded, tokens, flags), {flags.stop_id, tokenizer.end_of_text})
    print(prompt or "", end="", flush=True)
    for text in pieces(new, tokenizer.decode, flags.stop, before=in_front(tokens, tokenizer.beginning)):
        print(text, end="", flush=True)
    print()


def _new_tokens(loaded: Loaded, tokens: list[int], flags: GenerateFlags) -> Iterator[int]:
    for step in stream(cast(Any, loaded.model), [tokens], flags.length, flags.sampling, flags.seed):
        yield step.tokens[0]


def _until(tokens: Iterator[int], stop_ids: set[int | None]) -> Iterator[int]:
    for token in tokens:
        if token in stop_ids:
            return
        yield token


def _prompts(flags: GenerateFlags) -> list[Prompt]:
    """--prompt, or the lines of --prompts that are not empty. Raises Error (exit 3) if the file has none."""
    if flags.prompts is None:
        return [Prompt(flags.prompt)]
    try:
        text = sys.stdin.read() if flags.prompts == "-" else Path(flags.prompts).read_text(encoding="utf-8")
    except OSError as e:
        raise Error(
            flags.prompts, e.strerror or "cannot be read", "name a text file, one prompt per line", BAD_INPUT
        ) from e
    except UnicodeDecodeError as e:
        raise Error(flags.prompts, "is not UTF-8 text", "convert it to UTF-8", BAD_INPUT) from e
    name = "standard input" if flags.prompts == "-" else flags.prompts
    lines = enumerate(text.split("\n"), start=1)
    prompts = [Prompt(line, f"{name}, line {number}") for number, line in lines if line]
    if not prompts:
        raise Error(flags.prompts, "has no prompt", "write one prompt per line", BAD_INPUT)
    return prompts


def _converse(loaded: Loaded, way: Way, flags: GenerateFlags) -> None:
    """A prompt per line of standard input; a mistake in one does not end the session."""
    say("type a text; an empty line ends")
    for turn, line in enumerate(sys.stdin):
        if not line.strip("\n"):
            return
        try:
            _write(loaded, way, [Prompt(line.rstrip("\n"))], dataclasses.replace(flags, seed=flags.seed + turn))
        except Error as e:
            say(f"error: {e}")
