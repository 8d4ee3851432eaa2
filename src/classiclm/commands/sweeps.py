"""classiclm train rumelhart1986-...: many small nets at once, each a full look at all cases per step.

Every seed is a net of its own; they are computed side by side and never meet. What a run leaves behind is a function of
its settings, so it holds no times: stopped and continued, it ends with the same bytes.

RUN/config.yaml, env.json, metrics.jsonl and checkpoints/ are as in any run (see train/run.py, train/checkpoint.py)
RUN/results.json    what each net has learnt, its weights, and a summary beside the paper's numbers
RUN/hinton.svg      the weights of the best net
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from classiclm.commands import hinton, tables
from classiclm.commands.runs import resolve
from classiclm.config import NonNegative, Positional, Positive, to_yaml
from classiclm.errors import BAD_INPUT, DIVERGED, Error
from classiclm.files import locked, make_folder, publish_folder, remove_folder, write_file
from classiclm.models import rumelhart1986 as paper
from classiclm.models.rumelhart1986 import CASES, Config, Floats, Recipe
from classiclm.train import checkpoint
from classiclm.train.progress import Clock, format_seconds, say
from classiclm.train.run import Metrics, check_config, write_config, write_environment
from classiclm.train.signals import StopRequest, stop_requests

_LINE_EVERY = 10.0  # seconds between lines of progress
PAPER = {"symmetry": {"sweeps": 1425}, "family-trees": {"sweeps": 1500, "held_out_right": 4}}  # Figs 1 and 4


@dataclass(frozen=True)
class SweepsConfig(Recipe):
    """The settings of a run."""

    preset: Annotated[str | None, Positional] = None  # which experiment; `classiclm models` lists them
    seed: NonNegative = 1337  # of the first net; the others have the numbers that follow
    log_every: Positive = 50  # sweeps between rows of metrics.jsonl
    save_every: Positive = 500  # sweeps between checkpoints
    keep: Positive = 2  # newest checkpoints to keep
    model: Config = dataclasses.field(default_factory=Config)


@dataclass(frozen=True)
class SweepsFlags(SweepsConfig):
    """Train the nets of 1986, many seeds at once, or go on with the run in --out.

    Settings come from the preset, then --config FILE.yaml, then flags. `model` is set in a file.
    """

    out: str | None = None  # the run's folder
    config: str | None = None  # a YAML file with any of these settings
    print_config: bool = False  # print the resulting YAML and stop


def main(argv: Sequence[str], prog: str) -> int:
    """Parse, train, print what the nets have learnt; 128 + n after a signal."""
    flags, _ = resolve(SweepsFlags, argv, prog)
    config = SweepsConfig(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(SweepsConfig)})
    if flags.print_config:
        print(to_yaml(config), end="")
        return 0
    if flags.out is None:
        raise Error("--out", "is missing", "name the run's folder, as in --out runs/a")
    nets = Sweeps(Path(flags.out), config)
    stopped = nets.fit()
    if stopped is not None:
        say(f"stopped by signal {stopped} at sweep {nets.state.step}, saved; the same command goes on from there")
        return 128 + stopped
    show(nets.results(), config)
    return 0


@dataclass
class State:
    """Where S nets stand. All else follows from the settings."""

    step: int  # sweeps done
    weights: Floats  # (S, P)
    velocity: Floats  # (S, P): the last change of each weight
    solved_at: NDArray[np.int64]  # (S,): the sweep at which all cases were first right, -1 = not yet
    rested_at: NDArray[np.int64]  # (S,): the sweep from which a net no longer changes, -1 = it still does


class Sweeps:
    """Trains the nets of a config in the folder `run`; `fit` goes on from the newest checkpoint there.

    Raises Error (exit 2) if the net does not fit the cases.
    """

    def __init__(self, run: Path, config: SweepsConfig):
        self.run, self.config, self.metrics = run, config, Metrics(run)
        self.net, self.cases = paper.build(config.model), CASES[config.cases]()
        self._check()
        self.seeds = range(config.seed, config.seed + config.seeds)
        order = np.stack([np.random.default_rng((seed, 1)).permutation(len(self.cases.names)) for seed in self.seeds])
        self.held_out, self.trained = np.split(order, [config.held_out], axis=1)  # (S, held out), (S, trained on)
        self.inputs, self.targets = self.cases.inputs[self.trained], self.cases.targets[self.trained]  # (S, C, units)
        weights = np.stack([paper.first_weights(self.net, seed, config.init) for seed in self.seeds])
        never = np.full(config.seeds, -1)
        self.state = State(0, weights, np.zeros_like(weights), never, never.copy())
        self._stop = StopRequest()
        self._logged = self._saved = -1  # the newest row and checkpoint
        self._said = time.monotonic()

    def _check(self) -> None:
        units = self.config.model.units
        ends = sum(units[name] for name in self.config.model.inputs), units[self.config.model.output]
        needed = self.cases.inputs.shape[1], self.cases.targets.shape[1]
        if ends != needed:
            why = f"has {ends[0]} input and {ends[1]} output units; {self.config.cases} has {needed[0]} and {needed[1]}"
            raise Error("model.units", why, "change the groups between input and output only")
        if self.config.held_out >= len(self.cases.names):
            why = f"{self.config.held_out} of {len(self.cases.names)} cases leaves none to learn"
            raise Error("held_out", why, "give a smaller number")

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do: all sweeps done, or all nets at rest."""
        return self.state.step >= self.config.steps or bool((self.state.rested_at >= 0).all())

    def fit(self) -> int | None:
        """Train to the end; the number of the signal that stopped it, after a save, or None.

        Raises Error: exit 2 for a folder of another config, 3 for damaged checkpoints, 4 for a folder that is locked or
        cannot be written, 5 if the loss is not finite.
        """
        text = to_yaml(self.config)
        with locked(self.run, "checkpoints"), stop_requests(self._stop):
            check_config(self.run, text, checkpoint.saved_steps(self.run))
            self._resume()
            if not self.done:
                write_config(self.run, text)
                write_environment(self.run)
                began = time.monotonic()
                with np.errstate(over="ignore", invalid="ignore"):  # what has diverged is an Error below
                    self._loop()
                say(f"{self.run}: {self.state.step:,} sweeps, {format_seconds(time.monotonic() - began)}")
            if self._stop.number is None:
                self._publish()
        return self._stop.number

    def _loop(self) -> None:
        """Look, rest who may, log, save, change the weights: until done, or until a signal."""
        s, tolerance, clock = self.state, self.config.tolerance, Clock(self.config.steps)
        live, inputs, targets = self._live()
        while True:
            y = self.net.forward(s.weights[live], inputs)
            error = y[self.net.config.output] - targets  # (live, C, outputs)
            if self._rest(live, error):
                live, inputs, targets = self._live()
                continue
            if not np.isfinite(error).all():
                fix = "lower --lr; the same command goes on from the last checkpoint"
                raise Error(f"sweep {s.step}", "an output is not a number; training diverged", fix, DIVERGED)
            self._record(clock)
            if self.done or self._stop.number is not None:
                return
            weights, velocity = s.weights[live], s.velocity[live]
            gradient = self.net.backward(weights, y, paper.tolerated(error, tolerance))
            paper.change_weights(weights, velocity, gradient, self.config, s.step)
            s.weights[live], s.velocity[live] = weights, velocity
            s.step += 1

    def _live(self) -> tuple[NDArray[np.int64], Floats, Floats]:
        """The nets that still learn, with their cases."""
        live = np.flatnonzero(self.state.rested_at < 0)
        return live, self.inputs[live], self.targets[live]

    def _rest(self, live: NDArray[np.int64], error: Floats) -> bool:
        """Note which nets have all cases right now, and lay those to rest that the stop rule allows: was there any?"""
        s = self.state
        right = (np.abs(error) < 0.5).all(axis=(1, 2))
        if not right.any():
            return False
        s.solved_at[live[right & (s.solved_at[live] < 0)]] = s.step
        if self.config.stop is None:
            return False
        resting = live[right & (paper.loss(error) < self.config.stop)]
        s.rested_at[resting] = s.step
        return len(resting) > 0

    def measure(self, which: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """E of each net on its own cases `which` (S, C), and how many of them are right: every output on its side of
        0.5. Both are (S,); the tolerance has no say here."""
        y = self.net.forward(self.state.weights, self.cases.inputs[which])[self.net.config.output]
        error = y - self.cases.targets[which]
        return paper.loss(error), (np.abs(error) < 0.5).all(axis=2).sum(axis=1)

    def _record(self, clock: Clock) -> None:
        """Log and save if it is time. The rows are on disk before a checkpoint of the same step is."""
        step, last = self.state.step, self.done
        if step > self._logged and (last or step % self.config.log_every == 0):
            row = self._row()
            self.metrics.append(row)
            self._logged = step
            now = time.monotonic()
            remaining = clock.mark(step, now)
            if now - self._said >= _LINE_EVERY and remaining is not None:
                self._said = now
                told = f"loss {row['loss']:.4f}, {row['solved']:.0%} solved, {format_seconds(remaining)} to go"
                say(f"sweep {step:,}/{self.config.steps:,} {told}")
        due = step > 0 and (step == 1 or step % self.config.save_every == 0)
        if step > self._saved and (due or last or self._stop.number is not None):
            self._save()

    def _row(self) -> dict[str, Any]:
        """Loss: the mean over seeds of E. Solved: the share of nets with all cases right; the others: of cases."""
        errors, right = self.measure(self.trained)
        n = self.trained.shape[1]
        row = {"loss": errors.mean(), "solved": (right == n).mean(), "cases_right": right.mean() / n}
        if self.config.held_out:
            row["held_out_right"] = self.measure(self.held_out)[1].mean() / self.config.held_out
        return {"step": self.state.step, **{name: float(value) for name, value in row.items()}}

    def _save(self) -> None:
        s = self.state
        weights = {name: np.ascontiguousarray(view) for name, view in self.net.views(s.weights).items()}
        moving = {f"velocity/{n}": np.ascontiguousarray(view) for n, view in self.net.views(s.velocity).items()}
        marks = {"step": s.step, "solved_at": s.solved_at.tolist(), "rested_at": s.rested_at.tolist()}
        info = {"family": paper.build.__module__.rpartition(".")[2], "preset": self.config.preset}
        files = {
            "model.safetensors": save_tensors(weights),
            "optimizer.safetensors": save_tensors(moving),
            "state.json": json.dumps(marks).encode(),
            "model.json": json.dumps({**info, "config": dataclasses.asdict(self.config.model)}, indent=1).encode(),
        }
        folder = checkpoint.folder_of(self.run, s.step)
        self.metrics.flush_to_disk()
        make_folder(folder.parent)
        if folder.is_dir():  # a damaged one that this run went back behind
            remove_folder(folder)
        publish_folder(folder, files, {"step": s.step})
        self._saved = s.step
        checkpoint.prune(self.run, s.step, self.config.keep, None)

    def _resume(self) -> None:
        """Take the state of the newest valid checkpoint, and drop the rows behind it."""
        folder, warnings = checkpoint.newest_valid(self.run)
        for warning in warnings:
            say(f"warning: {warning}")
        if folder is None and checkpoint.saved_steps(self.run):
            fix = "restore the folder from a copy, or choose another --out"
            raise Error(self.run, "has checkpoints, and none of them is valid", fix, BAD_INPUT)
        if folder is None:
            n, c, p = len(self.seeds), self.trained.shape[1], self.net.count_parameters()
            say(f"{self.config.preset}: {n} nets of {p} parameters, {c} cases each; float64 on the CPU")
            self.metrics.cut_behind(-1)
            return
        self._read(folder)
        rows = self.metrics.cut_behind(self.state.step)
        self._logged, self._saved = (rows[-1]["step"] if rows else -1), self.state.step
        say(f"{self.run} is finished" if self.done else f"continuing {self.run} from sweep {self.state.step}")

    def _read(self, folder: Path) -> None:
        s = self.state
        weights = load_tensors((folder / "model.safetensors").read_bytes())
        velocity = load_tensors((folder / "optimizer.safetensors").read_bytes())
        for name, view in self.net.views(s.weights).items():
            view[:] = weights[name]
        for name, view in self.net.views(s.velocity).items():
            view[:] = velocity[f"velocity/{name}"]
        marks = json.loads((folder / "state.json").read_bytes())
        s.step, s.solved_at[:], s.rested_at[:] = marks["step"], marks["solved_at"], marks["rested_at"]

    def results(self) -> dict[str, Any]:
        """What is written to results.json."""
        (errors, right), (_, held_out_right) = self.measure(self.trained), self.measure(self.held_out)
        views, n = self.net.views(self.state.weights), self.trained.shape[1]
        rows = []
        for i, seed in enumerate(self.seeds):
            at = int(self.state.solved_at[i])
            row: dict[str, Any] = {"seed": seed, "solved": bool(right[i] == n), "solved_at": at if at >= 0 else None}
            row |= {"cases_right": int(right[i]), "cases": n, "loss": float(errors[i])}
            if self.config.held_out:
                row["held_out_right"] = int(held_out_right[i])
                row["held_out"] = [self.cases.names[case] for case in self.held_out[i]]
            if self.config.cases == "symmetry":
                seen = paper.pattern(next(iter(views.values()))[i, :6])  # the six bits, in the first group they feed
                row |= seen if row["solved"] else dict.fromkeys(seen)
            row["weights"] = {name: view[i].round(6).tolist() for name, view in views.items()}
            rows.append(row)
        head = {"preset": self.config.preset, "parameters": self.net.count_parameters(), "step": self.state.step}
        return {**head, "summary": summary(rows, self.config), "seeds": rows}

    def _publish(self) -> None:
        """results.json and hinton.svg."""
        results = self.results()
        best = min(results["seeds"], key=_rank)
        weights = {name: np.array(matrix) for name, matrix in best["weights"].items()}
        names = hinton.unit_names(self.net, self.cases.input_names, self.cases.output_names)
        title = f"{self.config.preset}, seed {best['seed']}: weights after {self.state.step:,} sweeps"
        drawing = hinton.standalone(hinton.draw(self.net, weights, names, title))
        write_file(self.run / "results.json", json.dumps(results, indent=1).encode())
        write_file(self.run / "hinton.svg", drawing.encode())


def summary(rows: Sequence[dict[str, Any]], config: SweepsConfig) -> dict[str, Any]:
    """All nets in a few numbers, and the paper's own."""
    solved = [row for row in rows if row["solved"]]
    shares = [row["cases_right"] / row["cases"] for row in rows]
    made: dict[str, Any] = {
        "seeds": len(rows),
        "solved": len(solved),
        "median_sweeps": median(row["solved_at"] for row in solved) if solved else None,
        "cases_right": fmean(shares),
        "seeds_95_percent_right": sum(share >= 0.95 for share in shares),
    }
    if config.held_out:
        made |= {"held_out": config.held_out, "held_out_right": fmean(row["held_out_right"] for row in rows)}
    if config.cases == "symmetry":  # ratios to the nearest half, so that nets of one kind fall together
        kinds = Counter(":".join(f"{round(2 * part) / 2:g}" for part in row["ratio"]) for row in solved)
        made |= {"textbook": sum(row["textbook"] for row in solved), "ratios": dict(kinds.most_common())}
    return {**made, "paper": PAPER[config.cases]}


def show(results: dict[str, Any], config: SweepsConfig) -> None:
    """The table on stdout: a line per net, and the summary beside the paper's numbers."""
    columns = {"seed": "seed", "cases_right": "cases right", "cases": "of", "solved_at": "sweeps to all", "loss": "E"}
    if config.held_out:
        columns["held_out_right"] = f"of {config.held_out} held out"
    if config.cases == "symmetry":
        columns |= {"ratio": "ratio", "antisymmetry": "antisymmetry", "textbook": "1:2:4"}
    made = tables.table((), list(columns.values()))
    for row in results["seeds"]:
        made.add_row(*(_cell(row[key]) for key in columns))
    tables.show(made)
    s = results["summary"]
    lines = [f"{s['solved']} of {s['seeds']} nets have all cases right; {s['cases_right']:.1%} of the cases on average"]
    if s["solved"]:
        sweeps, theirs = s["median_sweeps"], s["paper"]["sweeps"]
        lines.append(f"median sweeps to all right: {sweeps:,.0f} (the paper's net: {theirs:,})")
    if "held_out_right" in s:
        all_right = s["paper"].get("held_out_right")
        beside = f" (the paper's net: {all_right} of 4)" if all_right else ""
        lines.append(f"held out: {s['held_out_right']:.1f} of {s['held_out']} right on average{beside}")
    if "ratios" in s:
        kinds = ", ".join(f"{kind} in {count}" for kind, count in [*s["ratios"].items()][:3])
        shares = f" (commonest: {kinds})" if kinds else ""
        lines.append(f"1:2:4 within 10 %, signs opposite: {s['textbook']} of {s['solved']}{shares}")
    tables.console().print("\n".join(lines))


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3f}"
        case list():
            return " : ".join(f"{part:.2f}" for part in value)
    return f"{value}"


def _rank(row: dict[str, Any]) -> tuple[float, ...]:
    """The best net sorts first: most cases right, then the paper's pattern, then held-out cases, then E."""
    return -row["cases_right"], -int(row.get("textbook") or 0), -row.get("held_out_right", 0), row["loss"]
