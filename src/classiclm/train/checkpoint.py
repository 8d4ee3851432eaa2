"""Checkpoints: `RUN/checkpoints/step-00002000/`, each complete, verified and loadable by itself.

    model.safetensors       weights, by their names in the model
    optimizer.safetensors   every tensor of the optimizer's state, "STATE/NAME" (AdamW: "exp_avg/NAME" and so on); the
                            number of updates is one "step" for all, or "step/NAME" each if they differ
    state.json              step, tokens seen, best validation loss, loss scale, the sum that names the data
    model.json              family, preset and sizes
    tokenizer.json          the tokenizer itself
    MANIFEST.json           sizes and sha256 sums

Where the weights are shared out to processes, the first two are a file for each, `model-00001-of-00002.safetensors`,
with the rows that it held. Whoever reads takes the rows it needs, with as many processes as there are then.

There is no "latest" file that could be wrong: the newest checkpoint is the highest step whose manifest holds.
"""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from classiclm.errors import BAD_INPUT, DIVERGED, RESOURCE, Error
from classiclm.files import Sums, defect, make_folder, remove_folder, reveal, seal, temporary_for, write_into, writing
from classiclm.train.progress import say
from classiclm.train.tensors import Piece, is_shared_out, non_finite, part_name, piece_of, reading, size_of, stream

_PREFIX = "step-"
_SPARE = 1.1  # of the bytes that a checkpoint is reckoned to take
_WEIGHTS, _MOMENTS = "model", "optimizer"
_STEP = "step"  # an optimizer's count of updates


@dataclass
class State:
    """What a run is besides its weights and moments. All else follows from the step."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # training tokens seen
    best: dict[str, float] = field(default_factory=dict)  # {"step", "val_loss"}; empty before the first validation
    scaler: dict[str, float] = field(default_factory=dict)  # fp16 only
    data: str = ""  # fingerprint of the training tokens
    owed: dict[str, Any] = field(default_factory=dict)  # the row of this step, if its validation was broken off
    skipped: int = 0  # steps in a row, up to this one, whose gradient was not used
    window: list[float] = field(default_factory=list)  # the last gradient norms, where spikes are skipped


class World(Protocol):
    """The processes that save together. What it sends over must be used by nothing else meanwhile."""

    @property
    def rank(self) -> int:
        """Which of them this is."""

    @property
    def size(self) -> int:
        """How many they are."""

    def gather(self, value: Any) -> list[Any]:
        """What each rank brings, in order of rank, on all ranks, as JSON can hold it. Nobody goes on before all."""


class Alone:
    """The one process of a run that has no other."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """The only one's."""
        return [value]


@dataclass(frozen=True)
class Snapshot:
    """All that one process brings to a checkpoint."""

    step: int
    weights: Mapping[str, Piece]
    moments: Mapping[str, Piece]
    texts: Mapping[str, str]
    shared_out: bool  # whether each process has rows of its own, or all have the same

    def files(self, rank: int, size: int) -> dict[str, Any]:
        """name -> the bytes of the files that this process writes, as streams."""
        if rank > 0 and not self.shared_out:
            return {}
        files: dict[str, Any] = {}
        for stem, tensors in ((_WEIGHTS, self.weights), (_MOMENTS, self.moments)):
            mine = {name: piece for name, piece in tensors.items() if rank == 0 or piece.n_rows is not None}
            name = part_name(stem, rank, size) if self.shared_out else f"{stem}.safetensors"
            files[name] = stream(mine)
        return files | ({name: [text.encode()] for name, text in self.texts.items()} if rank == 0 else {})

    def n_bytes(self, rank: int) -> int:
        """About what this process's files take."""
        tensors = size_of(self.weights) + size_of(self.moments)
        texts = sum(len(text.encode()) for text in self.texts.values())
        return (tensors if rank == 0 or self.shared_out else 0) + (texts if rank == 0 else 0)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / "checkpoints" / f"{_PREFIX}{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, in order, valid or not."""
    names = [path.name for path in (run / "checkpoints").glob(f"{_PREFIX}*")]
    return sorted(int(name.removeprefix(_PREFIX)) for name in names if name.removeprefix(_PREFIX).isdecimal())


def newest_valid(run: Path, unread: str | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is as its manifest says, and a line for each newer one that is not. unread: as of
    `files.defect`."""
    warnings: list[str] = []
    for step in reversed(saved_steps(run)):
        folder = folder_of(run, step)
        problem = defect(folder, unread)
        if problem is None:
            return folder, warnings
        warnings.append(f"{folder} {problem}; going back to the one before")
    return None, warnings


def require(run: Path, which: str) -> Path:
    """The checkpoint of a run by name, "last", "best" or a step, for who reads its weights and not its moments.

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
        problem = defect(folder, _MOMENTS) if folder.is_dir() else "does not exist"
        if problem:
            have = ", ".join(map(str, saved_steps(run))) or "none"
            raise Error(folder, problem, f"choose one of the saved steps: {have}", BAD_INPUT)
        return folder
    if which not in ("last", "best"):
        raise Error(
            which, "is no checkpoint", "choose last, best, a saved step, or mean-5 for the mean of the last five"
        )
    newest, warnings = newest_valid(run, _MOMENTS)
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
    world: World | None = None,
) -> Path:
    """Publish the checkpoint of state.step, with `extra` text files; all processes of `world` call it together.

    Raises Error, in all processes if in one, and then nothing is saved: exit 4 if it cannot be written or there is too
    little space, exit 5 rather than save a weight that is not finite.
    """
    return publish(run, snapshot(model, optimizer, state, extra), world or Alone())


def snapshot(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State, extra: Mapping[str, str]
) -> Snapshot:
    """What a checkpoint of now consists of; the tensors are those in use, not copies."""
    weights = model.state_dict()
    shared_out = any(map(is_shared_out, weights.values()))
    texts = {"state.json": json.dumps(vars(state)), **extra}
    return Snapshot(state.step, _pieces(weights), _pieces(_moments(model, optimizer)), texts, shared_out)


def publish(run: Path, snapshot: Snapshot, world: World) -> Path:
    """Write a snapshot and make it visible, as `save` does. Every rank writes its own files, rank 0 the manifest."""
    folder = folder_of(run, snapshot.step)
    needed = sum(_together(world, lambda: _checked_bytes(snapshot, world.rank)))
    with _naming_the_last_good(run, snapshot.step):
        name = _together(world, lambda: _begin(folder, needed) if world.rank == 0 else "")[0]
        temporary = folder.with_name(name)
        try:
            sums = _together(world, lambda: _write(temporary, folder, snapshot.files(world.rank, world.size)))
            _together(world, lambda: _finish(temporary, folder, sums) if world.rank == 0 else None)
        finally:
            if world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


_T = TypeVar("_T")


def _together(world: World, work: Callable[[], _T]) -> list[_T]:
    """What `work` returns on each rank, on all of them. Raises Error on all if one fails: its own, or the first's."""
    answer, failure = None, None
    try:
        answer = work()
    except Error as e:
        failure = e
    answers = world.gather([answer, None if failure is None else list(failure.args)])
    failures = [Error(*arguments) for _, arguments in answers if arguments is not None]
    if failures:
        raise failure or failures[0]
    return [answer for answer, _ in answers]


def _checked_bytes(snapshot: Snapshot, rank: int) -> int:
    """The size of this process's files. Raises Error (exit 5) for a weight that is not finite."""
    name = non_finite(snapshot.weights)
    if name is not None:
        fix = "lower --lr, or go back to an older checkpoint by deleting newer ones"
        raise Error(f"step {snapshot.step}", f"weight {name} is not finite; nothing was saved", fix, DIVERGED)
    return snapshot.n_bytes(rank)


def _begin(folder: Path, n_bytes: int) -> str:
    """The name of a temporary folder beside `folder` with room for n_bytes. Raises Error (exit 4)."""
    make_folder(folder.parent)
    with writing(folder):
        needed, free = int(_SPARE * n_bytes), shutil.disk_usage(folder.parent).free
        if free < needed:
            why = f"needs {needed:,} bytes and {free:,} are free"
            raise Error(folder, why, "free some space, or choose a smaller --keep", RESOURCE)
        temporary = temporary_for(folder)
        temporary.mkdir()
    return temporary.name


def _write(temporary: Path, folder: Path, files: Mapping[str, Any]) -> Sums:
    with writing(folder):
        return write_into(temporary, files)


def _finish(temporary: Path, folder: Path, sums: list[Sums]) -> None:
    """Rank 0: the manifest over all ranks' files, then the name."""
    with writing(folder):
        seal(temporary, {name: total for part in sums for name, total in part.items()}, {"step": step_of(folder)})
        if folder.is_dir():  # a damaged one, or one that this run has gone back behind
            remove_folder(folder)
        reveal(temporary, folder)


@contextmanager
def _naming_the_last_good(run: Path, step: int) -> Iterator[None]:
    """Adds to the Error of a save that failed where the run can go on from."""
    try:
        yield
    except Error as e:
        older = [saved for saved in saved_steps(run) if saved < step]
        last = f"the last checkpoint is that of step {older[-1]}" if older else "there is no checkpoint yet"
        raise Error(e.what, f"{e.why}; {last}", e.fix, e.code) from e


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder."""
    return int(folder.name.removeprefix(_PREFIX))


def read_state(folder: Path) -> State:
    """The state in a verified checkpoint."""
    return State(**json.loads((folder / "state.json").read_bytes()))


def read_model_info(folder: Path) -> dict[str, Any]:
    """The family, preset and sizes in a verified checkpoint."""
    return json.loads((folder / "model.json").read_bytes())


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Fill a model from a verified checkpoint; one on the meta device takes the file's own memory, and no copy.

    Raises Error (exit 3) for weights of other names or shapes.
    """
    targets = model.state_dict()
    with reading(folder, _WEIGHTS) as reader:
        weights = {
            n: reader.like(n, targets[n]).to(targets[n].dtype) if n in targets else reader.read(n)
            for n in reader.shapes
        }
        _fill(model, weights, reader.source)


def load_mean(run: Path, n: int, model: torch.nn.Module) -> None:
    """Fill a model with the mean of the last n checkpoints, and say which: step 1, which every run saves, is none.

    Raises Error (exit 3) if there are not as many valid ones.
    """
    folders = [folder_of(run, step) for step in saved_steps(run) if step > 1]
    valid = [folder for folder in folders if defect(folder) is None]
    if len(valid) < n:
        fix = f"choose at most mean-{len(valid)}, or train with a larger --keep"
        raise Error(run, f"has {len(valid)} valid checkpoints, not {n}", fix, BAD_INPUT)
    say(f"{run}: the mean of steps {', '.join(str(step_of(folder)) for folder in valid[-n:])}")
    with ExitStack() as stack:
        readers = [stack.enter_context(reading(folder, _WEIGHTS)) for folder in valid[-n:]]
        _fill(model, {name: _mean([reader.read(name) for reader in readers]) for name in readers[0].shapes}, run)


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(tensors[0].dtype)


def _fill(model: torch.nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    try:
        model.load_state_dict(weights, assign=any(parameter.is_meta for parameter in model.parameters()))
    except RuntimeError as e:  # torch lists all that does not fit, a line each
        first = next((line.strip() for line in str(e).splitlines()[1:]), str(e))
        fix = "restore the folder from a copy; model.json has to be the one that was saved with it"
        raise Error(source, f"does not hold this model's weights: {first}", fix, BAD_INPUT) from e


def load_moments(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state from a verified checkpoint: of each parameter whatever was saved of it.

    Raises Error (exit 3) for a file that cannot be read.
    """
    # A fused kernel keeps the count of updates on the device; elsewhere that would be a wait at every step.
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    with reading(folder, _MOMENTS) as reader:
        kinds: dict[str, list[str]] = {}  # of each parameter
        for kind, _, name in (key.partition("/") for key in reader.shapes if key != _STEP):
            kinds.setdefault(name, []).append(kind)
        for name, parameter in model.named_parameters():
            keys = {kind: f"{kind}/{name}" for kind in kinds.get(name, [])}
            keys |= {_STEP: _STEP} if keys and _STEP in reader.shapes else {}
            state = {kind: reader.like(key, parameter) for kind, key in keys.items()}
            host = () if id(parameter) in fused else (_STEP,)
            # Copies: the count is added to in place, so it must not be one tensor for all, and none may be a file's.
            copies = {k: t.to("cpu" if k in host else parameter.device, copy=True) for k, t in state.items()}
            if copies:
                optimizer.state[parameter] = copies


def prune(
    run: Path,
    newest: int,
    keep: int,
    best_step: int | None,
    keep_every: int | None = None,
    sound: Collection[int] | None = None,
) -> None:
    """Delete all checkpoints but the last `keep` up to `newest`, which this process has just written, the best, and
    those of every `keep_every`-th step.

    Only sound ones count: those in `sound`, which this process wrote or verified, or if that is None, those that
    are verified now. Later ones than `newest` are damaged, or this process would not have started behind them; they
    are neither counted nor touched.
    """
    steps = [step for step in saved_steps(run) if step <= newest]
    kept: list[int] = []
    for step in reversed(steps):
        if len(kept) < keep and (step == newest or _is_sound(run, step, sound)):
            kept.append(step)
    spared = {best_step} | {step for step in steps if keep_every and step % keep_every == 0}
    for step in steps:
        if len(kept) == keep and step < kept[-1] and step not in spared:
            remove_folder(folder_of(run, step))


def _is_sound(run: Path, step: int, sound: Collection[int] | None) -> bool:
    return step in sound if sound is not None else defect(folder_of(run, step)) is None


def _pieces(tensors: Mapping[str, Tensor]) -> dict[str, Piece]:
    pieces = {name: piece_of(tensor) for name, tensor in tensors.items()}
    return {name: piece for name, piece in pieces.items() if piece is not None}


def _moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors of the optimizer's state, "STATE/NAME". Raises ValueError for a state that is no tensor."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():  # none if it has had no gradient yet
            if not isinstance(value, Tensor):
                raise ValueError(f"{type(optimizer).__name__} keeps {kind}, which is no tensor and cannot be saved")
            tensors[f"{kind}/{name}"] = value
    counts = [key for key in tensors if key.startswith(f"{_STEP}/")]
    states = {key.partition("/")[2] for key in tensors}
    if counts and len(counts) == len(states) and len({float(tensors[key]) for key in counts}) == 1:
        tensors[_STEP] = tensors[counts[0]]
        tensors = {key: tensor for key, tensor in tensors.items() if key not in counts}
    return tensors
