"""Ours on several processes of this machine, joined by gloo, with one thread each."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from typing import Any

from benchmarks.contenders import ours
from benchmarks.turns import Turns
from benchmarks.work import Work


def train(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Rank 0 has the turns and tells the others; memory is rank 0's."""
    import torch

    torch.set_num_threads(1)
    if options["ranks"] == 1:
        ours.train(work, options, turns)
        return
    port = free_port()
    others = [_start(work, rank, options["ranks"], port) for rank in range(1, options["ranks"])]
    ours.load()
    turns.imported()
    try:
        step, trainer = _join(work, 0, options["ranks"], port)
        turns.serve(lambda: _led(step), trainer.model.count_parameters(), ours.note(trainer, work))
        _tell(False)
    finally:
        for other in others:
            other.kill()


def follow(rank: int, size: int, port: int, sizes: str) -> None:
    """Another rank: a step whenever rank 0 takes one."""
    import json

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    step, _ = _join(Work(**json.loads(sizes)), rank, size, port)
    order = torch.zeros(1)
    dist.broadcast(order, 0)
    while order.item():
        step()
        dist.broadcast(order, 0)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(work: Work, rank: int, size: int, port: int) -> subprocess.Popen:
    import dataclasses
    import json

    call = f"from benchmarks.contenders.ranks import follow; import sys; follow({rank}, {size}, {port}, sys.argv[1])"
    command = [sys.executable, "-c", call, json.dumps(dataclasses.asdict(work))]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def _join(work: Work, rank: int, size: int, port: int) -> tuple[Any, Any]:
    import torch.distributed as dist

    from classiclm.train.distributed import World

    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timedelta(hours=4))
    world = World(rank, size, rank, control=dist.group.WORLD)
    trainer = ours.make_trainer(work, ["--strategy", "ddp"], world)
    return ours.Step(trainer, work, world), trainer


def _led(step: Any) -> None:
    _tell(True)
    step()


def _tell(go: bool) -> None:
    import torch
    import torch.distributed as dist

    dist.broadcast(torch.tensor([float(go)]), 0)
