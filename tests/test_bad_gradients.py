"""A gradient that is not finite, or a spike, leaves weights and moments as they were; too many in a row end the run."""

import dataclasses
import json
import math

import pytest
import torch

from classiclm.commands.runs import make_trainer
from classiclm.data.corpora import Data
from classiclm.errors import Error
from classiclm.files import sha256_of_file
from classiclm.models.gpt2 import Config
from classiclm.recipe import Recipe
from classiclm.train import checkpoint
from classiclm.train.machine import Plan
from classiclm.train.settings import TrainConfig
from classiclm.train.step import is_spike, kernel_heeds, out_of_memory


@pytest.fixture
def config(text_file):
    recipe = dataclasses.asdict(Recipe(batch=6, steps=24, lr=1e-2, warmup=5))
    every = {"log_every": 1, "eval_every": 12, "save_every": 4}
    model = Config(n_layers=1, d_model=16, n_heads=2, n_ctx=12, dropout=0.1)
    data = Data(str(text_file))
    return TrainConfig(
        **recipe, **every, preset="gpt2-shakespeare-cpu", data=data, device="cpu", micro_batch=2, model=model
    )


class Poison:
    """The objective, with a factor on the loss of chosen (step, micro-batch) pairs."""

    def __init__(self, trainer, factors):
        self.trainer, self.factors, self.real = trainer, factors, trainer.stepper.objective
        self.calls = 0
        trainer.stepper.objective = self

    def counts(self, batch):
        self.calls = 0
        return self.real.counts(batch)

    def __call__(self, model, batch):
        loss = self.real(model, batch)
        factor = self.factors.get((self.trainer.state.step, self.calls), 1.0)
        self.calls += 1
        term = loss.terms["loss"]
        loss.terms["loss"] = dataclasses.replace(term, sum=term.sum * factor)
        return loss


def state_of(trainer):
    """Weights and moments, as bytes."""
    moments = [trainer.optimizer.state[p] for p in trainer.model.parameters()]
    tensors = [*trainer.model.parameters(), *(tensor for state in moments for _, tensor in sorted(state.items()))]
    return [tensor.detach().clone() for tensor in tensors]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_step_with_a_bad_micro_batch_changes_nothing(config, tmp_path, factor, place):
    trainer = make_trainer(tmp_path, config)
    Poison(trainer, {(9, place): factor})
    seen, real = {}, trainer._train_step

    def watched():
        seen[trainer.state.step] = state_of(trainer) if trainer.state.step in (9, 10, 11) else None
        return real()

    trainer._train_step = watched
    assert trainer.fit().step == 24
    before, after, later = seen[9], seen[10], seen[11]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, later, strict=True))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if row.get("skipped")] == [10]
    assert rows[9]["loss"] is None
    assert len(rows) == 24


@pytest.mark.parametrize("clip", [None, 0.03, 1.0, 1e6])
def test_scaling_inside_the_kernel_is_what_clipping_beforehand_gives(config, tmp_path, clip):
    config, ends = dataclasses.replace(config, clip=clip, precision="fp32", steps=8), []
    for where in ("kernel", "before"):
        trainer = make_trainer(tmp_path / where, config)
        assert trainer.stepper._scales_in_kernel
        trainer.stepper._scales_in_kernel = where == "kernel"
        trainer.fit()
        ends.append((state_of(trainer), [row["grad_norm"] for row in rows_of(tmp_path / where)]))
    (tensors, norms), (expected, expected_norms) = ends
    assert norms == pytest.approx(expected_norms, rel=1e-4)
    assert clip != 1.0 or min(norms) < clip < max(norms)
    for tensor, other in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-3, atol=1e-4)  # a step moves by 1e-2


def test_a_kernel_is_only_told_what_it_listens_to():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    adamw, other = torch.optim.AdamW(parameters, fused=True), torch.optim.SGD(parameters)
    assert kernel_heeds(adamw, "cpu", "none")
    assert kernel_heeds(adamw, "cuda", "ddp")
    assert not kernel_heeds(adamw, "cuda", "fsdp")
    assert not kernel_heeds(adamw, "mps", "none")  # if it did not listen, a bad gradient would be taken
    assert not kernel_heeds(other, "cuda", "none")


def test_it_gives_up_after_so_many_in_a_row_and_the_last_good_checkpoint_stays(config, tmp_path, capsys):
    config = dataclasses.replace(config, skip_bad=3)
    trainer = make_trainer(tmp_path, config)
    Poison(trainer, {(step, 1): math.nan for step in (6, 7, 10, 11, 12, 13)})  # two in a row are not enough
    with pytest.raises(Error, match="step 13") as e:
        trainer.fit()
    assert e.value.code == 5
    assert "3 steps in a row" in str(e.value)
    assert "that of step 12" in str(e.value)
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert checkpoint.saved_steps(tmp_path)[-1] == 12
    assert capsys.readouterr().err.count("the step was skipped") == 5


def test_a_resumed_run_remembers_how_many_were_bad(config, tmp_path):
    """Killed between two bad steps, it gives up at the same one as if it had gone on."""
    config = dataclasses.replace(config, skip_bad=4, save_every=1)
    bad = {(step, 0): math.nan for step in (10, 11, 12, 13)}
    first = make_trainer(tmp_path, config)
    Poison(first, bad)
    first.task = dataclasses.replace(first.task, batches=lambda step: stop_at(first, step, 12))
    first.fit()
    assert checkpoint.read_state(checkpoint.newest_valid(tmp_path)[0]).skipped == 3
    again = make_trainer(tmp_path, config)
    Poison(again, bad)
    with pytest.raises(Error, match="step 14"):
        again.fit()


def test_a_trainer_that_goes_on_counts_the_bad_ones_once(config, tmp_path):
    config = dataclasses.replace(config, skip_bad=4, save_every=1)
    trainer = make_trainer(tmp_path, config)
    Poison(trainer, {(step, 0): math.nan for step in (10, 11, 12)})
    trainer.task = dataclasses.replace(trainer.task, batches=lambda step: stop_at(trainer, step, 11))
    assert trainer.fit().step == 12
    trainer.task = dataclasses.replace(trainer.task, batches=lambda step: stop_at(trainer, step, 99))
    assert trainer.fit().step == config.steps


def stop_at(trainer, step, last):
    """The batch of a step; asks the loop to end behind step `last`."""
    from classiclm.data.batches import Windows

    if not hasattr(trainer, "_windows"):
        from classiclm.data.splits import prepare_text

        data = prepare_text(trainer.config.data, trainer.config.tokenizer)
        trainer._windows = Windows(data.train, trainer.config.model.n_ctx, trainer.config, trainer.config.seed)
    if step == last:
        trainer._stop.number = 15
    return trainer._windows(step)


def test_spikes_are_skipped_only_where_that_was_asked_for(config, tmp_path):
    plain = make_trainer(tmp_path / "plain", dataclasses.replace(config, steps=40))
    Poison(plain, {(38, 0): 1e4})
    plain.fit()
    assert not [row for row in rows_of(tmp_path / "plain") if row.get("skipped")]
    careful = make_trainer(tmp_path / "careful", dataclasses.replace(config, steps=40, skip_spikes=6.0))
    Poison(careful, {(38, 0): 1e4})
    careful.fit()
    assert [row["step"] for row in rows_of(tmp_path / "careful") if row.get("skipped")] == [39]
    assert len(checkpoint.read_state(checkpoint.newest_valid(tmp_path / "careful")[0]).window) == 39


def test_the_window_of_norms_is_part_of_a_resumed_run(config, tmp_path):
    config = dataclasses.replace(config, steps=60, skip_spikes=1.0, save_every=40, skip_bad=20)
    make_trainer(tmp_path / "whole", config).fit()
    stopped = make_trainer(tmp_path / "stopped", config)
    stopped.task = dataclasses.replace(stopped.task, batches=lambda step: stop_at(stopped, step, 39))
    stopped.fit()
    make_trainer(tmp_path / "stopped", config).fit()
    whole, resumed = (checkpoint.newest_valid(tmp_path / name)[0] for name in ("whole", "stopped"))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        assert sha256_of_file(whole / name) == sha256_of_file(resumed / name)
    assert any(row.get("skipped") for row in rows_of(tmp_path / "whole"))


def test_a_spike_is_judged_by_mean_and_deviation():
    calm = [1.0, 2.0] * 20  # mean 1.5, deviation 0.5
    assert is_spike(4.6, calm, 6.0)
    assert not is_spike(4.4, calm, 6.0)
    assert not is_spike(1e9, calm[:20], 6.0)  # too few to judge by
    assert not is_spike(1e9, calm, None)


def test_too_little_memory_is_answered_with_what_would_fit(config, tmp_path, monkeypatch):
    error = out_of_memory(Plan("cpu", "fp32", 8, False, ()))
    assert error.code == 4
    assert "--micro_batch 4" in str(error)
    assert "--recompute" in str(error)
    trainer = make_trainer(tmp_path, config)

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer.stepper, "objective", type("Full", (), {"counts": lambda *_: {}, "__call__": full})())
    with pytest.raises(Error, match="micro-batches of 2"):
        trainer.fit()


def test_recomputing_blocks_changes_no_byte(config, tmp_path):
    for name, recompute in (("plain", False), ("recomputed", True)):
        make_trainer(tmp_path / name, dataclasses.replace(config, recompute=recompute, precision="fp32")).fit()
    plain, recomputed = (checkpoint.newest_valid(tmp_path / name)[0] for name in ("plain", "recomputed"))
    assert sha256_of_file(plain / "model.safetensors") == sha256_of_file(recomputed / "model.safetensors")
