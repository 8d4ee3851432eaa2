"""Checkpoints: `RUN/checkpoints/step-00002000/`, each complete, verified and loadable by itself.

    model.safetensors       weights, by their names in the model
    optimizer.safetensors   AdamW: "exp_avg/NAME", "exp_avg_sq/NAME" and the number of updates, "step"
    state.json              step, tokens seen, best validation loss, loss scale, the sum that names the data
    model.json              family, preset and sizes
    tokenizer.json          the tokenizer itself
    MANIFEST.json           sizes and sha256 sums

There is no "latest" file that could be wrong: the newest checkpoint is the highest step whose manifest holds.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from classiclm.errors import BAD_INPUT, DIVERGED, Error
from classiclm.files import defect, make_folder, publish_folder, remove_folder
from classiclm.train.progress import say

_PREFIX = "step-"


@dataclass
class State:
    """What a run is besides its weights and moments. All else follows from the step."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # training tokens seen
    best: dict[str, float] = field(default_factory=dict)  # {"step", "val_loss"}; empty before the first validation
    scaler: dict[str, float] = field(default_factory=dict)  # fp16 only
    data: str = ""  # fingerprint of the training tokens


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / "checkpoints" / f"{_PREFIX}{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, in order, valid or not."""
    names = [path.name for path in (run / "checkpoints").glob(f"{_PREFIX}*")]
    return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdecimal())


def newest_valid(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as its manifest says, and a line for each newer one that is not."""
    warnings: list[str] = []
    for step in reversed(saved_steps(run)):
        folder = folder_of(run, step)
        problem = defect(folder)
        if problem is None:
            return folder, warnings
        warnings.append(f"{folder} {problem}; going back to the one before")
    return None, warnings


def require(run: Path, which: str) -> Path:
    """The checkpoint of a run by name: "last", "best" or a step.

    Raises Error: exit 2 for another name, 3 if there is no valid one.
    """
    if not run.is_dir():
        raise Error(
            run,
            "is not a folder",
            "give the folder of a run, as in `classiclm train ... --out RUN`",
            BAD_INPUT,
        )
    if which.isdecimal():
        folder = folder_of(run, int(which))
        problem = defect(folder) if folder.is_dir() else "does not exist"
        if problem:
            have = ", ".join(map(str, saved_steps(run))) or "none"
            raise Error(folder, problem, f"choose one of the saved steps: {have}", BAD_INPUT)
        return folder
    if which not in ("last", "best"):
        raise Error(
            which, "is no checkpoint", "choose last, best, a saved step, or mean-5 for the mean of the last five"
        )
    newest, warnings = newest_valid(run)
    for warning in warnings:
        say(f"warning: {warning}")
    if newest is None:
        raise Error(run, "has no valid checkpoint", "train it first, or restore the folder from a copy", BAD_INPUT)
    best = read_state(newest).best if which == "best" else {}
    return require(run, str(int(best["step"]))) if best else newest


def save(
    run: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    extra: dict[str, str],
) -> Path:
    """Publish the checkpoint of state.step, with `extra` text files. Raises Error: exit 4 if it cannot be written,
    exit 5 rather than save a weight that is not finite."""
    weights = _contiguous(model.state_dict())
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            fix = "lower --lr, or go back to an older checkpoint by deleting newer ones"
            raise Error(f"step {state.step}", f"weight {name} is not finite; nothing was saved", fix, DIVERGED)
    files = {
        "model.safetensors": save_tensors(weights),
        "optimizer.safetensors": save_tensors(_moments(model, optimizer)),
        "state.json": json.dumps(vars(state)).encode(),
        **{name: text.encode() for name, text in extra.items()},
    }
    folder = folder_of(run, state.step)
    make_folder(folder.parent)
    if folder.is_dir():  # a damaged one that this run went back behind
        remove_folder(folder)
    publish_folder(folder, files, {"step": state.step})
    return folder


def read_state(folder: Path) -> State:
    """The state in a verified checkpoint."""
    return State(**json.loads((folder / "state.json").read_bytes()))


def read_model_info(folder: Path) -> dict[str, Any]:
    """The family, preset and sizes in a verified checkpoint."""
    return json.loads((folder / "model.json").read_bytes())


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Fill a model from a verified checkpoint. Raises Error (exit 3) for weights of other names or shapes."""
    _fill(model, _read_weights(folder), folder / "model.safetensors")


def load_mean(run: Path, n: int, model: torch.nn.Module) -> None:
    """Fill a model with the mean of the last n checkpoints, and say which: step 1, which every run saves, is none.

    Raises Error (exit 3) if there are not as many valid ones.
    """
    folders = [folder_of(run, step) for step in saved_steps(run) if step > 1]
    valid = [folder for folder in folders if defect(folder) is None]
    if len(valid) < n:
        fix = f"choose at most mean-{len(valid)}, or train with a larger --keep"
        raise Error(run, f"has {len(valid)} valid checkpoints, not {n}", fix, BAD_INPUT)
    say(f"{run}: the mean of steps {', '.join(str(int(f.name.removeprefix(_PREFIX))) for f in valid[-n:])}")
    weights = [_read_weights(folder) for folder in valid[-n:]]
    mean = {
        name: torch.stack([w[name].double() for w in weights]).mean(0).to(weights[0][name].dtype) for name in weights[0]
    }
    _fill(model, mean, run)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / "model.safetensors"
    try:
        return load_tensors(path.read_bytes())
    except SafetensorError as e:
        raise Error(path, f"is no safetensors file ({e})", "restore the folder from a copy", BAD_INPUT) from e


def _fill(model: torch.nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as e:  # torch lists all that does not fit, a line each
        first = next((line.strip() for line in str(e).splitlines()[1:]), str(e))
        fix = "restore the folder from a copy; model.json has to be the one that was saved with it"
        raise Error(source, f"does not hold this model's weights: {first}", fix, BAD_INPUT) from e


def load_moments(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer from a verified checkpoint."""
    tensors = load_tensors((folder / "optimizer.safetensors").read_bytes())
    on_device = bool(optimizer.defaults.get("fused"))  # where torch keeps the count; elsewhere it would be a wait
    for name, parameter in model.named_parameters():
        if f"exp_avg/{name}" not in tensors:
            continue
        optimizer.state[parameter] = {
            # Copies: AdamW counts up each parameter's own "step" in place, so they must not be one tensor.
            "step": tensors["step"].to(parameter.device if on_device else "cpu", copy=True),
            "exp_avg": tensors[f"exp_avg/{name}"].to(parameter.device, copy=True),
            "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].to(parameter.device, copy=True),
        }


def prune(run: Path, newest: int, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the last `keep` up to `newest`, which this process has just written, and the best.

    Later ones are damaged, or this process would not have started behind them; they are neither counted nor touched.
    """
    steps = [step for step in saved_steps(run) if step <= newest]
    for step in steps[:-keep]:
        if step != best_step:
            remove_folder(folder_of(run, step))


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter)
        if not moments:  # it has had no gradient yet, as an unused head has none
            continue
        tensors |= {f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq")}
        tensors["step"] = moments["step"]  # the same for all
    return _contiguous(tensors)


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
