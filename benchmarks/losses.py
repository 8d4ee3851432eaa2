"""Do the fast forms learn what the readable ones do? The first steps of whole recipes, both ways, from several seeds.

    python -m benchmarks losses [PRESETS...] [--seeds N] [--steps N] [--data NAME] [--out DIR]

Readable is: fp32, the whole batch at once, attention and layer norms as their equations are written, torch's own
dropout. Fast is what `auto` chooses. Both see the same batches and begin with
the same weights; where there is dropout, they draw it differently.
"""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from unittest.mock import patch

PRESETS = ("gpt2-shakespeare-cpu", "gpt1-tiny", "bert-shakespeare")
FILE = "losses.json"
WINDOW = 20  # steps whose losses are averaged before they are compared


def main(argv: Sequence[str]) -> None:
    """Train, write DIR/losses.json after each recipe, print the table."""
    from benchmarks import machine, report

    flags = parse(argv)
    flags.out.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    data: dict[str, Any] = {"machine": machine.describe(threads), "repeats": 0, "quick": False, "cases": []}
    data["losses"] = []
    for preset in flags.presets:
        data["losses"].append(compare(preset, range(1, flags.seeds + 1), flags.steps, flags.data))
        (flags.out / FILE).write_text(json.dumps(data, indent=1))
    print(report.losses(data["losses"]))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; ends the program for wrong ones, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks losses", description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="*", default=PRESETS, help=f"default: {', '.join(PRESETS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--data", help="a corpus or a text; default: each recipe's own")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where losses.json goes")
    flags = parser.parse_args(argv)
    if flags.seeds < 2 or flags.steps < WINDOW:
        parser.error(f"a spread takes two --seeds or more, and {WINDOW} --steps or more")
    return flags


def compare(preset: str, seeds: Sequence[int], n_steps: int, corpus: str | None = None) -> dict[str, Any]:
    """The losses of both forms: a row per seed."""
    from classiclm.commands.runs import prepare

    words = [preset, "--device", "cpu", *(["--data", corpus] if corpus else [])]
    data = prepare(_config(words, 0))
    curves: dict[str, list[list[float]]] = {"readable": [], "fast": []}
    for seed in seeds:
        with readable():
            curves["readable"].append(train([*words, *_plainly(preset)], seed, n_steps, data))
        curves["fast"].append(train(words, seed, n_steps, data))
    return {"preset": preset, "steps": n_steps, **curves}


def train(words: Sequence[str], seed: int, n_steps: int, data: Any) -> list[float]:
    """The losses of the first steps, as `classiclm train` takes them with these words; nothing is written."""
    from classiclm.commands.runs import make_trainer
    from classiclm.train.distributed import World, share

    trainer = make_trainer(Path("runs/benchmark"), _config(words, seed), "benchmark", data)
    tokens, losses, window = 0, [], []  # type: ignore[var-annotated]
    for step in range(n_steps):
        batch = trainer.task.batches(step)
        parts = share(batch, trainer.task.parts, trainer.plan.micro_batch, World())
        tokens += trainer.task.n_tokens(batch)
        losses.append(float(trainer.stepper(step, tokens, batch, parts, window, look=False).loss))
    return losses


def _config(words: Sequence[str], seed: int) -> Any:
    from classiclm.commands.runs import plain, resolve
    from classiclm.commands.train import TrainFlags

    return plain(resolve(TrainFlags, [*words, "--seed", str(seed)], "benchmarks")[0])


def _plainly(preset: str) -> list[str]:
    """The settings of the readable form."""
    from classiclm import registry

    whole = str(registry.preset(preset).recipe.batch)
    return ["--precision", "fp32", "--attention", "written", "--compile", "false", "--micro_batch", whole]


@contextmanager
def readable() -> Iterator[None]:
    """The parts of nn/ in the form in which they are explained."""
    import torch.nn.functional as F

    from classiclm.nn.dropout import Dropout
    from classiclm.nn.norm import LayerNorm, layer_norm

    with ExitStack() as patches:
        for owner, name, form in (
            (Dropout, "forward", lambda self, x: F.dropout(x, self.p, self.training)),
            (LayerNorm, "forward", lambda self, x: layer_norm(x, self.weight, self.bias, self.eps)),
        ):
            patches.enter_context(patch.object(owner, name, form))
        yield


def windows(losses: Sequence[float]) -> list[float]:
    """Means of WINDOW steps each; what is left over at the end is left out."""
    return [fmean(losses[i : i + WINDOW]) for i in range(0, len(losses) - WINDOW + 1, WINDOW)]


def distances(result: dict[str, Any]) -> list[tuple[float, float]]:
    """For each window: how far the two forms' means over the seeds are apart, and the readable form's standard
    deviation over the seeds."""
    plain, fast = ([windows(losses) for losses in result[form]] for form in ("readable", "fast"))
    columns = zip(zip(*plain, strict=True), zip(*fast, strict=True), strict=True)
    return [(abs(fmean(a) - fmean(b)), stdev(a)) for a, b in columns]
