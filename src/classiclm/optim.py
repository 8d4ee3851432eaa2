"""AdamW, its parameter groups, and learning rates as pure functions of the step."""

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from classiclm.recipe import Recipe


def learning_rate(step: int, tokens: int, recipe: Recipe) -> float:
    """The rate of update `step` = 0, 1, ..., after which `tokens` will have been seen.

    Linear warm-up, then half a cosine down to lr_floor * lr (GPT-1, section 4.1): over the steps of the run, or, with
    decay_tokens, over that many tokens and flat from there on (GPT-3, appendix B).
    """
    if recipe.warmup_tokens is not None and recipe.decay_tokens is not None:
        if tokens < recipe.warmup_tokens:
            return recipe.lr * tokens / recipe.warmup_tokens
        progress = (tokens - recipe.warmup_tokens) / (recipe.decay_tokens - recipe.warmup_tokens)
    else:
        if step < recipe.warmup:
            return recipe.lr * (step + 1) / (recipe.warmup + 1)
        progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.lr * (recipe.lr_floor + (1 - recipe.lr_floor) * cosine)


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices decay; biases and the gains of norms, which have one dimension, do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019) in one fused kernel; its learning rate is set anew at every step."""
    groups = parameter_groups(model.named_parameters(), recipe.weight_decay)
    betas = (recipe.beta1, recipe.beta2)
    return AdamW(groups, lr=recipe.lr, betas=betas, eps=recipe.eps, fused=True)
