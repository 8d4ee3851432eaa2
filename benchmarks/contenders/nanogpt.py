"""A checkout of nanoGPT, which is not part of the project: its model.py, in the order of its train.py."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from benchmarks.turns import Missing, Turns
from benchmarks.work import Work, batches


def train(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Its defaults on a CPU: the whole batch at once, no autocast, no compiling; or, as an option, under autocast."""
    from contextlib import nullcontext

    import torch

    turns.imported()
    model, optimizer = make(work, options.get("folder"))
    fast = options["precision"] == "bf16"
    data, state = [(batch["inputs"], batch["targets"]) for batch in batches(work)], {"step": 0}

    def unit() -> None:
        inputs, targets = data[state["step"] % len(data)]
        with torch.autocast("cpu", torch.bfloat16) if fast else nullcontext():
            _, loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        state["step"] += 1

    n_params = model.get_num_params(non_embedding=False)
    turns.serve(unit, n_params, "bf16 autocast" if fast else "fp32, its default on a CPU")


def make(work: Work, folder: str | None) -> tuple[Any, Any]:
    """Its model and its optimizer. Raises Missing without a checkout."""
    if folder is None:
        raise Missing("give a checkout with --nanogpt DIR")
    code = load(Path(folder))
    sizes = {"block_size": work.n_ctx, "vocab_size": work.vocab_size, "n_layer": work.n_layers}
    sizes |= {"n_head": work.n_heads, "n_embd": work.d_model, "dropout": work.dropout, "bias": work.bias}
    model = code.GPT(code.GPTConfig(**sizes))
    return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")


def load(folder: Path) -> Any:
    """Its model.py as a module. Raises Missing if it is not there."""
    path = folder / "model.py"
    if not path.is_file():
        raise Missing(f"no model.py in {folder}")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
