"""Many processes compute what one does, share what they hold, and none outlives another.

The oracle is the same training in one process; the processes are real ones, on the CPU (tests/distributed_run.py).
"""

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from classiclm.data.batches import rows_of
from classiclm.data.pairs import micro_batches
from classiclm.errors import Error
from classiclm.nn.mask import IGNORE
from classiclm.objectives import measure
from classiclm.train import distributed
from classiclm.train.compiling import Compiled
from classiclm.train.distributed import (
    World,
    add_up,
    clip_norm,
    distribute,
    joined,
    measure_share,
    share,
    world_from_env,
)
from classiclm.train.machine import Machine
from distributed_run import FAMILIES, batch_of, build, parts_of, train

SCRIPT = Path(__file__).parent / "distributed_run.py"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
STRATEGIES = {"ddp": 1e-5, "fsdp": 1e-4}  # how far their losses may be from one process's


def torchrun(tmp_path, settings, n=2):
    """The answers of n processes, by rank."""
    settings |= {"out": str(tmp_path / "answer.json")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n)]
    done = subprocess.run([*command, SCRIPT, json.dumps(settings)], env=ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(settings["out"]).read_text())


def largest_difference(a, b, column=0, steps=None):
    """Of losses (column 0) or gradient norms (1), over the first steps or all."""
    pairs = list(zip(a["rows"], b["rows"], strict=True))[:steps]
    return max(abs(x[column] - y[column]) for x, y in pairs)


def check_equal(one, many, tolerance):
    assert largest_difference(one, many) <= tolerance
    assert largest_difference(one, many, column=1, steps=3) <= 10 * tolerance  # norms: later rounding has grown
    assert many["measured"][0] == pytest.approx(one["measured"][0], abs=tolerance)
    assert many["measured"][1] == pytest.approx(one["measured"][1], abs=tolerance)
    first, last = one["rows"][0][0], one["rows"][-1][0]
    assert last < first - 50 * tolerance  # else nothing was learnt, and equality means little


def test_two_processes_of_ddp_and_fsdp_learn_what_one_does_and_answer_questions(tmp_path):
    case = {"family": "gpt2", "steps": 5, "batch": 7, "micro_batch": 2}
    cases = [{**case, "strategy": strategy} for strategy in STRATEGIES]
    one = train(World(), **case, strategy="none")
    answers = torchrun(tmp_path, {"cases": cases, "ask": True})
    for answer in answers:
        for many, tolerance in zip(answer, STRATEGIES.values(), strict=False):
            check_equal(one, many, tolerance)
    ddp, fsdp = answers[0][:2]
    assert fsdp["bytes"] <= 0.6 * ddp["bytes"]
    assert ddp["bytes"] == one["bytes"]
    assert fsdp["sharded"]
    assert not ddp["sharded"]
    for answer in answers:
        check_questions(answer[2])


def check_questions(asked):
    """What `ask` has answered in one of two processes."""
    assert asked["gathered"] == [{"rank": 0, "text": "é"}, {"rank": 1, "text": "é" * 6}]
    assert asked["sum"] == [3.0, 2e-17]
    assert asked["any"] == [True, False]
    assert asked["largest"] == 7


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("batch", "micro_batch"), [(8, 4), (9, 2)], ids=["one micro-batch", "three, and uneven rows"])
def test_every_family_learns_the_same_in_two_processes(tmp_path, batch, micro_batch):
    case = {"steps": 20, "batch": batch, "micro_batch": micro_batch}
    cases = [{**case, "family": family, "strategy": strategy} for family in FAMILIES for strategy in STRATEGIES]
    for_each = iter(zip(*torchrun(tmp_path, {"cases": cases}), strict=True))
    for family in FAMILIES:
        one = train(World(), family, "none", **case)
        results = {strategy: next(for_each) for strategy in STRATEGIES}
        for strategy, ranks in results.items():
            for many in ranks:
                check_equal(one, many, STRATEGIES[strategy])
        for ddp, fsdp in zip(results["ddp"], results["fsdp"], strict=True):
            assert fsdp["bytes"] <= 0.6 * ddp["bytes"], family


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bf16_under_fsdp_is_autocast_and_copies_of_shards_agree(tmp_path):
    case = {"family": "gpt2", "steps": 8, "batch": 8, "micro_batch": 1}
    kinds = [
        {"strategy": "ddp", "precision": "bf16"},
        {"strategy": "fsdp", "precision": "bf16"},
        {"strategy": "fsdp"},
        {"strategy": "fsdp", "copies": 2},
    ]
    ddp, fsdp, shards, copies = torchrun(tmp_path, {"cases": [{**case, **kind} for kind in kinds]}, 4)[3]
    assert largest_difference(ddp, fsdp, steps=3) <= 1e-5
    assert largest_difference(ddp, fsdp) <= 1e-3
    assert fsdp["sharded"]  # after a validation, too: the optimizer's state hangs on these parameters
    assert largest_difference(shards, copies) <= 1e-4
    assert largest_difference(ddp, shards, steps=1) > 1e-5  # another precision is seen
    assert copies["bytes"] == pytest.approx(2 * shards["bytes"], rel=0.1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_drop_different_activations_and_begin_with_rank_0s_weights(tmp_path):
    case = {"family": "gpt2", "strategy": "ddp", "steps": 2, "batch": 4, "micro_batch": 2}
    cases = [case, {**case, "other_seed_on": {"1": 99}}, {**case, "dropout": 0.5}]
    plain, reseeded, dropped = torchrun(tmp_path, {"cases": cases})[0]
    assert reseeded["rows"] == plain["rows"]
    assert reseeded["weights"] == plain["weights"]
    assert dropped["rows"] != plain["rows"]


def start_processes(settings, port):
    """Two processes without torchrun, which would end the survivor itself."""
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = ONE_THREAD | {name: str(value) for name, value in names.items()}
        yield subprocess.Popen([sys.executable, SCRIPT, json.dumps(settings)], env=env, stderr=subprocess.PIPE)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def is_down(process):
    """Dead or stopped."""
    return process.poll() is not None or Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1][0] in "TZ"


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="asks /proc whether a process is stopped")
@pytest.mark.parametrize(("kind", "victim", "strategy"), [
    ("SIGKILL", 1, "ddp"), ("SIGKILL", 1, "fsdp"), ("SIGKILL", 0, "ddp"), ("SIGSTOP", 1, "ddp"), ("SIGSTOP", 0, "fsdp"),
    ("raise", 1, "fsdp"),
])  # fmt: skip
def test_the_survivor_of_a_dead_or_stopped_rank_leaves_in_time_and_names_it(tmp_path, kind, victim, strategy):
    timeout, step = 6, 5
    case = {"family": "gpt2", "strategy": strategy, "steps": 10**6, "batch": 2, "micro_batch": 1}
    case["fault"] = {"kind": kind, "at": [victim, step]}
    settings = {"cases": [case], "timeout": timeout, "out": str(tmp_path / "none")}
    processes = list(start_processes(settings, free_port()))
    try:
        while not is_down(processes[victim]):
            time.sleep(0.05)
        since = time.monotonic()
        err = processes[1 - victim].communicate(timeout=60)[1].decode()
        assert time.monotonic() - since <= timeout + 5
        assert processes[1 - victim].returncode == 6
        last = err.splitlines()[-1]
        assert last.startswith(f"error: rank {victim}: step {step + 1}: "), err
        assert "Fix: " in last
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_rank_that_never_comes_is_waited_for_only_so_long():
    settings = {"timeout": 3, "out": "none"}
    lonely = next(start_processes(settings, free_port()))
    err = lonely.communicate(timeout=50)[1].decode()
    assert lonely.returncode == 6
    assert err.splitlines()[-1].startswith("error: rank ")


def test_processes_that_are_started_again_do_not_hear_what_earlier_ones_have_said(monkeypatch):
    """torchrun keeps its store; here two threads are two processes, started three times."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 2)]))
    for start in range(3):
        with ThreadPoolExecutor() as pool:
            first, second = pool.map(lambda rank: distributed._meet(World(rank, 2), 10), range(2))
        assert not first.check(["failure"])
        first.set("failure", str(start))
        assert second.get("failure") == str(start).encode()


def test_who_does_not_come_is_named_by_those_who_did(monkeypatch):
    for rank, absent in ((0, "rank 1, 2"), (2, "rank 0")):
        store = torch.distributed.HashStore()
        store.set("question/1", "of an earlier start")
        monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, 0, 3)]))  # noqa: B023
        with pytest.raises(Error, match=f"{absent}: did not come within 0.2 s") as e:
            distributed._meet(World(rank, 3), 0.2)
        assert e.value.code == 6


def test_a_world_of_one_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined(world_from_env(), "cpu", 1) as world:
        assert world == World(rank=0, size=1)
        assert world.is_main
        assert world.gather({1: 2}) == [{1: 2}]
        assert world.sum(torch.tensor(2.5)) == 2.5
        assert (world.any(True), world.any(False), world.largest(15)) == (True, False, 15)
        world.barrier()
        world.at_step(3)
        model = nn.Linear(2, 2)
        assert distribute(model, "ddp", world) is model


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("x", "2"), ("0", "0")])
def test_impossible_ranks_are_refused(monkeypatch, rank, size):
    for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Error, match="torchrun") as refused:
        world_from_env()
    assert refused.value.code == 2


def test_several_processes_need_a_strategy_and_a_device_they_can_share():
    with pytest.raises(Error, match="--strategy ddp or fsdp"):
        distribute(nn.Linear(2, 2), "none", World(0, 2))
    with pytest.raises(Error, match="--device cpu"), joined(World(0, 2), "mps", 1):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("size", "batch", "micro_batch"), [(2, 8, 2), (3, 7, 2), (4, 2, 1), (2, 9, 30)])
def test_shares_hold_each_sequence_once_and_are_equally_many(family, size, batch, micro_batch):
    """Also with more processes than sequences, and where pairs of other lengths make other numbers of parts."""
    whole = batch_of(family, 0, batch)
    shares = [share(whole, parts_of(family), micro_batch, World(rank, size)) for rank in range(size)]
    assert len({len(parts) for parts in shares}) == 1
    parts = [part for parts in shares for part in parts]
    targets = torch.cat([part["targets"][part["targets"] != IGNORE] for part in parts])
    wanted = whole["targets"][whole["targets"] != IGNORE]
    assert targets.sort().values.tolist() == wanted.sort().values.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fills_up_a_share_changes_no_gradient(family):
    torch.manual_seed(0)
    model, objective, _ = build(family)
    whole = batch_of(family, 0, 1)
    counts = objective.counts(whole)
    shares = [share(whole, parts_of(family), 30, World(rank, 2)) for rank in range(2)]
    gradients = []
    for parts in (shares[1], shares[0] + shares[1]):
        model.zero_grad()
        for part in parts:
            objective(model, part).total(counts).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert any(g.any() for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_pairs_make_other_numbers_of_parts_so_that_some_are_filled_up():
    """The test above would prove nothing of pairs if all ranks had equally many anyway."""
    whole = batch_of("transformer2017", 0, 16)
    filled = [
        sum(bool((part["targets"] == IGNORE).all()) for part in share(whole, micro_batches, 12, World(rank, 2)))
        for rank in range(2)
    ]
    assert filled[0] > 0
    assert filled[1] == 0


def test_a_batch_without_targets_is_not_filled_up_silently():
    with pytest.raises(ValueError, match="targets"):
        share({"labels": torch.zeros(1, 2)}, rows_of, 1, World(0, 2))


def test_the_norm_is_that_of_the_whole_gradient_and_is_clipped_to_the_limit():
    model = nn.Linear(3, 1)
    for limit, scale in ((None, 1.0), (1.0, 0.2), (50.0, 1.0)):
        model.weight.grad, model.bias.grad = torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([4.0])
        assert clip_norm(model, limit).item() == pytest.approx(5.0)
        assert model.bias.grad.item() == pytest.approx(4 * scale, rel=1e-5)


def test_a_measurement_in_one_process_is_that_of_objectives():
    model, objective, _ = build("bert")
    batches = [batch_of("bert", i, 3) for i in range(3)]
    assert measure_share(model, objective, batches, World()) == measure(model, objective, batches)
    assert model.training


def test_gradients_are_added_up_only_when_asked_also_through_a_compiled_model():
    model = Sharded()
    add_up(model, last=False)
    add_up(Compiled(model), last=True)
    add_up(nn.Linear(1, 1), last=True)  # one process: nothing to do
    assert model.flags == [False, True]


def test_gradients_that_would_fill_the_memory_are_shared_out_with_each_micro_batch(monkeypatch):
    model = Sharded()
    for memory in (8 * 4 * 6, 8 * 4 * 6 - 1):  # a gradient of 6 numbers is an eighth of it, or more
        monkeypatch.setattr(distributed, "look", lambda _: Machine("cpu", "small", False, False, memory))  # noqa: B023
        add_up(model, last=False)
    assert model.flags == [False, True]


class Sharded(nn.Linear):
    """A model of 6 parameters that notes what FSDP2 would be told."""

    def __init__(self):
        super().__init__(2, 2)
        self.flags = []

    def set_requires_gradient_sync(self, flag):
        self.flags.append(flag)
