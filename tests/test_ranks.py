"""Two ranks under faults: a bad gradient on one is skipped by both, and each window is trained on by one of them.

The processes are real ones, on the CPU (tests/trainer_run.py); what they share is compared byte for byte.
"""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from classiclm.train import checkpoint
from classiclm.train.distributed import World
from trainer_run import run

SCRIPT = Path(__file__).parent / "trainer_run.py"
STRATEGIES = ("ddp", "fsdp")
RANKS, PARTS = range(2), range(3)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def two_ranks(tmp_path, cases):
    """For each case, the answers of both ranks."""
    out = tmp_path / "answers.json"
    names = {"cases": cases, "out": str(out)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, SCRIPT, json.dumps(names)], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def skipped_steps(notes):
    """Those after which weights and moments are the same bytes as before."""
    return [note["step"] for note in notes if note["before"] == note["after"]]


def is_finite(folder):
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert files
    return all(tensor.isfinite().all() for path in files for tensor in load_file(path).values())


# NaN and both infinities at every (micro-batch, rank), each in a step of its own; good steps lie between.
GRID = [(rank, part, bad) for bad in ("nan", "inf", "-inf") for rank in RANKS for part in PARTS]
BAD_STEPS = [2 + 2 * i for i in range(len(GRID))]
FAULTS = {
    "grid": {"factors": [(step, *cell) for step, cell in zip(BAD_STEPS, GRID, strict=True)], "steps": 40},
    # On one rank or the other in turn; two in a row are not enough.
    "giving up": {
        "factors": [(step, step % 2, step % 3, "nan") for step in (6, 7, 10, 11, 12, 13)],
        "skip_bad": 3,
        "save_every": 1,
    },
    # skip_bad is more than the steps, for with such a weight every gradient is bad.
    "weight on 0": {"ruin": 0, "skip_bad": 99},
    "weight on 1": {"ruin": 1, "skip_bad": 99},
    "spikes": {"factors": [(36, 0, 2, "1e4"), (38, 1, 0, "1e4")], "steps": 40, "skip_spikes": 20.0},
    "scaler": {"fp16": True, "factors": [(3, 0, 1, "inf"), (5, 1, 2, "nan")], "steps": 12},
}
# Infinity in one rank's share of the gradient only, as with fsdp it may lie; with ddp all have the same gradient.
SPOILED = {"ddp": [(7, 0), (7, 1), (9, 0), (9, 1)], "fsdp": [(7, 0), (9, 1)]}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """(fault, strategy) -> the run's folder and both ranks' answers; all from one start of two processes."""
    tmp_path = tmp_path_factory.mktemp("faulty")
    text = tmp_path / "small.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log.\n" * 80)
    cases = {}
    for fault, strategy in itertools.product(FAULTS, STRATEGIES):
        folder = tmp_path / fault / strategy
        cases[fault, strategy] = {"text": str(text), "folder": str(folder), "strategy": strategy, **FAULTS[fault]}
    for strategy in STRATEGIES:
        cases["scaler", strategy]["spoiled"] = SPOILED[strategy]
    answers = two_ranks(tmp_path, list(cases.values()))
    return {key: (Path(case["folder"]), ranks) for (key, case), ranks in zip(cases.items(), answers, strict=True)}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_micro_batch_of_one_rank_changes_nothing_on_both(faulty, strategy):
    folder, ranks = faulty["grid", strategy]
    assert len(BAD_STEPS) == 2 * 3 * 3
    for answer in ranks:
        assert answer["error"] is None
        assert skipped_steps(answer["notes"]) == BAD_STEPS
        assert [note["step"] for note in answer["notes"] if note["skipped"]] == BAD_STEPS
        assert len(answer["notes"]) == 40
    assert [row["step"] - 1 for row in rows_of(folder) if row.get("skipped")] == BAD_STEPS
    assert all(is_finite(checkpoint.folder_of(folder, step)) for step in ranks[0]["saved"])
    shards = {answer["notes"][-1]["after"] for answer in ranks}
    assert len(shards) == (1 if strategy == "ddp" else 2)  # else it would not be shares that were looked at


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_both_ranks_give_up_at_the_same_step_and_the_last_good_checkpoint_stays(faulty, strategy):
    folder, ranks = faulty["giving up", strategy]
    for answer in ranks:
        code, said = answer["error"]
        assert code == 5
        assert "step 13" in said
        assert "that of step 12" in said
        assert [note["step"] for note in answer["notes"]] == list(range(13))
    saved = checkpoint.saved_steps(folder)
    assert saved[-1] == 12
    assert checkpoint.newest_valid(folder) == (checkpoint.folder_of(folder, 12), [])
    assert all(is_finite(checkpoint.folder_of(folder, step)) for step in saved)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rank", RANKS)
def test_a_weight_that_is_not_finite_on_one_rank_is_saved_by_none(faulty, strategy, rank):
    for answer in faulty[f"weight on {rank}", strategy][1]:
        assert answer["error"][0] == 5
        assert "not finite; nothing was saved" in answer["error"][1]
        assert answer["saved"] == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_spike_on_one_rank_is_skipped_by_both(faulty, strategy):
    for answer in faulty["spikes", strategy][1]:
        assert skipped_steps(answer["notes"]) == [36, 38]
        assert [note["step"] for note in answer["notes"] if note["skipped"]] == [36, 38]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_loss_scaler_of_fp16_decides_alike_on_both_ranks(faulty, strategy):
    for answer in faulty["scaler", strategy][1]:
        assert skipped_steps(answer["notes"]) == [3, 5, 7, 9]
        scales = [1024.0 / 2 ** sum(bad <= step for bad in (3, 5, 7, 9)) for step in range(12)]
        assert [note["scale"] for note in answer["notes"]] == scales


@pytest.fixture
def unique_text(tmp_path):
    """Letters in such an order that no window comes twice, some far more often than others."""
    path = tmp_path / "unique.txt"
    letters = random.Random(0).choices("etaoinshrdlu", weights=[1 / n for n in range(1, 13)], k=3300)
    path.write_text("\n".join("".join(letters[i : i + 60]) for i in range(0, len(letters), 60)))
    return str(path)


def ids_by_step(parts_of_a_run):
    """Step -> its rows over all ranks, sorted, of the answers of a run's successive starts."""
    steps = {}
    for ranks in parts_of_a_run:
        for answer in ranks:
            for note in answer["notes"]:
                steps.setdefault(note["step"], []).extend(map(tuple, note["rows"]))
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def test_each_window_is_trained_on_once_whatever_the_number_of_processes(unique_text, tmp_path):
    """1 -> 2 -> 1 and 2 -> 1 -> 2 processes, of ddp and fsdp, against one process that is never stopped."""
    # Without dropout, whose masks follow from the rank; with a batch that 2 processes cannot share out evenly.
    common = {"text": unique_text, "dropout": 0.0, "steps": 30, "batch": 11}
    ends = (9, 19, None)

    def segment(name, strategy, part):
        return {**common, "folder": str(tmp_path / name / strategy), "strategy": strategy, "stop": ends[part]}

    def alone(name, strategy, part):
        return [run(World(), **segment(name, strategy, part))]

    whole = [[run(World(), **{**common, "folder": str(tmp_path / "whole")})]]
    odd = {s: [alone("121", s, 0)] for s in STRATEGIES}
    first = two_ranks(tmp_path, [segment(*case) for s in STRATEGIES for case in (("121", s, 1), ("212", s, 0))])
    even = {}
    for i, s in enumerate(STRATEGIES):
        odd[s] += [first[2 * i], alone("121", s, 2)]
        even[s] = [first[2 * i + 1], alone("212", s, 1)]
    for s, last in zip(STRATEGIES, two_ranks(tmp_path, [segment("212", s, 2) for s in STRATEGIES]), strict=True):
        even[s].append(last)

    ids, losses = ids_by_step(whole), [row["loss"] for row in rows_of(tmp_path / "whole")]
    check_oracle(ids, unique_text)
    for name, runs in (("121", odd), ("212", even)):
        for s in STRATEGIES:
            assert [len(ranks[0]["notes"]) for ranks in runs[s]] == [10, 10, 10]
            assert ids_by_step(runs[s]) == ids
            assert [row["loss"] for row in rows_of(tmp_path / name / s)] == pytest.approx(losses, rel=1e-5)
            assert math.fsum(losses[-3:]) < math.fsum(losses[:3]) - 0.1  # something was learnt


def check_oracle(ids, text):
    """Steps are full, no window comes twice (the next epoch's begin elsewhere), and an epoch's end is crossed."""
    rows = [row for step in sorted(ids) for row in ids[step]]
    assert len(set(rows)) == len(rows) == 30 * 11
    assert 12 * len(rows) > len(Path(text).read_text())
