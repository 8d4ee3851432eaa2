"""What can go wrong, said in one line: `error: what: why. Fix: what to do.`

Every failure that a user can cause is raised as an `Error` with one of the exit codes below; `cli.main` prints it and
leaves with that code. Anything else that escapes is a bug (exit code 1).
"""

import difflib
from collections.abc import Iterable

BUG = 1
USAGE = 2  # unknown name, flag or key; impossible value; a run of another config
BAD_INPUT = 3  # something that was read is missing or bad
RESOURCE = 4  # output that cannot be written, memory, a lock
DIVERGED = 5  # training met NaN or Inf
DISTRIBUTED = 6  # a rank died or timed out


class Error(Exception):
    """A foreseen failure: `what` (the file, flag or key), `why`, and the remedy `fix`; `code` is the exit code."""

    def __init__(self, what: object, why: str, fix: str, code: int = USAGE):
        super().__init__(str(what), why, fix, code)  # all of it, so that it can be sent to another process
        self.what, self.why, self.fix, self.code = str(what), why, fix, code

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. Fix: {self.fix}."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The nearest known name, as the words of a remedy: "use 'gpt2-124m'"; all of them if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}" if near else f"choose from {', '.join(names)}"
