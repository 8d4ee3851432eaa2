"""A checkout of nanoGPT, which is not part of the project: its model.py, in the order of its train.py."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from benchmarks.contenders.commands import run
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


def recipe(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Its recipe for a CPU, as its README has it, always from the same seed; its best checkpoint is measured on the
    whole validation split."""
    folder = _checkout(options.get("folder"))
    data = folder / "data" / "shakespeare_char"
    if not (data / "val.bin").is_file():
        raise Missing(f"no val.bin in {data}: run its prepare.py")
    steps, out = options["steps"], Path("out").resolve()
    words = ["train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"]
    words += ["--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128"]
    words += [f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--dropout=0.0", f"--out_dir={out}"]
    words += [f"--eval_interval={min(250, steps)}"]
    turns.ready(note=options["note"])
    while turns.wait():
        ran = run(words, folder)
        turns.done(
            {"recipe": ran.seconds}, peak=ran.peak, loss=validation_loss(folder, out / "ckpt.pt", data / "val.bin")
        )


def validation_loss(folder: Path, checkpoint: Path, tokens: Path) -> float:
    """The mean loss of a checkpoint of its over all windows of a split, one behind the other."""
    import numpy as np
    import torch

    code, saved = load(folder), torch.load(checkpoint, weights_only=True)
    model = code.GPT(code.GPTConfig(**saved["model_args"])).eval()
    model.load_state_dict(saved["model"])
    ids, n_ctx = torch.from_numpy(np.fromfile(tokens, np.uint16).astype(np.int64)), saved["model_args"]["block_size"]
    n = (len(ids) - 1) // n_ctx * n_ctx
    inputs, targets = ids[:n].view(-1, n_ctx), ids[1 : n + 1].view(-1, n_ctx)
    with torch.no_grad():
        return float(np.mean([model(x[None], y[None])[1].item() for x, y in zip(inputs, targets, strict=True)]))


def make(work: Work, folder: str | None) -> tuple[Any, Any]:
    """Its model and its optimizer. Raises Missing without a checkout."""
    code = load(_checkout(folder))
    sizes = {"block_size": work.n_ctx, "vocab_size": work.vocab_size, "n_layer": work.n_layers}
    sizes |= {"n_head": work.n_heads, "n_embd": work.d_model, "dropout": work.dropout, "bias": work.bias}
    model = code.GPT(code.GPTConfig(**sizes))
    return model, model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")


def _checkout(folder: str | None) -> Path:
    if folder is None:
        raise Missing("give a checkout with --nanogpt DIR")
    return Path(folder)


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
