"""Every call of a save, a publication and a pruning is made to fail or to kill, in turn; then the run is started again.

The oracle knows no manifest: the checkpoint that is found must have, byte for byte, the files of the old or the new.
"""

import os
import shutil
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from classiclm.errors import BUG, RESOURCE, Error
from classiclm.files import locked
from classiclm.train import checkpoint
from classiclm.train.checkpoint import State, folder_of
from classiclm.train.savers import AsyncSaver, Saver

from .shim import DEAD, KINDS, Shim

OLD, NEW = 10, 20
EXTRA = {"model.json": '{"family": "none"}', "tokenizer.json": '{"kind": "char"}'}


def make_training(n_updates):
    """A tiny model and its optimizer after some updates."""
    torch.manual_seed(0)
    model = nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(n_updates):
        model(torch.ones(2, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


TRAINED = {step: make_training(step // 10) for step in (OLD, NEW)}


def save(run, step, kind=Saver, keep=1):
    """What a run does at a step: save, publish, prune."""
    saver = kind(run, keep=keep)
    if step == NEW:
        saver.trust(OLD)
    saver.save(*TRAINED[step], State(step=step), EXTRA)
    saver.close()


def first(run):
    """Nothing is there yet."""
    run.mkdir()


def after_another(run):
    """An older checkpoint is there, which the save of the new one prunes."""
    save(run, OLD)


def over_a_damaged_one(run):
    """An older one is there, and a damaged one of the step that is saved."""
    save(run, OLD)
    save(run, NEW, keep=2)
    (folder_of(run, NEW) / "model.safetensors").write_bytes(b"torn")


def after_a_crash(run):
    """An older one is there, and what a killed writer left."""
    save(run, OLD)
    litter = folder_of(run, NEW).with_name(".classiclm-tmp-step-00000020-12345678")
    shutil.copytree(folder_of(run, OLD), litter)
    (run / ".classiclm-tmp-config.yaml-12345678").write_bytes(b"half")


SCENARIOS = {
    "the first save": (first, Saver),
    "save, publish, prune": (after_another, Saver),
    "over a damaged one": (over_a_damaged_one, Saver),
    "after a crash": (after_a_crash, Saver),
    "in a thread": (after_another, AsyncSaver),
}


@dataclass
class Tally:
    """How many cases there were, by kind of fault, and what was lost, in words."""

    cases: Counter = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


def start_and_save(run, kind):
    """A start of the run up to its next save: take the lock, sweep, save."""
    with locked(run, "checkpoints"):
        save(run, NEW, kind)


def scratch():
    """A folder for one case; in memory where there is such a place, for the disk would be waited for at every flush."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def in_process(work, shim):
    """Run work under a shim that does not kill; its exit code."""
    try:
        with shim.installed():
            work()
    except Error as e:
        return e.code
    except Exception:
        traceback.print_exc()
        return BUG
    return 0


def in_child(work, shim):
    """Run work under a shim in a fork of this process; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = BUG
    try:
        with shim.installed():
            work()
        code = 0
    except Error as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def n_calls(prepare, kind):
    """How many calls a save makes when nothing fails."""
    with scratch() as folder:
        run, shim = Path(folder) / "run", Shim()
        prepare(run)
        with shim.installed():
            start_and_save(run, kind)
    return shim.count


def contents(folder):
    """name -> bytes of the files of a checkpoint."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def expected():
    """step -> contents of its checkpoint, made where nothing fails."""
    with scratch() as folder:
        run = Path(folder)
        for step in (OLD, NEW):
            save(run, step, keep=2)
        return {step: contents(folder_of(run, step)) for step in (OLD, NEW)}


def loss(run, oracle, had_old, had_damaged, code):
    """What is wrong after a fault, in words; None if nothing is lost and the run goes on by itself."""
    visible = {step: contents(folder_of(run, step)) for step in checkpoint.saved_steps(run)}
    for step, files in visible.items():
        if files != oracle[step] and not (had_damaged and step == NEW and files["model.safetensors"] == b"torn"):
            return f"a visible checkpoint of step {step} is neither the old nor the new one"
    if code == 0 and visible.get(NEW) != oracle[NEW]:
        return "the save said that all is well, and the new checkpoint is not there"
    with locked(run, "checkpoints"):
        found, _ = checkpoint.newest_valid(run)
        if found is None:
            return "no checkpoint is found" if had_old or code == 0 else None
        if contents(found) != oracle[checkpoint.step_of(found)]:
            return f"what is found in {found.name} is neither the old nor the new checkpoint"
    return None


def goes_on(run, oracle):
    """Whether the run can be started again and save, and leaves nothing but its checkpoint."""
    start_and_save(run, Saver)
    names = {path.name for path in run.iterdir()} | {path.name for path in (run / "checkpoints").iterdir()}
    return contents(folder_of(run, NEW)) == oracle[NEW] and names == {".lock", "checkpoints", folder_of(run, NEW).name}


def one_case(name, kind, k, oracle):
    """What is lost if call k of a scenario is struck, in words, or None."""
    prepare, saver = SCENARIOS[name]
    with scratch() as folder:
        run = Path(folder) / "run"
        prepare(run)
        runs = in_process if kind in ("ENOSPC", "EIO") else in_child
        code = runs(lambda: start_and_save(run, saver), Shim(kind, k))
        if code not in (0, RESOURCE, DEAD):
            return f"the process left with {code}"
        problem = loss(run, oracle, prepare is not first, prepare is over_a_damaged_one, code)
        return problem or (None if goes_on(run, oracle) else "the run does not go on by itself")


def every_case(scenarios=tuple(SCENARIOS), kinds=KINDS, stride=1, oracle=None, stop=False):
    """Every `stride`-th call of every scenario by every kind of fault. With stop, only up to the first loss."""
    tally, oracle = Tally(), oracle or expected()
    for name in scenarios:
        calls = n_calls(*SCENARIOS[name])
        for kind in kinds:
            for k in range(0, calls, stride):
                tally.cases[name, kind] += 1
                problem = one_case(name, kind, k, oracle)
                if problem:
                    tally.losses.append(f"{name}, {kind} at call {k} of {calls}: {problem}")
                if problem and stop:
                    return tally
    return tally
