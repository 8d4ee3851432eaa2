"""What a run keeps of its checkpoints, and saving them behind its back."""

import math
import threading

import pytest
import torch

from classiclm.errors import Error
from classiclm.files import defect
from classiclm.train import checkpoint
from classiclm.train.checkpoint import State, folder_of, saved_steps
from classiclm.train.savers import AsyncSaver, Saver
from test_checkpoint import make_model, train, trained, weights_of

# What is kept


def save_steps(run, steps, saver):
    model, optimizer = trained()
    best = {}
    for step in steps:
        best = {"step": 20, "val_loss": 1.0} if step == 20 else best
        saver.save(model, optimizer, State(step=step, best=best), {})
    saver.close()


@pytest.mark.parametrize("kind", [Saver, AsyncSaver])
def test_the_last_the_best_and_every_so_many_steps_are_kept(tmp_path, kind):
    save_steps(tmp_path, range(10, 130, 10), kind(tmp_path, keep=2, keep_every=50))
    assert saved_steps(tmp_path) == [20, 50, 100, 110, 120]
    assert all(defect(folder_of(tmp_path, step)) is None for step in saved_steps(tmp_path))


def test_only_checkpoints_that_were_written_or_verified_here_count_as_kept(tmp_path):
    save_steps(tmp_path, (10, 30), Saver(tmp_path, keep=9))
    save_steps(tmp_path, (40,), Saver(tmp_path, keep=9))
    (folder_of(tmp_path, 40) / "model.safetensors").write_bytes(b"torn")
    saver = Saver(tmp_path, keep=2)
    saver.trust(30)
    save_steps(tmp_path, (50,), saver)
    assert saved_steps(tmp_path) == [30, 40, 50]  # 40 is neither counted nor deleted while it is among the last
    save_steps(tmp_path, (60,), saver)
    assert saved_steps(tmp_path) == [50, 60]


def test_without_a_list_of_sound_ones_pruning_looks_for_itself(tmp_path):
    save_steps(tmp_path, (10, 30, 40, 50), Saver(tmp_path, keep=9))
    (folder_of(tmp_path, 40) / "model.safetensors").write_bytes(b"torn")
    checkpoint.prune(tmp_path, 50, 2, None)
    assert saved_steps(tmp_path) == [30, 40, 50]
    checkpoint.prune(tmp_path, 50, 5, None)
    assert saved_steps(tmp_path) == [30, 40, 50]


# Behind the run's back


def test_a_save_in_a_thread_holds_the_weights_of_its_step_whatever_comes_later(tmp_path, monkeypatch):
    model, optimizer = trained()
    before = weights_of(model)
    may_write, real = threading.Event(), checkpoint.publish
    monkeypatch.setattr(checkpoint, "publish", lambda *a: may_write.wait(20) and real(*a))
    saver, state = AsyncSaver(tmp_path, keep=2), State(step=3)
    saver.save(model, optimizer, state, {})
    train(model, optimizer, 2)
    state.step = 5
    assert saved_steps(tmp_path) == []
    may_write.set()
    saver.close()
    again = make_model(seed=4)
    checkpoint.load_weights(folder_of(tmp_path, 3), again)
    assert all(map(torch.equal, before, weights_of(again)))
    assert checkpoint.read_state(folder_of(tmp_path, 3)).step == 3


@pytest.mark.parametrize("when", ["save", "close"])
def test_a_save_that_failed_in_its_thread_is_raised_by_the_next_call_and_once(tmp_path, when):
    model, optimizer = trained()
    with torch.no_grad():
        model["b"].weight[0, 0] = math.nan
    saver = AsyncSaver(tmp_path, keep=2)
    saver.save(model, optimizer, State(step=3), {})
    with pytest.raises(Error, match="not finite"):
        saver.close() if when == "close" else saver.save(model, optimizer, State(step=4), {})
    saver.close()
    assert saved_steps(tmp_path) == []


def test_at_most_one_save_is_under_way_and_none_is_deleted_before_the_next_is_there(tmp_path, monkeypatch):
    running, seen, real = [0], [], checkpoint.publish

    def publish(*arguments):
        running[0] += 1
        seen.append((running[0], len(saved_steps(tmp_path))))
        folder = real(*arguments)
        running[0] -= 1
        return folder

    monkeypatch.setattr(checkpoint, "publish", publish)
    save_steps(tmp_path, (1, 2, 3, 4), AsyncSaver(tmp_path, keep=1))
    assert seen == [(1, 0), (1, 1), (1, 1), (1, 1)]
    assert saved_steps(tmp_path) == [4]
