"""Exact resume: from every step, for every kind of run; and of each thing that a run is, that forgetting it shows.

The oracle for a resumed run is the run that was never stopped. That one saves at every step; a run stopped behind step
k is a copy of its folder without the later checkpoints, and a trainer made anew goes on with it.
"""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from classiclm.cli import main
from classiclm.commands import runs
from classiclm.data.batches import Windows
from classiclm.files import sha256_of_file
from classiclm.train import checkpoint, step
from classiclm.train.run import Metrics
from classiclm.train.settings import TrainConfig
from classiclm.train.trainer import Trainer
from test_bad_gradients import Poison
from test_trainer import fit_and_die_after, rows_of

# The kinds of runs

TINY = "--model.n_layers 1 --model.d_model 16 --model.n_heads 2 --model.dropout 0.1 --device cpu --precision fp32"
OFTEN = "--log_every 1 --eval_every 3 --eval_windows 5"
SAVE_EVERY = 7  # steps; of a resumed run, that validations and saves come in all orders
CAUSAL = f"gpt2-shakespeare-cpu {TINY} {OFTEN} --model.n_ctx 8 --batch 6 --micro_batch 2 --lr 0.03 --warmup 5"
MASKED = f"bert-shakespeare {TINY} {OFTEN} --model.n_ctx 24 --tokenizer wordpiece-200 --batch 12 --micro_batch 6"
PAIRS = f"transformer2017-multi30k {TINY} {OFTEN} --model.n_ctx 24 --tokenizer bpe-280 --batch 120 --micro_batch 60"
TOKENS = f"gpt3-tiny {TINY} {OFTEN} --model.n_ctx 8 --tokenizer char --batch 6 --micro_batch 2 --model.band 4 --lr 0.01"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of run: its flags, its data, and what is done to each of its trainers before it starts."""

    flags: str
    steps: int = 30
    data: str = "letters"
    counted: float = 1.0  # tokens that an epoch counts for each token of the data, at most
    dressed: Callable[[Trainer], object] = lambda trainer: None
    so: Callable[[Trainer], bool] = lambda trainer: True  # whether at the end it was as it is called


def n_updates(trainer: Trainer) -> int:
    return int(next(iter(trainer.optimizer.state.values()))["step"])


def with_worse_to_come(trainer: Trainer) -> None:
    """From step 13 on it climbs its loss, so that the best validation is neither the first nor the last."""
    Poison(trainer, dict.fromkeys(itertools.product(range(12, 30), range(3)), -1.0))


def with_a_spike(trainer: Trainer) -> None:
    Poison(trainer, {(39, 0): 1e4})


def with_bad_gradients(trainer: Trainer) -> None:
    """Not finite in two steps amid the run, and in the last two."""
    Poison(trainer, {(bad, 1): math.nan for bad in (10, 11, 28, 29)})


def with_scaler(trainer: Trainer) -> None:
    """What fp16 has on a GPU. The loss is so large that the first scales overflow, and so do some that it grows to."""
    Poison(trainer, dict.fromkeys(itertools.product(range(30), range(3)), 1e3))
    trainer.stepper.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**127, growth_interval=3)


MATRIX = {
    f"{precision}, {parts} micro-batches": Kind(f"{CAUSAL} --precision {precision} --micro_batch {6 // parts}")
    for precision, parts in itertools.product(("fp32", "bf16"), (1, 3))
}
KINDS = MATRIX | {
    "masked in two sets": Kind(f"{MASKED} --masking static --n_sets 2", 20, "sentences", counted=3.0),
    "masked anew in two phases": Kind(f"{MASKED} --masking dynamic --first_ctx 16", 20, "sentences", counted=3.0),
    "pairs": Kind(PAIRS, 20, "pairs"),
    "rate and batch by tokens": Kind(
        f"{TOKENS} --warmup_tokens 200 --decay_tokens 1200 --ramp_tokens 600 --ramp_from 2"
    ),
    "packed mixture": Kind(f"{CAUSAL} --model.n_ctx 16 --batch 12", 20, "mixture"),
    "muon": Kind(f"{CAUSAL} --optimizer muon"),
    "corrected adam": Kind(f"{CAUSAL} --optimizer adam-gpt1"),
    "worse to come": Kind(CAUSAL, dressed=with_worse_to_come, so=lambda trainer: 3 < trainer.state.best["step"] < 18),
    "spike": Kind(f"{CAUSAL} --skip_spikes 9", 44, dressed=with_a_spike, so=lambda trainer: n_updates(trainer) == 43),
    "bad gradients": Kind(CAUSAL, dressed=with_bad_gradients, so=lambda trainer: trainer.state.skipped == 2),
    "scaled loss": Kind(CAUSAL, dressed=with_scaler, so=lambda trainer: 9 < n_updates(trainer) < 26),
    "saved in a thread": Kind(f"{CAUSAL} --async_save"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Name -> the flags for it: a text of some hundred letters, sentences, pairs of sentences, a prepared mixture."""
    root, draw = tmp_path_factory.mktemp("data"), random.Random(0)
    words = ["der", "hund", "läuft", "im", "schnee", "ein", "mann", "sieht", "die", "frau", "und", "das", "kind"]

    def sentences(n):
        return [" ".join(draw.choices(words, k=draw.randint(3, 7))) for _ in range(n)]

    for name, n_documents in (("letters", 8), ("sentences", 20), ("more", 20)):
        (root / f"{name}.txt").write_text("\n\n".join("\n".join(sentences(4)) for _ in range(n_documents)))
    (root / "pairs").mkdir()
    for split, n in (("train", 40), ("val", 8), ("test_small", 4)):
        lines = "\n".join(sentences(n)) + "\n"
        with gzip.open(root / "pairs" / f"{split}.de.gz", "wt", encoding="utf-8") as file:
            file.write(lines)
        (root / "pairs" / f"{split}.en").write_text(lines.upper())
    sources = [f"{root / name}.txt" for name in ("sentences", "more")]
    settings = "--documents block --tokenizer bpe-280 --val_share 0.2 --weights 1 3 --workers 1"
    assert main(["prepare", *sources, *settings.split(), "--out", str(root / "mixture")]) == 0
    flags = {name: ["--data", str(root / f"{name}.txt")] for name in ("letters", "sentences")}
    flags["pairs"] = ["--data", str(root / "pairs"), "--data.source", "de", "--data.target", "en"]
    return {**flags, "mixture": ["--data", str(root / "mixture"), "--data.documents", "packed"]}


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that was never stopped, with a checkpoint of every step."""

    kind: Kind
    config: Any
    corpus: Any
    run: Path

    def trainer(self, run, **changed):
        """A fresh one in a folder."""
        trainer = runs.make_trainer(run, dataclasses.replace(self.config, **changed), data=self.corpus)
        self.kind.dressed(trainer)
        return trainer

    def stopped_behind(self, k, run):
        """A copy without the checkpoints behind step k; its metrics go on to the end, as those of a killed run may."""
        shutil.copytree(self.run, run, ignore=shutil.ignore_patterns("checkpoints", ".*"))
        for saved in range(1, k + 1):
            here, there = (checkpoint.folder_of(folder, saved) for folder in (self.run, run))
            shutil.copytree(here, there, copy_function=os.link)
        return run

    def resumed_behind(self, k, run):
        """The same, trained to the end by a fresh trainer, in a process whose random numbers may be anywhere."""
        trainer = self.trainer(self.stopped_behind(k, run), save_every=SAVE_EVERY, keep=2)
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(k)
        assert trainer.fit().step == self.kind.steps
        return run


@pytest.fixture(scope="module")
def whole_of(data, tmp_path_factory):
    """Name of a kind -> its whole run, trained once."""
    return functools.cache(lambda name: train(KINDS[name], data, tmp_path_factory.mktemp("whole") / "run"))


def train(kind, data, run):
    """The whole run, which is as it is called; and an epoch ends amid it."""
    argv = [*kind.flags.split(), "--steps", str(kind.steps), *data[kind.data]]
    config = dataclasses.replace(runs.resolve(TrainConfig, argv, "train")[0], save_every=1, keep=kind.steps)
    whole = Whole(kind, config, runs.prepare(config), run)
    trainer = whole.trainer(run)
    trainer.fit()
    split = whole.corpus.train
    epoch = kind.counted * len(split.target if kind.data == "pairs" else split.tokens)
    assert checkpoint.read_state(checkpoint.folder_of(run, 2)).tokens < epoch < trainer.state.tokens
    assert kind.so(trainer)
    return whole


# Every step


def compared(run):
    """What has to be the same at the end of a resumed run: name -> sum, or rows without times."""
    last = checkpoint.newest_valid(run)[0]
    best = checkpoint.require(run, "best")
    sums = {name: sha256_of_file(last / name) for name in ("model.safetensors", "optimizer.safetensors", "state.json")}
    return {**sums, "best": sha256_of_file(best / "model.safetensors"), "metrics.jsonl": rows_of(run)}


def resume_behind_each(whole, steps, tmp_path, capsys):
    """How many were resumed. Raises AssertionError unless all end as the whole run and none did again what was done."""
    for k in steps:
        run = tmp_path / f"stopped-{k}"
        capsys.readouterr()
        whole.resumed_behind(k, run)
        assert compared(run) == compared(whole.run), k
        said = capsys.readouterr().err
        assert f"continuing {run} from step {k}\n" in said if k else "continuing" not in said
        shutil.rmtree(run)
    return len(steps)


@pytest.mark.parametrize("name", MATRIX)
def test_the_runs_of_the_matrix_cross_the_border_of_an_epoch_inside_a_batch(name, whole_of):
    """So that there are checkpoints before it, the batch of two epochs, and checkpoints behind it."""
    whole = whole_of(name)
    batches = whole.trainer(whole.run.parent / "unused").task.batches
    border = batches.n_windows / whole.config.batch  # in steps
    assert batches.n_windows <= len(whole.corpus.train.tokens) // whole.config.model.n_ctx
    assert 2 < border < whole.config.steps - 2
    assert border % 1


@pytest.mark.parametrize("name", KINDS)
def test_a_run_stopped_half_way_ends_as_if_it_never_was(name, whole_of, tmp_path, capsys):
    whole = whole_of(name)
    assert resume_behind_each(whole, [whole.kind.steps // 2], tmp_path, capsys) == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", KINDS)
def test_a_run_stopped_behind_any_step_ends_as_if_it_never_was(name, whole_of, tmp_path, capsys):
    whole, began = whole_of(name), time.monotonic()
    assert resume_behind_each(whole, range(whole.kind.steps), tmp_path, capsys) == whole.kind.steps
    with capsys.disabled():
        print(f"\n{name}: resumed behind each of {whole.kind.steps} steps, {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("name", ["fp32, 3 micro-batches", "bf16, 3 micro-batches"])
def test_a_run_killed_again_and_again_is_still_exact(name, whole_of, tmp_path):
    """Twice between the same two saves, and behind saves that follow each other, too."""
    whole = whole_of(name)
    for killed in (1, 2, 4, 7, 8, 9, 10, 14, 15, 16, 22, 28, 29):
        fit_and_die_after(whole.trainer(tmp_path, save_every=SAVE_EVERY, keep=2), killed)
    whole.trainer(tmp_path, save_every=SAVE_EVERY, keep=2).fit()
    assert compared(tmp_path) == compared(whole.run)


# Negative controls


def forgetting(where, name, make):
    """monkeypatch, k -> None: puts make(real, k) in the place of a function, k being the step to go on from."""
    return lambda monkeypatch, k: monkeypatch.setattr(where, name, make(getattr(where, name), k))


def forgetting_state(name):
    """The field of state.json as it is in a new run."""

    def read(real, folder):
        return dataclasses.replace(real(folder), **{name: getattr(checkpoint.State(), name)})

    return forgetting(checkpoint, "read_state", lambda real, k: functools.partial(read, real))


def forgetting_moment(name):
    """One of the optimizer's tensors for each parameter, as it is in a new run."""

    def load(real, folder, model, optimizer):
        real(folder, model, optimizer)
        for state in optimizer.state.values():
            if name in state:
                state[name].zero_()

    return forgetting(checkpoint, "load_moments", lambda real, k: functools.partial(load, real))


forget_weights = forgetting(checkpoint, "load_weights", lambda real, k: lambda folder, model: None)
forget_dropout = forgetting(step, "derive", lambda real, k: lambda name, seed, done: real(name, seed, done - k))
forget_position = forgetting(Windows, "__call__", lambda real, k: lambda self, done: real(self, done - k))
forget_to_cut_rows = forgetting(Metrics, "cut_behind", lambda real, k: lambda self, done: self.rows())
forget_earlier_rows = forgetting(Metrics, "cut_behind", lambda real, k: lambda self, done: real(self, 0))


@dataclasses.dataclass(frozen=True)
class Control:
    """A resume that forgets one thing, what must then be another at the end, and by which row it is seen first."""

    forget: Callable[[pytest.MonkeyPatch, int], None]
    differs: set[str]
    first: tuple[int | None, set[str]] | None  # step, or None for any, and columns; None: no row differs
    kind: str = "fp32, 3 micro-batches"
    k: int | None = 12  # behind which it goes on, a validation as 13 and 14 are not; None: behind the best
    may_differ: frozenset[str] = frozenset({"best", "state/best"})  # as the loss of later validations does


ALL = {"weights", "exp_avg", "exp_avg_sq", "rows"}  # of a run that has gone another way
GRADIENT = {"loss", "grad_norm"}
NOTHING: frozenset[str] = frozenset()
CONTROLS = {
    "weights": Control(forget_weights, ALL, (13, GRADIENT)),
    "first moments": Control(forgetting_moment("exp_avg"), ALL, (14, GRADIENT)),
    "second moments": Control(forgetting_moment("exp_avg_sq"), ALL, (14, GRADIENT)),
    "count of updates": Control(forgetting_moment("step"), ALL | {"step"}, (14, GRADIENT)),
    "muon's momentum": Control(
        forgetting_moment("momentum_buffer"), ALL | {"momentum_buffer"}, (14, GRADIENT), kind="muon"
    ),
    "step": Control(forgetting_state("step"), ALL | {"step", "state/tokens"}, (1, GRADIENT | {"tokens"})),
    "tokens": Control(
        forgetting_state("tokens"), ALL | {"state/tokens"}, (13, {"tokens", "lr"}), "rate and batch by tokens"
    ),
    "best validation": Control(forgetting_state("best"), {"best", "state/best"}, None, "worse to come", k=None),
    "window of norms": Control(
        forgetting_state("window"),
        ALL | {"state/window"},
        (40, {"skipped"}),
        "spike",
        36,
        frozenset({"best", "state/best", "step"}),
    ),
    "count of skipped steps": Control(
        forgetting_state("skipped"), {"state/skipped"}, None, "bad gradients", 29, may_differ=NOTHING
    ),
    "scale of the loss": Control(
        forgetting_state("scaler"), ALL | {"step", "state/scaler"}, (None, {"grad_norm"}), "scaled loss"
    ),
    "seed of dropout": Control(forget_dropout, ALL, (13, GRADIENT)),
    "place in the data": Control(forget_position, ALL, (13, GRADIENT)),
    "rows to be cut": Control(forget_to_cut_rows, {"rows"}, (13, {"rows"}), may_differ=NOTHING),
    "rows to be kept": Control(forget_earlier_rows, {"rows"}, (1, {"rows"}), may_differ=NOTHING),
}


def parts_of(run):
    """All that a run is, each thing by itself: its sum or value."""
    last = checkpoint.newest_valid(run)[0]
    sums = defaultdict(hashlib.sha256)
    with safe_open(last / "optimizer.safetensors", "np") as file:
        for key in sorted(file.keys()):
            sums[key.partition("/")[0]].update(file.get_tensor(key).tobytes())
    state = json.loads((last / "state.json").read_text())
    whole = compared(run)
    parts = {"weights": whole["model.safetensors"], "best": whole["best"], "rows": whole["metrics.jsonl"]}
    parts |= {name: total.hexdigest() for name, total in sums.items()}
    return parts | {f"state/{name}": value for name, value in state.items()}


def different(one, two):
    """The keys by which two dictionaries differ."""
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}


def first_difference(one, two):
    """The first step that has other rows, and the columns by which; "rows" if it has more or fewer."""
    for done in sorted({row["step"] for row in [*one, *two]}):
        a, b = ([row for row in rows if row["step"] == done] for rows in (one, two))
        if len(a) != len(b):
            return done, {"rows"}
        if a != b:
            return done, set().union(*map(different, a, b))
    return None


@pytest.fixture(scope="module")
def honest_of(whole_of, tmp_path_factory):
    """Kind, k -> the parts of its resumed run, which are the whole run's; made once."""

    @functools.cache
    def honest(kind, k):
        parts = parts_of(whole_of(kind).resumed_behind(k, tmp_path_factory.mktemp("honest") / "run"))
        assert different(parts, parts_of(whole_of(kind).run)) == set()
        return parts

    return honest


@pytest.mark.parametrize("forgotten", CONTROLS)
def test_a_resume_that_forgets_one_thing_is_seen_to_differ_by_it(forgotten, whole_of, honest_of, tmp_path, monkeypatch):
    control = CONTROLS[forgotten]
    whole = whole_of(control.kind)
    k = control.k or checkpoint.step_of(checkpoint.require(whole.run, "best"))
    honest = honest_of(control.kind, k)
    with monkeypatch.context() as patch:  # what compares must not be what forgets
        control.forget(patch, k)
        whole.resumed_behind(k, tmp_path / "forgetful")
    assert compared(tmp_path / "forgetful") != compared(whole.run)
    forgetful = parts_of(tmp_path / "forgetful")
    assert control.differs <= different(forgetful, honest) <= control.differs | control.may_differ
    first = first_difference(forgetful["rows"], honest["rows"])
    if control.first is None:
        assert first is None
    else:
        done, columns = control.first
        assert first == (done or first[0], columns)
