"""Many processes, each with a share of every batch, that compute what one process would.

All of it is put on from outside: models, objectives and batches know nothing of ranks. Every process knows the whole
batch of a step (a pure function, data/batches.py) and takes its rows; the terms of the loss are divided by counts over
the whole batch, so the gradient of a step is the plain sum of the processes'. Two ways to take that sum:

    ddp     each process keeps the whole model; gradients are added while the last backward pass of a step still runs
    fsdp    each keeps a share of weights, gradients and moments, and borrows one block's weights at a time (FSDP2)

    torchrun --standalone --nproc_per_node 2 -m classiclm train PRESET --strategy ddp --out runs/two
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import islice
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn

from classiclm.data.batches import Batch
from classiclm.errors import DISTRIBUTED, Error
from classiclm.nn.blocks import Block
from classiclm.nn.mask import IGNORE
from classiclm.nn.norm import LayerNorm
from classiclm.objectives import Measured, Objective, measure_counted
from classiclm.train.compiling import Compiled
from classiclm.train.heartbeat import Heartbeat
from classiclm.train.machine import look
from classiclm.train.memory import Strategy
from classiclm.train.progress import say

_TARGETS = ("targets", "next")  # what losses are over, in any batch: IGNORE there means none
_POLL = 0.02  # seconds
_WHOLE_GRADIENT = 1 / 8  # of a device's memory at most, where fsdp accumulates


@dataclass(frozen=True)
class World:
    """This process among all of them. With one process, every method is the identity."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine: the number of its GPU
    control: Any = field(default=None, compare=False, repr=False)  # a gloo group, for what lies on the host
    heartbeat: Heartbeat | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def at_step(self, step: int) -> None:
        """Say which optimizer step is in hand; others hear of it if this process fails."""
        if self.heartbeat is not None:
            self.heartbeat.step = step

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier(group=self.control)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, on each of them."""
        return self._reduced(tensor, dist.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers: for a signal, say, that only one of them has got."""
        return int(self._reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.largest(int(flag)) > 0

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank, on all of them. It has to be what JSON can hold."""
        if self.size == 1:
            return [value]
        text = json.dumps(value).encode()
        lengths = [torch.zeros((), dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor(len(text)), group=self.control)
        longest = max(int(length) for length in lengths)
        texts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        mine = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)  # JSON may end in blanks
        dist.all_gather(texts, mine, group=self.control)
        return [json.loads(text.numpy().tobytes()) for text in texts]

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(result, operation, group=self.control if tensor.device.type == "cpu" else None)
        return result


def world_from_env() -> World:
    """What torchrun has told this process; without it, a world of one. Raises Error (exit 2) for impossible numbers."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError) as e:
        why = f"RANK, WORLD_SIZE and LOCAL_RANK have to be whole numbers ({e})"
        raise Error("environment", why, "start all processes with torchrun, or unset WORLD_SIZE") from e
    if not 0 <= rank < size:
        raise Error("environment", f"there is no rank {rank} of {size}", "start all processes with torchrun")
    return World(rank, size, local_rank)


@contextmanager
def joined(world: World, device: str, timeout: float) -> Iterator[World]:
    """The world with its processes connected: NCCL between GPUs, gloo between CPUs and for what lies on the host.

    No process may be silent, or keep the others waiting, for more than `timeout` seconds. Then, or when one has died,
    all others leave within 5 seconds more with exit code 6, and name it and its step (heartbeat.py). Raises Error: exit
    2 for a device that processes cannot share work on, exit 6 if not all of them come, or an operation fails.
    """
    if world.size == 1:
        yield world
        return
    backend = _backend(world, device)
    store = _meet(world, timeout)
    with _as_error(world), Heartbeat(store.clone(), world.rank, world.size, timeout) as heartbeat:
        limit = timedelta(seconds=timeout)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
        yield replace(world, control=control, heartbeat=heartbeat)
        dist.barrier(group=control)  # who leaves first may take the store along
    dist.destroy_process_group()


def _backend(world: World, device: str) -> str:
    if device == "cpu":
        return "gloo"
    if device != "cuda":
        raise Error(f"device {device}", "cannot be shared between processes", "use --device cpu, or one process")
    n_gpus = torch.cuda.device_count()
    if world.local_rank >= n_gpus:
        raise Error("device", f"there are {n_gpus} GPUs here, and more processes", f"use --nproc_per_node {n_gpus}")
    torch.cuda.set_device(world.local_rank)
    return "nccl"


def _meet(world: World, timeout: float) -> Any:
    """The store that all processes of this start share, once all are there. Raises Error (exit 6).

    torchrun keeps its store when it starts processes again, with all that earlier ones have said in it, and does not
    count starts alike on all machines. So each start has a part of the store for itself: rank 0 thinks of its name.
    """
    limit, here = timedelta(seconds=timeout), [f"here/{rank}" for rank in range(world.size)]
    store = start = None
    try:
        store, _, _ = next(dist.rendezvous("env://", world.rank, world.size, timeout=limit))
        store.set_timeout(limit)
        name = uuid4().hex
        start = dist.PrefixStore(name if world.is_main else _asked(store, world.rank, name), store)
        start.set(here[world.rank], "1")
        if world.is_main:
            _answer(store, start, here, name, timeout)
        start.wait(here, limit)
    except (dist.DistError, RuntimeError, ValueError) as e:
        absent = [] if store is None else ["0"]
        if start is not None:
            absent = [str(rank) for rank, sign in enumerate(here) if not start.check([sign])]
        who = f"rank {', '.join(absent)}" if absent else f"rank {world.rank}"
        why = f"did not come within {timeout:g} s" if absent else f"cannot reach the others ({str(e).splitlines()[0]})"
        raise Error(who, why, "start all processes with torchrun, with one address and port", DISTRIBUTED) from e
    return start


def _asked(store: Any, rank: int, question: str) -> str:
    """The name that rank 0 has given to this start: the answer to a question that nobody has asked before."""
    store.set(f"question/{rank}", question)
    return store.get(f"answer/{question}").decode()


def _answer(store: Any, start: Any, here: list[str], name: str, timeout: float) -> None:
    """Tell the name to all who ask, until all have come; a question of an earlier start is answered in vain."""
    deadline = time.monotonic() + timeout
    while not start.check(here) and time.monotonic() < deadline:
        for question in (f"question/{rank}" for rank in range(1, len(here))):
            if store.check([question]):
                store.set(f"answer/{store.get(question).decode()}", name)
        time.sleep(_POLL)


@contextmanager
def _as_error(world: World) -> Iterator[None]:
    """A failed operation between processes, in one line."""
    try:
        yield
    except RuntimeError as e:  # gloo has no class of its own
        if not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        fix = (
            "see the other processes' messages, or raise the timeout; the same command goes on from the last checkpoint"
        )
        raise Error(f"rank {world.rank}", f"an operation failed ({str(e).splitlines()[0]})", fix, DISTRIBUTED) from e


def share(batch: Batch, parts: Callable[[Batch, int], Iterable[Batch]], micro_batch: int, world: World) -> list[Batch]:
    """The micro-batches of this process: `parts` of its rows, neighbours in the batch, equally many on all processes.

    The rows need not divide; and pairs of other lengths make other numbers of micro-batches. Whoever has fewer gets
    copies of one sequence without a target: their gradient is 0, and collective operations meet. Raises ValueError for
    a batch without `targets`.
    """
    if world.size == 1:
        return list(parts(batch, micro_batch))
    all_parts = [list(parts(_rows_of(batch, rank, world.size), micro_batch)) for rank in range(world.size)]
    mine, most = all_parts[world.rank], max(map(len, all_parts))
    return mine + [_without_target(batch, parts, micro_batch)] * (most - len(mine))


def _rows_of(batch: Batch, rank: int, size: int) -> Batch:
    """Numbers of rows differ by one at most; rank 0, 1, ... in a row are the batch."""
    n_rows = len(next(iter(batch.values())))
    first, end = n_rows * rank // size, n_rows * (rank + 1) // size
    return {name: tensor[first:end] for name, tensor in batch.items()}


def _without_target(batch: Batch, parts: Callable[[Batch, int], Iterable[Batch]], micro_batch: int) -> Batch:
    if "targets" not in batch:
        raise ValueError("a batch that is shared out needs its targets under the name 'targets'")
    part = next(iter(parts({name: tensor[:1] for name, tensor in batch.items()}, micro_batch)))
    return {name: torch.full_like(tensor, IGNORE) if name in _TARGETS else tensor for name, tensor in part.items()}


def distribute(
    model: nn.Module, strategy: Strategy, world: World, precision: str = "fp32", copies: int = 1
) -> nn.Module:
    """The model as all processes run it: call the result in place of the model. Comes before the optimizer is made.

    All start from the weights of rank 0. copies (HSDP): how many groups of processes keep a whole model between them;
    each shards inside, and gradients are added across. Raises Error (exit 2) for several processes without a strategy,
    or a number of copies that does not divide them.
    """
    if world.size == 1:
        return model
    if strategy == "none":
        raise Error("strategy none", f"is for one process, and there are {world.size}", "use --strategy ddp or fsdp")
    _start_equal(model, world)
    return _replicated(model) if strategy == "ddp" else _sharded(model, world, precision, copies)


def _start_equal(model: nn.Module, world: World) -> None:
    """Rank 0's weights everywhere. Equal seeds have made them equal, unless versions or machines differ."""
    differs = False
    for tensor in model.state_dict().values():
        first = tensor.detach().clone()
        dist.broadcast(first, 0, group=world.control if tensor.device.type == "cpu" else None)
        differs = differs or not torch.equal(first, tensor)
        tensor.detach().copy_(first)
    if world.any(differs) and world.is_main:
        say(
            "warning: the processes began with other weights, as other versions of torch make; all take those of rank 0"
        )


def _replicated(model: nn.Module) -> nn.Module:
    """torch's DDP, for it sends gradients while the backward pass goes on, compiled or not. It would average."""
    copy = nn.parallel.DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    copy.register_comm_hook(None, _summed)
    return copy


def _summed(_: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda done: done.value()[0])


def _sharded(model: nn.Module, world: World, precision: str, copies: int) -> nn.Module:
    """FSDP2 on every block and, for what is outside of blocks, on the model.

    In bf16 and fp16, blocks borrow their matrices in that precision: what autocast would make of them, in half the
    traffic. Norms, embeddings and the sums between blocks stay in fp32, as without FSDP.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = _mesh(model, world, copies)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    policy = MixedPrecisionPolicy()
    if precision != "fp32":
        products = torch.bfloat16 if precision == "bf16" else torch.float16
        policy = MixedPrecisionPolicy(param_dtype=products, reduce_dtype=torch.float32, cast_forward_inputs=False)
        norms: list[nn.Module] = [m for block in blocks for m in block.modules() if isinstance(m, LayerNorm)]
        if norms:  # all together: they are small
            fully_shard(norms, mesh=mesh)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, not means
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def _mesh(model: nn.Module, world: World, copies: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    device = next(model.parameters()).device.type
    if copies == 1:
        return init_device_mesh(device, (world.size,))
    if world.size % copies:
        raise Error("hsdp", f"{copies} copies cannot be shared out to {world.size} processes", "use a divisor")
    return init_device_mesh(device, (copies, world.size // copies), mesh_dim_names=("copy", "shard"))


def add_up(forward: Callable[..., Any], last: bool) -> None:
    """Before each micro-batch's forward pass: whether it is the step's last one, whose backward pass adds up gradients
    over all processes. `forward` is what `distribute` has made, compiled or not.

    Earlier gradients wait on their process, where with fsdp, too, they are whole: 4 bytes a parameter. If that is more
    than an eighth of the memory, each micro-batch's are added up and shared out at once.
    """
    module = forward.forward if isinstance(forward, Compiled) else forward
    if isinstance(module, nn.parallel.DistributedDataParallel):
        module.require_backward_grad_sync = last
    elif hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        sharded: Any = module
        sharded.set_requires_gradient_sync(last or not _can_wait(sharded))


def _can_wait(model: nn.Module) -> bool:
    gradient = 4 * sum(parameter.numel() for parameter in model.parameters())
    return gradient <= look(next(model.parameters()).device.type).memory * _WHOLE_GRADIENT


def clip_norm(model: nn.Module, limit: float | None) -> Tensor:
    """The norm of the whole gradient over all processes, (), the same on each; gradients above `limit` are scaled down
    to it."""
    norm = whole(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    if limit is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be shared out (a DTensor). All processes have to ask at the same time."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def measure_share(model: nn.Module, objective: Objective, batches: Iterable[Batch], world: World) -> Measured:
    """`objectives.measure` with batch i on process i modulo their number, the same result on all of them.

    All run equally often, since FSDP's forward pass needs every process: at the end some run a batch for nothing.
    """
    try:
        return measure_counted(model, objective, _rounds(batches, world), world.sum)
    finally:
        reshard: Any = getattr(model, "reshard", None)
        if reshard is not None:  # FSDP keeps the root whole for a backward pass; none is to come
            reshard()


def _rounds(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, as many as anyone has, and whether each counts: the last may be another's."""
    rest = iter(batches)
    while together := list(islice(rest, world.size)):
        there = world.rank < len(together)
        yield together[world.rank if there else 0], there
