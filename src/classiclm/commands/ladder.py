"""classiclm ladder: train the twelve rungs and compare them; `show N` and `diff N M` print their code."""

import dataclasses
import difflib
import inspect
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.text import Text

from classiclm import registry
from classiclm.commands.ladder_report import render
from classiclm.commands.runs import make_trainer
from classiclm.commands.tables import console, show, table
from classiclm.config import NonNegative, load_yaml, parse_flags, validate
from classiclm.data.corpora import Data, entropy_floor
from classiclm.data.splits import TextData, prepare_text
from classiclm.data.tokenizers import Tokenizer
from classiclm.errors import Error
from classiclm.evaluate.ngram import baselines
from classiclm.files import make_folder, write_file
from classiclm.generate.sample import generate
from classiclm.models.ladder import LADDER, Config, Embedded, PlainStack
from classiclm.nn.base import LanguageModel
from classiclm.train import machine
from classiclm.train.progress import say
from classiclm.train.settings import TrainConfig
from classiclm.train.trainer import Trainer

STEPS = {"quick": 0.2, "standard": 1.0}  # share of each recipe's steps
_SAMPLE_TOKENS = 300
_CURVE_POINTS = 20
_TABLE_WIDTH = 82  # columns of the printed table without its last one


@dataclass(frozen=True)
class LadderFlags:
    """Train the twelve rungs from a bigram table to a GPT on the same characters, and compare them.

    `classiclm ladder show N` prints a rung's own code, `classiclm ladder diff N M` what changes from one to another.
    """

    data: Data = Data()  # named corpus, text file or folder
    out: str = "runs/ladder"  # a folder for ladder.json, report.html and one run per rung
    budget: Literal["quick", "standard"] = "standard"  # quick: a fifth of the steps
    rungs: str = "1-12"  # which: 1-12, 3, or 6,8-10
    seed: NonNegative = 1337  # of weights, order and dropout
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute


def main(argv: Sequence[str], prog: str) -> int:
    """`show N`, `diff N M`, or training."""
    if argv and argv[0] == "show":
        (rung,) = _rung_numbers(argv[1:], 1, f"{prog} show N")
        print(source_of(rung))
        return 0
    if argv and argv[0] == "diff":
        print(diff(*_rung_numbers(argv[1:], 2, f"{prog} diff N M")))
        return 0
    return climb(validate(LadderFlags, parse_flags(LadderFlags, argv, prog), "the command line"))


def climb(flags: LadderFlags) -> int:
    """Train the chosen rungs, one run each; table and sample on stdout, ladder.json and report.html in `out`.

    Finished rungs are taken as they are, so the same command goes on where it was stopped.
    """
    rungs = parse_rungs(flags.rungs)
    data = prepare_text(flags.data, "char")
    out = make_folder(Path(flags.out))
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        trainer = _trainer(out, rung, flags, data)
        result = trainer.fit()
        if result.signal is not None:
            say(f"stopped by signal {result.signal}, saved; the same command goes on from there")
            return 128 + result.signal
        rows.append(_row(rung, trainer, data.tokenizer))
        write_file(out / "ladder.json", json.dumps(rows, indent=1).encode())
    bars = references(flags.data, data)
    settings = f"budget {flags.budget}, seed {flags.seed}, {trainer.plan.reasons[0]}, {trainer.plan.precision}"
    write_file(out / "report.html", render(rows, bars, flags.data.name, settings).encode())
    _print_results(rows, bars, out)
    return 0


def parse_rungs(text: str) -> list[int]:
    """ "1-3,12" -> [1, 2, 3, 12]. Raises Error (exit 2)."""
    rungs: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        bounds = (first, last) if dash else (first, first)
        if not all(bound.isdecimal() for bound in bounds) or int(bounds[0]) > int(bounds[1]):
            raise Error("rungs", f"{text!r} is no list of rungs", "write it as in 1-12, 3, or 6,8-10")
        if int(bounds[0]) < 1 or int(bounds[1]) > 12:
            raise Error("rungs", f"{text!r} leaves the ladder", "choose from 1 to 12")
        rungs |= set(range(int(bounds[0]), int(bounds[1]) + 1))
    return sorted(rungs)


def _rung_numbers(arguments: Sequence[str], n: int, usage: str) -> list[int]:
    if len(arguments) != n or not all(a.isdecimal() and 1 <= int(a) <= 12 for a in arguments):
        raise Error(" ".join(arguments) or "ladder", f"expected {usage}", "give rung numbers from 1 to 12")
    return [int(argument) for argument in arguments]


def _trainer(out: Path, rung: int, flags: LadderFlags, data: TextData) -> Trainer:
    on_gpu = machine.look(flags.device).device == "cuda"
    preset = registry.preset("ladder-12-gpu" if rung == 12 and on_gpu else f"ladder-{rung}")
    steps = round(preset.recipe.steps * STEPS[flags.budget])
    recipe = dataclasses.asdict(dataclasses.replace(preset.recipe, steps=steps))
    config = TrainConfig(
        **recipe,
        preset=preset.name,
        data=flags.data,
        seed=flags.seed,
        device=flags.device,
        log_every=max(1, steps // 100),
        eval_every=max(1, steps // _CURVE_POINTS),
        save_every=max(1, steps // 4),
        compile=False,  # twelve small models: compiling would take longer than training them
        model=preset.config,
    )
    _check_budget(out / f"rung-{rung:02d}", steps)
    return make_trainer(out / f"rung-{rung:02d}", config, f"rung {rung}, {LADDER[rung - 1].name}", data)


def _check_budget(run: Path, steps: int) -> None:
    """A rung that was trained with another budget is no part of this ladder. Raises Error (exit 2)."""
    path = run / "config.yaml"
    if path.is_file() and (old := load_yaml(path).get("steps")) != steps:
        raise Error(run, f"was trained with a budget of {old} steps, not {steps}", "choose another --out or --budget")


def _row(rung: int, trainer: Trainer, tokenizer: Tokenizer) -> dict[str, Any]:
    """What ladder.json says of one rung; losses in nats per character."""
    entry, config = LADDER[rung - 1], trainer.config.model
    metrics = trainer.metrics.rows()
    model = trainer.model
    assert isinstance(model, LanguageModel)
    return {
        "rung": rung,
        "name": entry.name,
        "idea": entry.idea,
        "params": model.count_parameters(),
        "val_loss": metrics[-1]["val_loss"],
        "bits_per_char": metrics[-1]["val_loss"] / math.log(2),
        "seconds": metrics[-1]["seconds"],
        "sample": _sample(model, tokenizer),
        "curve": _curve(metrics),
        "block": _topology(entry.model),
        **{name: getattr(config, name) for name in ("n_layers", "n_heads", "d_model", "d_ff", "n_ctx", "dropout")},
    }


def _curve(metrics: list[dict[str, Any]]) -> list[list[float]]:
    """[step, training loss averaged since the last point, validation loss] for each validation."""
    curve, losses = [], []
    for row in metrics:
        losses.append(row["loss"])
        if "val_loss" in row:
            curve.append([row["step"], sum(losses) / len(losses), row["val_loss"]])
            losses = []
    return curve


def _sample(model: LanguageModel, tokenizer: Tokenizer) -> str:
    start = torch.tensor([tokenizer.encode("\n")], device=model.device)
    tokens = generate(model, start, _SAMPLE_TOKENS, temperature=0.8, seed=1)
    return tokenizer.decode(tokens[0].tolist()).strip("\n")


def _topology(model: type[LanguageModel]) -> str:
    if issubclass(model, PlainStack):
        return model.block.__name__
    return "attention" if issubclass(model, Embedded) else "none"


def references(corpus: Data, data: TextData) -> dict[str, float]:
    """What to hold the rungs against, in nats per character: exact n-gram tables, and the floor where it is known."""
    tables = baselines(data.train.tokens, data.val.tokens, data.tokenizer.vocab_size)
    floor = entropy_floor(corpus.name)
    return tables if floor is None else {**tables, "entropy of the grammar": floor}


def _print_results(rows: list[dict[str, Any]], bars: dict[str, float], out: Path) -> None:
    screen = console()
    rest = max(12, screen.width - _TABLE_WIDTH)  # what the numbers leave of a line
    made = table(["rung", "idea"], ["parameters", "val loss", "bits/char", "seconds"], last="a line of its own"[:rest])
    for row in rows:
        numbers = (
            f"{row['params']:,}",
            f"{row['val_loss']:.4f}",
            f"{row['bits_per_char']:.3f}",
            f"{row['seconds']:.1f}",
        )
        lines = row["sample"].splitlines()
        line = next((line for line in lines[1:] if len(line) > 20), " ".join(lines))
        made.add_row(str(row["rung"]), row["name"], *numbers, Text(line[:rest]))
    show(made)
    known = ", ".join(f"{name} {value:.3f}" for name, value in bars.items())
    screen.print(f"nats per character on the whole validation split; for comparison: {known}\n")
    screen.print(f"rung {rows[-1]['rung']} writes:\n\n{rows[-1]['sample']}\n", markup=False)
    screen.print(f"report: {out / 'report.html'}", markup=False, soft_wrap=True)


def source_of(rung: int) -> str:
    """A rung's sizes and the code of its classes, the shared shell first."""
    entry = LADDER[rung - 1]
    config: Config = registry.preset(f"ladder-{rung}").config
    classes: list[type] = [cls for cls in reversed(entry.model.__mro__) if issubclass(cls, LanguageModel)][1:]
    if issubclass(entry.model, PlainStack):
        classes.append(entry.model.block)
    sizes = [f"# {name} = {value}" for name, value in dataclasses.asdict(config).items() if name != "rung"]
    header = [f"# rung {rung}: {entry.name}. {entry.idea}", *sizes]
    return "\n".join([*header, *("\n\n" + inspect.getsource(cls).rstrip() for cls in classes)])


def diff(a: int, b: int) -> str:
    """What changes in sizes and code from rung a to rung b, as a unified diff."""
    old, new = source_of(a).splitlines(), source_of(b).splitlines()
    return "\n".join(difflib.unified_diff(old, new, f"rung {a}", f"rung {b}", lineterm="", n=2))
