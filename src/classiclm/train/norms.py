"""How large gradients and activations are, layer by layer: for whoever asks why a deep model does not learn.

A layer is a block (nn/blocks.py) or, outside of blocks, the module that owns the parameters. Nothing here touches a
weight, a gradient or a random number, so a run with norms has the bytes of one without.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from classiclm.nn.blocks import Block


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of any model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Block)}


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """ "grad_norm/LAYER" -> the norm of the layer's gradient, (). The root of the sum of their squares is the norm of
    the whole gradient; so call it before clipping, and after the loss scale is taken out."""
    blocks = tuple(blocks_of(model))
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(_layer(name, blocks), []).append(parameter.grad)
    return {f"grad_norm/{layer}": nn.utils.get_total_norm(of_layer) for layer, of_layer in gradients.items()}


def activation_norms(model: nn.Module, forward: Callable[[], Any]) -> dict[str, Tensor]:
    """ "act_rms/BLOCK" -> the root of the mean square of what the block puts out, (), padding included.

    `forward` runs the model once, as in `lambda: objective(model, micro_batch)`. This is a pass of its own, without
    gradient and dropout: a hook on the training pass would miss a compiled model and see a checkpointed block twice.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, x: Tensor) -> None:  # (B, T, D)
            found[f"act_rms/{name}"] = torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel())

        return hook

    hooks = [block.register_forward_hook(keep(name)) for name, block in blocks_of(model).items()]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            forward()
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()
        reshard = getattr(model, "reshard", None)  # FSDP keeps the root whole for a backward pass; none is to come
        if reshard is not None:
            reshard()
    return found


def as_numbers(norms: dict[str, Tensor]) -> dict[str, float | None]:
    """All norms in one transfer from the device; None for one that is not finite, since JSON has no number for it."""
    if not norms:
        return {}
    values = torch.stack([_whole(norm).float() for norm in norms.values()]).tolist()
    return {name: value if math.isfinite(value) else None for name, value in zip(norms, values, strict=True)}


def _layer(parameter: str, blocks: tuple[str, ...]) -> str:
    """The block a parameter is in, else its owner; its own name at the top of the model."""
    inside = (block for block in blocks if parameter.startswith(f"{block}."))
    return next(inside, parameter.rpartition(".")[0] or parameter)


def _whole(norm: Tensor) -> Tensor:
    """The norm over all processes, where parameters are sharded (a DTensor)."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
