"""The command line: `classiclm COMMAND ...`. Nothing heavy is imported until a command is chosen.

Each command is a module with `main(argv, prog) -> exit code`, and stands in the table below with its one line of help.
"""

import atexit
import contextlib
import errno
import gc
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import ModuleType

from classiclm import __version__
from classiclm.errors import BAD_INPUT, BUG, RESOURCE, Error, did_you_mean
from classiclm.train.signals import StopRequest, farewell, interruptible

_OUTPUT_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO)

COMMANDS = {
    "demo": "train the twelve rungs of the ladder in minutes, print the table, write the report",
    "models": "list all presets with their sizes and true parameter counts",
    "train": "train a model from scratch, or go on with a run",
    "generate": "continue a text with a trained model, translate it, or fill its blanks",
    "evaluate": "how well trained models predict a text or translate it",
    "ladder": "train, show and compare the twelve rungs from a bigram table to a GPT",
    "tokenizer": "learn a tokenizer from a text, or look at one: its tokens, what it makes of a text",
    "prepare": "clean and tokenise corpora into shards to train on: files of yours, or six corpora by name",
    "fsck": "check every file of a run or of prepared data against its sum",
    "import": "weights of Hugging Face's folders or of OpenAI's GPT-1, made a run of ours",
    "export": "a trained model as a Hugging Face folder or a GGUF file",
    "plan": "memory, time and energy that a training run will need, and the settings that make it fit",
    "doctor": "say what will run on this machine and what is missing, and check that its arithmetic is right",
}


def usage() -> str:
    """The text of `classiclm --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: classiclm COMMAND ... [--debug]",
            "",
            "The classic language models, from back-propagation to GPT-3, from scratch.",
            "",
            *lines,
            "",
            "`classiclm COMMAND --help` shows a command's flags. Exit codes: 0 ok, 1 bug, 2 usage, 3 bad input,",
            "4 resource, 5 diverged, 6 distributed, 128 + n after signal n.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Foreseen failures are one line on stderr, a traceback with --debug.

    argv: None = that of this process, which then is the command's alone, and ends here if a signal has stopped it.
    """
    request, alone = StopRequest(), argv is None
    try:
        with interruptible(request, afterwards=signal.SIG_DFL if alone else None):
            code = _run(list(sys.argv[1:] if argv is None else argv), request, alone)
    except KeyboardInterrupt:
        print("error: interrupted" if request.number is None else farewell(request.number), file=sys.stderr)
        code = 128 + (request.number or signal.SIGINT)
    if alone:
        gc.freeze()
    if alone and code > 128:  # all is done but to free memory, for which torch takes a second
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        atexit._run_exitfuncs()
        os._exit(code)
    return code


def _run(argv: list[str], request: StopRequest, alone: bool) -> int:
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    try:
        code = _dispatch(argv, alone)
        sys.stdout.flush()
        return code
    except Exception as e:
        if request.number is not None:  # what others made of the interruption
            raise KeyboardInterrupt from e
        if isinstance(e, BrokenPipeError):  # the reader of our output went away, as `head` does: no failure of ours
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if debug:
            traceback.print_exc()
        print(f"error: {_sentence(e)}", file=sys.stderr)
        return _exit_code(e)


def _dispatch(argv: list[str], alone: bool) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"classiclm {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise Error(argv[0], "is no command", f"{did_you_mean(argv[0], COMMANDS)}; see `classiclm --help`")
    name = "import_" if argv[0] == "import" else argv[0]  # the one that Python has taken
    return _module(name, alone).main(argv[1:], f"classiclm {argv[0]}")


def _module(name: str, alone: bool) -> ModuleType:
    """A command's. Its imports make half a million objects that stay: looking for garbage among them, while they come,
    later and at the end of the process, takes more than a second, so in a process of their own they are left alone."""
    if not alone:
        return importlib.import_module(f"classiclm.commands.{name}")
    gc.disable()
    try:
        return importlib.import_module(f"classiclm.commands.{name}")
    finally:
        gc.freeze()
        gc.enable()


def _exit_code(e: Exception) -> int:
    if isinstance(e, Error):
        return e.code
    if isinstance(e, OSError):
        return RESOURCE if e.errno in _OUTPUT_ERRORS else BAD_INPUT
    return RESOURCE if _out_of_memory(e) else BUG


def _sentence(e: Exception) -> str:
    if isinstance(e, Error):
        return " ".join(str(e).splitlines())
    if isinstance(e, OSError):
        what = str(e.filename)[:200] if e.filename else "system"
        return f"{what}: {e.strerror or e}. Fix: name a file or folder that can be used, with enough free space."
    if _out_of_memory(e):
        return "memory: this machine ran out of it. Fix: use a smaller --micro_batch or model."
    text = " ".join(f"{type(e).__name__}: {e}".split())
    return f"bug: {text}. Fix: run again with --debug and report the traceback."


def _out_of_memory(e: Exception) -> bool:
    words = ("DefaultCPUAllocator", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # torch has no class for these
    named = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
    return named or (isinstance(e, RuntimeError) and any(word in str(e) for word in words))
