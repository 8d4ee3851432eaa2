"""Where a unit of ours goes: torch's profiler, its operations sorted by what they are for.

Scopes are put around modules and functions from outside. An operation belongs to the innermost scope around it; in the
backward pass, to the scope of the forward operation that it differentiates, which autograd numbers alike.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.turns import Turns

GROUPS = (
    "matrix products", "attention", "dropout", "norms and activations", "loss", "optimizer", "copies and casts", "rest",
)  # fmt: skip
SCOPE = "part: "
UNITS = 3

_PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::_addmm_activation", "aten::bmm", "aten::baddbmm", "aten::mv", "aten::addmv",
    "aten::linear", "aten::mkldnn_linear", "aten::_weight_int8pack_mm", "aten::_weight_int4pack_mm",
}  # fmt: skip
_COPIES = {"aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::contiguous", "aten::cat"}
# Whose work in a scope is the scope's; by the names of classes.
_MODULES = {
    "Dropout": "dropout",
    "LayerNorm": "norms and activations",
    "MLP": "norms and activations",
    "MultiHeadAttention": "attention",
}
# Functions by the module that calls them.
_FUNCTIONS = {
    ("classiclm.nn.attention", "attend"): "attention",
    ("classiclm.train.step", "clip_norm"): "optimizer",
}


def serve(turns: Turns, unit: Callable[[], Any], model: Any) -> None:
    """In place of `Turns.serve`: one turn, which takes a few units under the profiler."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(turns.warm_up):
        unit()
    turns.ready()
    if not turns.wait():
        return
    with scopes(model, unit), profile(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(UNITS):
            unit()
    groups = grouped(recorded.events())
    turns.done({}, profile={name: seconds / UNITS for name, seconds in groups.items()})


@contextmanager
def scopes(model: Any, unit: Any = None) -> Iterator[None]:
    """Names around the modules of `model`, around some functions, and around what `unit.trainer` does besides."""
    undo = [step for module in model.modules() for step in _around(module, _group_of(module, model))]
    for (where, name), group in _FUNCTIONS.items():
        undo += _replace(importlib.import_module(where), name, group)
    trainer = getattr(unit, "trainer", None)
    if trainer is not None:
        undo += _replace(trainer.optimizer, "step", "optimizer")
        undo += _replace(trainer.stepper, "objective", "loss", counts=trainer.stepper.objective.counts)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


def _group_of(module: Any, model: Any) -> str | None:
    return "rest" if module is model else _MODULES.get(type(module).__name__)


def _around(module: Any, group: str | None) -> list[Callable[[], None]]:
    """A scope from before to after each forward pass of a module."""
    from torch.profiler import record_function

    if group is None:
        return []
    opened: list[Any] = []

    def before(*_: Any) -> None:
        opened.append(record_function(SCOPE + group).__enter__())

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    return [hook.remove for hook in hooks]


def _replace(owner: Any, name: str, group: str, **attributes: Any) -> list[Callable[[], None]]:
    """A scope around a function of a module or an object, if it has one of that name."""
    from torch.profiler import record_function

    inner = getattr(owner, name, None)
    if inner is None:
        return []

    def outer(*args: Any, **kwargs: Any) -> Any:
        with record_function(SCOPE + group):
            return inner(*args, **kwargs)

    for key, value in attributes.items():
        setattr(outer, key, value)
    functools.update_wrapper(outer, inner, assigned=("__doc__",), updated=())
    setattr(owner, name, outer)
    return [functools.partial(setattr, owner, name, inner)]


def grouped(events: Iterable[Any]) -> dict[str, float]:
    """Group -> seconds of processor time that the operations themselves took, without those that they called."""
    events = list(events)
    forward = {e.sequence_nr: _scope(e) for e in events if e.sequence_nr >= 0 and not _is_backward(e)}
    seconds = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        seconds[_group(event, forward)] += event.self_cpu_time_total / 1e6
    return seconds


def _group(event: Any, forward: dict[int, str]) -> str:
    if event.name.startswith(SCOPE):  # what it takes itself is Python's time
        return "rest"
    scope = _scope(event) or forward.get(_number(event), "") or "rest"
    if event.name in _PRODUCTS:
        return "attention" if scope == "attention" and "bmm" in event.name else "matrix products"
    return "copies and casts" if event.name in _COPIES else scope


def _scope(event: Any) -> str:
    """The innermost scope around an event, "" if there is none."""
    while event is not None:
        if event.name.startswith(SCOPE):
            return event.name.removeprefix(SCOPE)
        event = event.cpu_parent
    return ""


def _number(event: Any) -> int:
    """The number that autograd gave the forward operation which this event's backward pass belongs to; -1 for none."""
    while event is not None:
        if _is_backward(event):
            return event.sequence_nr
        event = event.cpu_parent
    return -1


def _is_backward(event: Any) -> bool:
    return event.name.startswith("autograd::engine::evaluate_function")
