"""Saving and pruning while a run goes on: at once, or behind its back in a thread.

A saver knows which checkpoints its process has written or verified; only those count when old ones are deleted.
"""

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path

import torch

from classiclm.train import checkpoint
from classiclm.train.checkpoint import Alone, Snapshot, State, World
from classiclm.train.tensors import Piece


class Saver:
    """Saves a run's checkpoints and keeps the last `keep`, the best, and those of every `keep_every`-th step.

    All processes of `world` call it together.
    """

    def __init__(self, run: Path, keep: int, keep_every: int | None = None, world: World | None = None):
        self.run, self.keep, self.keep_every = run, keep, keep_every
        self.world: World = world or Alone()
        self._sound: set[int] = set()

    def trust(self, step: int) -> None:
        """Count a checkpoint that the caller has verified, as the one that the run goes on from."""
        self._sound.add(step)

    def save(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State, extra: Mapping[str, str]
    ) -> None:
        """Publish the checkpoint of state.step, then prune. Raises Error as `checkpoint.save`."""
        self._publish(checkpoint.snapshot(model, optimizer, state, extra), _best_step(state))

    def close(self) -> None:
        """Wait until all is on the disk. Raises Error if it is not."""

    def _publish(self, snapshot: Snapshot, best_step: int | None) -> None:
        checkpoint.publish(self.run, snapshot, self.world)
        self._sound.add(snapshot.step)
        if self.world.rank == 0:
            checkpoint.prune(self.run, snapshot.step, self.keep, best_step, self.keep_every, self._sound)


class AsyncSaver(Saver):
    """Copies the tensors to the host's memory and writes them in a thread, one checkpoint at a time.

    A failed save is raised by the next call of `save` or `close`. It needs memory for one copy of weights and moments.
    """

    _thread: threading.Thread | None = None
    _failure: BaseException | None = None

    def save(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: State, extra: Mapping[str, str]
    ) -> None:
        """Wait for the save before, copy, and begin to write. Raises Error if the save before has failed."""
        self.close()
        copy, best_step = _copied(checkpoint.snapshot(model, optimizer, state, extra)), _best_step(state)
        # No daemon: the interpreter waits for it, so that leaving the process does not tear what is being saved.
        self._thread = threading.Thread(target=self._work, args=(copy, best_step), name=f"save step {copy.step}")
        self._thread.start()

    def close(self) -> None:
        """Wait until all is on the disk. Raises Error if it is not."""
        if self._thread is not None:
            self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _work(self, snapshot: Snapshot, best_step: int | None) -> None:
        try:
            self._publish(snapshot, best_step)
        except BaseException as e:  # whatever it is belongs to the thread that trains
            self._failure = e


def _best_step(state: State) -> int | None:
    return int(state.best["step"]) if state.best else None


def _copied(snapshot: Snapshot) -> Snapshot:
    return dataclasses.replace(snapshot, weights=_on_host(snapshot.weights), moments=_on_host(snapshot.moments))


def _on_host(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    return {
        name: dataclasses.replace(piece, tensor=piece.tensor.to("cpu", copy=True)) for name, piece in pieces.items()
    }
