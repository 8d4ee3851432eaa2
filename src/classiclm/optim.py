"""Adam in the forms of the papers, Muon, their parameter groups, and learning rates as pure functions of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from classiclm.errors import Error
from classiclm.nn.blocks import Block
from classiclm.recipe import Recipe, TokenRecipe


def learning_rate(step: int, tokens: int, recipe: Recipe) -> float:
    """The rate of update `step` = 0, 1, ..., after which `tokens` will have been seen.

    Linear warm-up to recipe.lr, then recipe.schedule; or, if the recipe has decay_tokens, both counted in tokens, half
    a cosine, and flat from there on (GPT-3, appendix B).
    """
    if isinstance(recipe, TokenRecipe) and recipe.warmup_tokens and recipe.decay_tokens:
        if tokens < recipe.warmup_tokens:
            return recipe.lr * tokens / recipe.warmup_tokens
        return _cosine((tokens - recipe.warmup_tokens) / (recipe.decay_tokens - recipe.warmup_tokens), recipe)
    if recipe.schedule == "noam":
        return _noam(step, recipe)
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / (recipe.warmup + 1)
    if recipe.schedule == "linear":
        return _linear(step, recipe)
    return _cosine((step - recipe.warmup) / max(1, recipe.steps - recipe.warmup), recipe)


def _cosine(progress: float, recipe: Recipe) -> float:
    """Half a cosine from lr to lr_floor * lr (GPT-1, section 4.1), flat behind progress = 1."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return recipe.lr * (recipe.lr_floor + (1 - recipe.lr_floor) * cosine)


def _linear(step: int, recipe: Recipe) -> float:
    """The line from lr at step 0, warm-up or not, to lr_floor * lr at step `steps` (BERT's official code)."""
    left = max(0.0, 1 - step / recipe.steps)
    return recipe.lr * (recipe.lr_floor + (1 - recipe.lr_floor) * left)


def _noam(step: int, recipe: Recipe) -> float:
    """Equation 3 of "Attention Is All You Need", lr being its peak, d_model^-0.5 warmup^-0.5; steps count from 1."""
    n, warmup = step + 1, max(1, recipe.warmup)
    return recipe.lr * min(n / warmup, math.sqrt(warmup / n))


class PaperAdam(Optimizer):
    """Adam with decoupled decay as two papers' official codes have it, one line apart from torch's.

        p <- p - rate (m / (sqrt(v) + eps) + weight_decay p)

    m and v are the running means of the gradient and its square. corrected=False (BERT): rate = lr, and m and v keep
    their bias towards 0, so that the first updates are large: with betas of 0.9 and 0.999, 3.2 times a corrected one's
    at first, 0.1 / sqrt(0.001), and 6.6 times at the twelfth.
    corrected=True (GPT-1): rate = lr sqrt(1 - beta2^t) / (1 - beta1^t), which the decay is multiplied by too.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        corrected: bool,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "corrected": corrected}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self._state_of(parameter) for parameter in params]
        for state in states:
            state["step"] += 1
        gradients = [cast(Tensor, parameter.grad) for parameter in params]
        m, v = [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]
        beta1, beta2 = group["betas"]
        torch._foreach_lerp_(m, gradients, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
        update = torch._foreach_sqrt(v)
        torch._foreach_add_(update, group["eps"])
        update = torch._foreach_div(m, update)
        if group["weight_decay"]:
            torch._foreach_add_(update, params, alpha=group["weight_decay"])
        torch._foreach_add_(params, update, alpha=-self._rate(group, int(states[0]["step"])))

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    @staticmethod
    def _rate(group: dict[str, Any], t: int) -> float:
        beta1, beta2 = group["betas"]
        return group["lr"] * (math.sqrt(1 - beta2**t) / (1 - beta1**t) if group["corrected"] else 1.0)


class MuonAdamW(Optimizer):
    """Muon for the matrices of blocks, AdamW for all else, as one optimizer with one list of groups and one state.

    Muon (Jordan et al. 2024) moves a matrix by its momentum with all singular values set to about 1, so that no
    direction is much slower than another. That makes no sense for a vector, or for embeddings, where a row is a token.
    Its updates are given the size that AdamW's have (Liu et al. 2025, "Muon is Scalable for LLM Training", section
    2.2), so that both follow the same learning rate and decay.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[dict], weight_decay: float, **adam: Any):
        """matrices: for Muon. others: AdamW's groups; adam: its lr, betas and eps."""
        muon = Muon(matrices, lr=adam["lr"], weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        adamw = AdamW(others, **adam, fused=True)
        self._muon, self._adamw = muon, adamw
        # "fused" says where AdamW wants its count of updates: on the device.
        super().__init__([*muon.param_groups, *adamw.param_groups], {"fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for part in (self._muon, self._adamw):
            # Anew each time: loading a state replaces both.
            part.param_groups = [group for group in self.param_groups if ("betas" in group) == (part is self._adamw)]
            part.state = self.state
            part.step()


def block_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The two-dimensional parameters inside the blocks (nn/blocks.py), in the model's order."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return [parameter for block in blocks for parameter in block.parameters() if parameter.ndim == 2]


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Matrices decay; biases and the gains of norms, which have one dimension, do not."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for _, parameter in named:
        (matrices if parameter.ndim >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, recipe: Recipe) -> Optimizer:
    """The optimizer that the recipe names; its learning rate is set anew at every step.

    "adamw" is torch's (Loshchilov and Hutter 2019), in one fused kernel; without decay it is the Adam of 2017. "muon"
    needs blocks: raises Error (exit 2) for a model without one.
    """
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": (recipe.beta1, recipe.beta2), "eps": recipe.eps}
    if recipe.optimizer == "muon":
        return _make_muon(model, recipe.weight_decay, settings)
    groups = parameter_groups(model.named_parameters(), recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return AdamW(groups, **settings, fused=True)
    return PaperAdam(groups, **settings, weight_decay=recipe.weight_decay, corrected=recipe.optimizer == "adam-gpt1")


def _make_muon(model: nn.Module, weight_decay: float, settings: dict[str, Any]) -> MuonAdamW:
    matrices = block_matrices(model)
    if not matrices:
        raise Error("optimizer muon", "moves the matrices of blocks, and this model has no block", "use adamw")
    taken = {id(parameter) for parameter in matrices}
    rest = ((name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in taken)
    return MuonAdamW(matrices, parameter_groups(rest, weight_decay), weight_decay, **settings)
