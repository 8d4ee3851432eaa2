"""What each process of tests/test_ranks.py runs: trainers with faults in chosen places, and a record of what they did.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/trainer_run.py JSON

JSON has the cases; the answers of all ranks to each go to the file `out`.
"""

import dataclasses
import hashlib
import json
import signal
import sys
from pathlib import Path

import torch

from classiclm.commands.runs import make_trainer
from classiclm.data.corpora import Data
from classiclm.errors import Error
from classiclm.models.gpt2 import Config
from classiclm.nn.mask import IGNORE
from classiclm.recipe import Recipe
from classiclm.train import checkpoint
from classiclm.train.distributed import joined, world_from_env
from classiclm.train.settings import TrainConfig


def config_of(text, strategy="none", **settings):
    """A run of a tiny GPT-2: 12 rows a step, so that 2 ranks have 3 micro-batches of 2 rows each."""
    recipe = dataclasses.asdict(Recipe(batch=12, steps=24, lr=1e-2, warmup=5)) | {"precision": "fp32"}
    every = {"log_every": 1, "eval_every": 1000, "save_every": 4, "keep": 3}
    model = Config(n_layers=1, d_model=15, n_heads=3, n_ctx=12, dropout=settings.pop("dropout", 0.1))
    where = {"preset": "gpt2-shakespeare-cpu", "data": Data(text), "device": "cpu", "strategy": strategy}
    return TrainConfig(**{**recipe, **every, **where, "micro_batch": 2, "model": model, **settings})


class Poison:
    """The objective, with a factor on the loss of chosen (step, rank, micro-batch) triples."""

    def __init__(self, trainer, factors):
        self.trainer, self.real = trainer, trainer.stepper.objective
        self.factors = {(step, rank, part): float(factor) for step, rank, part, factor in factors}
        self.calls = 0
        trainer.stepper.objective = self

    def counts(self, batch):
        self.calls = 0
        return self.real.counts(batch)

    def __call__(self, model, batch):
        loss = self.real(model, batch)
        place = (self.trainer.state.step, self.trainer.world.rank, self.calls)
        self.calls += 1
        term = loss.terms["loss"]
        loss.terms["loss"] = dataclasses.replace(term, sum=term.sum * self.factors.get(place, 1.0))
        return loss


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def digest_of(trainer):
    """Of this process's weights and moments: what the next step starts from."""
    sums = hashlib.sha256()
    for parameter in trainer.model.parameters():
        moments = [tensor for _, tensor in sorted(trainer.optimizer.state[parameter].items())]
        for tensor in (parameter, *moments):
            sums.update(local(tensor.detach()).contiguous().numpy().tobytes())
    return sums.hexdigest()


def rows_with_targets(parts):
    """Each row of a process's micro-batches, but not those that only fill up."""
    rows = [row for part in parts for row in zip(part["inputs"].tolist(), part["targets"].tolist(), strict=True)]
    return [[*inputs, targets[-1]] for inputs, targets in rows if targets[-1] != IGNORE]


class Record:
    """The stepper, with a note of what it got and what it did; `spoil` does something to its gradients."""

    def __init__(self, trainer, spoil):
        self.trainer, self.real = trainer, trainer.stepper
        self.notes = []
        scaler, unscale = self.real.scaler, self.real.scaler.unscale_
        scaler.unscale_ = lambda optimizer: (spoil(trainer), unscale(optimizer))
        trainer.stepper = self

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, step, tokens, batch, parts, *rest):
        before = digest_of(self.trainer)
        outcome = self.real(step, tokens, batch, parts, *rest)
        note = {"step": step, "before": before, "after": digest_of(self.trainer), "skipped": outcome.skipped}
        scale = self.real.scaler.get_scale() if self.real.scaler.is_enabled() else None
        self.notes.append({**note, "rows": rows_with_targets(parts), "scale": scale})
        return outcome


def spoiler(cells):
    """Puts infinity into one number of one rank's share of the gradient, as it is after the processes' sum."""

    def spoil(trainer):
        if [trainer.state.step, trainer.world.rank] in cells:
            local(next(trainer.model.parameters()).grad)[0, 0] = torch.inf

    return spoil


def run(world, text, folder, strategy="none", factors=(), spoiled=(), stop=None, fp16=False, ruin=None, **settings):
    """Train, and say what each step did and how it ended. stop: the step behind which a signal comes; fp16: with its
    loss scaler; ruin: the rank whose weights get a NaN before the first save."""
    trainer = make_trainer(Path(folder), config_of(text, strategy, **settings), world=world)
    if fp16:
        trainer.stepper.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    Poison(trainer, factors)
    record = Record(trainer, spoiler([list(cell) for cell in spoiled]))
    trainer.task = dataclasses.replace(trainer.task, batches=stopping(trainer, stop))
    if ruin == world.rank:
        local(list(trainer.model.parameters())[1].detach()).view(-1)[0] = torch.nan
    error = None
    try:
        trainer.fit()
    except Error as e:
        error = [e.code, str(e)]
    return {"notes": record.notes, "error": error, "saved": checkpoint.saved_steps(Path(folder))}


def stopping(trainer, stop):
    """The batches; asks rank 1, or who is alone, to end behind step `stop`."""
    batches, asked = trainer.task.batches, trainer.world.size - 1

    def batch_of(step):
        if step == stop and trainer.world.rank == asked:
            trainer._stop.number = signal.SIGTERM
        return batches(step)

    return batch_of


def main(settings):
    torch.set_num_threads(1)
    with joined(world_from_env(), "cpu", 60) as world:
        answers = [world.gather(run(world, **case)) for case in settings["cases"]]
        if world.is_main:
            Path(settings["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
