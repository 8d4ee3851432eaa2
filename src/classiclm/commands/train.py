"""classiclm train: a model from scratch, or on from where its folder stands."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from classiclm.commands import sweeps
from classiclm.commands.runs import (
    check_tokenizer,
    check_vocabulary,
    choose_preset,
    make_trainer,
    plain,
    prepare,
    resolve,
)
from classiclm.config import to_yaml
from classiclm.errors import Error
from classiclm.files import locked
from classiclm.train import machine
from classiclm.train.distributed import World, joined, world_from_env
from classiclm.train.progress import format_seconds, say
from classiclm.train.settings import TrainConfig
from classiclm.train.trainer import Result, Trainer


@dataclass(frozen=True)
class TrainFlags(TrainConfig):
    """Train a model from scratch, or go on with the run in --out.

    Settings come from the preset, then --config FILE.yaml, then flags. `classiclm train PRESET --help` shows the
    preset's own sizes too.
    """

    out: str | None = None  # the run's folder
    config: str | None = None  # a YAML file with any of these settings
    print_config: bool = False  # print the resulting YAML and stop


def main(argv: Sequence[str], prog: str) -> int:
    """Parse, train, say how it ended; 128 + n after a signal."""
    if choose_preset(TrainFlags, argv, prog)[0].recipe.task == "sweeps":  # NumPy, with a loop of its own
        return sweeps.main(argv, prog)
    flags, given = resolve(TrainFlags, argv, prog)
    config = plain(flags)
    if flags.print_config:
        print(to_yaml(config), end="")
        return 0
    if flags.out is None:
        raise Error("--out", "is missing", "name the run's folder, as in --out runs/a")
    world = world_from_env()
    check_free(Path(flags.out), world)
    data = prepare(config)
    check_vocabulary(given, data)
    check_tokenizer(given, data)
    with joined(world, machine.look(config.device).device, config.timeout) as world:
        trainer = make_trainer(Path(flags.out), config, "train", data, world)
        return report(trainer, trainer.fit())


def check_free(run: Path, world: World) -> None:
    """Refuse a run that another process is at, before any text is read. Raises Error (exit 4).

    The lock is let go of at once: `fit` takes it for good. Holding it from here on would leave a folder behind where
    the data are missing; a run that is not there yet is nobody's, so none is made.
    """
    if world.is_main and run.is_dir():
        with locked(run):
            pass


def report(trainer: Trainer, result: Result) -> int:
    """The last line on stderr, and the exit code."""
    if result.signal is not None:
        say(f"stopped by signal {result.signal} at step {result.step}, saved; the same command goes on from there")
        return 128 + result.signal
    rows = trainer.metrics.rows()
    last = rows[-1] if rows else {}
    best = trainer.state.best
    parts = [f"{trainer.run}: step {result.step}"]
    if "val_loss" in last:
        parts.append(f"val_loss {last['val_loss']:.4f} on the whole split")
    if best:
        parts.append(f"best sampled {best['val_loss']:.4f} at step {int(best['step'])}")
    say(", ".join([*parts, format_seconds(trainer.seconds)]))
    return 0
