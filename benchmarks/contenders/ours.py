"""classiclm itself: the wiring of `classiclm train` with random ids for a text, and `generate`."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import fixtures, profiling
from benchmarks.turns import Turns, decoding
from benchmarks.work import Work, batches, prompt

WHERE = "runs/benchmark"  # nothing is written there


def train(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """One optimizer step as `classiclm train` takes it, with everything that `auto` chooses here."""
    load()
    turns.imported()
    trainer = make_trainer(work, options.get("flags", ()))
    step = Step(trainer, work)
    serve(turns, step, trainer.model, trainer.model.count_parameters(), note(trainer, work))


def load() -> None:
    """Import what the functions here import, so that memory is counted without it."""
    from classiclm import registry
    from classiclm.commands import train  # noqa: F401
    from classiclm.convert import folders

    registry.presets()
    folders.maps()


def serve(turns: Turns, unit: Any, model: Any, n_params: int, said: str) -> None:
    """Take the turns, or say once where the time goes."""
    if turns.profiling:
        profiling.serve(turns, unit, model)
    else:
        turns.serve(unit, n_params, said)


class Step:
    """Steps on, and on random batches that are at hand."""

    def __init__(self, trainer: Any, work: Work, world: Any = None):
        from classiclm.train.distributed import World, share

        self.trainer, self.batches, self.n_tokens, self.number = trainer, batches(work), work.n_tokens, 0
        self.parts = [
            share(batch, trainer.task.parts, trainer.plan.micro_batch, world or World()) for batch in self.batches
        ]
        self.window: list[float] = []

    def __call__(self) -> None:
        which = self.number % len(self.batches)
        seen = (self.number + 1) * self.n_tokens
        self.loss = float(
            self.trainer.stepper(
                self.number, seen, self.batches[which], self.parts[which], self.window, look=False
            ).loss
        )
        self.number += 1


def make_trainer(work: Work, flags: Sequence[str] = (), world: Any = None) -> Any:
    """The trainer that `classiclm train` would make for a recipe of this size; its data are never read."""
    from classiclm.commands.runs import make_trainer as make
    from classiclm.commands.runs import plain, resolve
    from classiclm.commands.train import TrainFlags

    config = plain(resolve(TrainFlags, [*arguments(work), *flags], "benchmarks")[0])
    return make(Path(WHERE), config, "benchmark", corpus(work), world)


def arguments(work: Work) -> list[str]:
    """The command line of a training run with these sizes."""
    tokens = work.kind == "pairs"  # whose batch is counted in tokens
    settings: dict[str, Any] = {"batch": work.n_tokens if tokens else work.batch, "seed": work.seed, "device": "cpu"}
    if work.kind == "masked":
        settings["first_ctx"] = work.length
    names = ("n_layers", "d_model", "n_heads", "n_ctx", "dropout", *(("bias",) if work.kind == "causal" else ()))
    settings |= {f"model.{name}": getattr(work, name) for name in names}
    return [work.preset, *(part for name, value in settings.items() for part in (f"--{name}", str(value).lower()))]


def corpus(work: Work) -> Any:
    """Something of the right type and vocabulary for the wiring to be made with."""
    import numpy as np

    from classiclm.data.pairs import PairData, Pairs
    from classiclm.data.sentences import SentenceData, Sentences
    from classiclm.data.splits import Split, TextData

    name, tokenizer = "random ids", SimpleNamespace(vocab_size=work.vocab_size, end_of_text=0, to_json=lambda: "{}")
    tokens = np.zeros(4 * work.n_ctx, dtype=np.int32)
    if work.kind == "causal":
        split = Split(tokens, len(tokens), len(tokens), name)
        return TextData(name, tokenizer, split, split)  # type: ignore[arg-type]
    if work.kind == "masked":
        ends = np.arange(1, 5, dtype=np.int64)
        sentences = Sentences(tokens, ends * work.n_ctx, ends, len(tokens), name)
        return SentenceData(name, tokenizer, sentences, sentences)  # type: ignore[arg-type]
    starts = np.arange(5, dtype=np.int64) * work.length
    sides = np.zeros(starts[-1], dtype=np.int32)
    pairs = Pairs(sides, sides, starts, starts, (("", ""),) * 4, len(sides), len(sides), 0, name)
    return PairData(name, tokenizer, {"train": pairs, "val": pairs})  # type: ignore[arg-type]


def note(trainer: Any, work: Work) -> str:
    """What `auto` chose."""
    plan, unit = trainer.plan, "tokens" if work.kind == "pairs" else "sequences"
    compiled = ", compiled" if plan.compile else ""
    return (
        f"{plan.precision}, micro-batches of {plan.micro_batch} {unit}, {trainer.config.attention} attention{compiled}"
    )


def decode(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Greedy continuation with the cache, by the package's own `generate`, in one of its precisions."""
    from classiclm.generate.sample import generate

    load()
    turns.imported()
    model = packed(fixtures.read_model(work, turns.folder), options["precision"])
    tokens = prompt(work)

    def write(n: int) -> Any:
        return generate(model, tokens, n, temperature=0.0)

    unit = decoding(write, work.new_tokens)
    if turns.profiling:
        profiling.serve(turns, unit, model)
        return
    n_params = fixtures.count(work, turns.folder)
    turns.serve(unit, n_params, options["precision"], written=write(work.new_tokens)[:, work.length :].tolist())


def packed(model: Any, precision: str) -> Any:
    """The model laid out for writing in fp32, bf16, fp16 or int8; "plain": as it was loaded."""
    from classiclm.generate.packed import pack

    return model if precision == "plain" else pack(model, precision)


def checkpoint(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Save as training does (weights, moments, state; sums, fsync, rename), and read back as resuming does."""
    from classiclm.train import checkpoint as ours

    load()
    turns.imported()
    trainer = make_trainer(work)
    fill_moments(trainer.model, trainer.optimizer)
    run, state = Path("run"), ours.State(data="random ids")

    def unit() -> dict[str, float]:
        state.step += 1
        began = time.perf_counter()
        ours.save(run, trainer.model, trainer.optimizer, state, trainer.task.files)
        saved = time.perf_counter()
        folder, _ = ours.newest_valid(run)
        assert folder is not None
        ours.read_state(folder)
        ours.load_weights(folder, trainer.model)
        ours.load_moments(folder, trainer.model, trainer.optimizer)
        seconds = {"save": saved - began, "resume": time.perf_counter() - saved}
        ours.prune(run, state.step, 1, None)
        return seconds

    turns.serve(unit, trainer.model.count_parameters(), "with sha256 sums, verified when read")


def fill_moments(model: Any, optimizer: Any) -> None:
    """One step on made-up gradients, so that there is a state to save."""
    import torch

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
