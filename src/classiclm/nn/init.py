"""Named recipes for the first values of the weights: one per paper, each in one function.

| recipe       | matrices                         | embeddings              | biases | norms  | used by          |
|--------------|----------------------------------|-------------------------|--------|--------|------------------|
| init_fan_in  | N(0, 1/sqrt(d_in))               | N(0, 1/sqrt(d_model))   | 0      | gain 1 | the ladder       |
| init_2017    | U(-a, a), a = sqrt(3 / d_in)     | N(0, 1/sqrt(d_model))   | 0      | gain 1 | Transformer 2017 |
| init_gpt1    | N(0, 0.02)                       | N(0, 0.02)              | 0      | gain 1 | GPT-1            |
| init_bert    | N(0, 0.02), cut off at 2 sigma   | the same                | 0      | gain 1 | BERT             |
| init_gpt2    | N(0, 0.02), into the residual    | N(0, 0.02)              | 0      | gain 1 | GPT-2, GPT-3     |
|              | N(0, 0.02/sqrt(2 layers))        |                         |        |        |                  |

Norms start with gain 1 and bias 0 in their constructor.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from classiclm.nn.blocks import Block
from classiclm.nn.embedding import PositionEmbedding, TokenEmbedding

_EMBEDDINGS = (TokenEmbedding, PositionEmbedding)


def init_fan_in(model: nn.Module) -> None:
    """Keeps a signal's variance through each linear layer (LeCun et al. 1998, section 4.6): no depth is special."""
    _fill(model, lambda w: nn.init.normal_(w, std=1 / math.sqrt(w.shape[1])), _unit_rows)


def init_2017(model: nn.Module) -> None:
    """The 2017 paper prints none; its first public code keeps the variance as `init_fan_in` does, with uniform numbers
    ("uniform_unit_scaling"), and gives the shared embedding a standard deviation of 1/sqrt(d_model)."""
    _fill(model, lambda w: nn.init.uniform_(w, -math.sqrt(3 / w.shape[1]), math.sqrt(3 / w.shape[1])), _unit_rows)


def init_gpt1(model: nn.Module) -> None:
    """N(0, 0.02) everywhere (GPT-1, section 4.1)."""
    normal = partial(nn.init.normal_, std=0.02)
    _fill(model, normal, normal)


def init_bert(model: nn.Module) -> None:
    """N(0, 0.02) of which nothing lies beyond two standard deviations (the official code's truncated_normal)."""
    truncated = partial(nn.init.trunc_normal_, std=0.02, a=-0.04, b=0.04)
    _fill(model, truncated, truncated)


def init_gpt2(model: nn.Module, n_layers: int) -> None:
    """As `init_gpt1`, scaled by 1/sqrt(N) where a layer adds to the residual stream (GPT-2, section 2.3).

    N counts residual layers: two per block, attention and MLP.
    """
    init_gpt1(model)
    for module in model.modules():
        if isinstance(module, Block):
            for into_residual in (module.attn.o, module.mlp.down):
                nn.init.normal_(into_residual.weight, std=0.02 / math.sqrt(2 * n_layers))


def _fill(model: nn.Module, matrix: Callable[[Tensor], Tensor], embedding: Callable[[Tensor], Tensor]) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            matrix(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _EMBEDDINGS):
            embedding(module.weight)


def _unit_rows(weight: Tensor) -> Tensor:
    return nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Models that are built inside have names and shapes, and no memory: on torch's meta device, and without drawing
    numbers, for which torch would import its compiler first (1.5 s)."""
    with torch.device("meta"), _NoNumbers():
        yield


class _NoNumbers(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(function, "__module__", "") == "torch.nn.init" or function in (Tensor.uniform_, Tensor.erfinv_):
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))
