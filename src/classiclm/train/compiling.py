"""torch.compile, where it works: what it cannot compile, or has no compiler for, runs as it is."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from classiclm.train.progress import say

_LINE = 160  # characters of a torch error that are shown


class Compiled:
    """The compiled form of `forward`, and `forward` itself from the first failure on, with one warning.

    torch tells a failure to compile from one of the program in many ways, some of them late. Here one rule: it was the
    compiler's if the program does without. So an error of the program's own is raised as it would be without compiling.
    `options` are those of torch.compile.
    """

    def __init__(self, forward: Callable[..., Any], **options: Any):
        self.forward = forward
        self._run: Callable[..., Any] = torch.compile(forward, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `forward` returns. Raises what it raises, and torch.OutOfMemoryError without a second try."""
        if self._run is self.forward:
            return self.forward(*args, **kwargs)
        random = _random_state()
        try:
            # The backward pass too is compiled now: a failure in the midst of it could not be answered here.
            with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
                return self._run(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:
            _set_random_state(random)  # what could be compiled may have drawn some
            result = self.forward(*args, **kwargs)
            self._run = self.forward
            say(f"warning: torch.compile failed ({_in_short(e)}); going on without it")
            return result


def _random_state() -> tuple[Tensor, list[Tensor]]:
    """The states of the generators that a forward pass draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    torch.cuda.set_rng_state_all(state[1])


def _in_short(e: Exception) -> str:
    """The kind of the failure that torch wraps, if it does, and the first line of what it says, cut to a length."""
    inner = getattr(e, "inner_exception", e)
    first = next((line.strip() for line in str(inner).splitlines() if line.strip()), "")
    line = f"{type(inner).__name__}: {first}"
    return line if len(line) <= _LINE else f"{line[: _LINE - 1]}…"
