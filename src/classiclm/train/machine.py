"""What this machine can do, and what `auto` means on it.

Every choice is a pure function of the model, the batch and the machine, never of a timing taken during the run, and
comes with its reason in words.
"""

import ctypes
import functools
import importlib.util
import os
import platform
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch

from classiclm.errors import Error

Device = Literal["cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16", "fp16"]

# A micro-batch's widest activations (fp32) should stay in a CPU's last-level cache; one that spills is
# slower per token than several that fit.
_CPU_CACHE_BYTES = 24 << 20
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_GPU_SHARE = 0.5  # of the memory, for activations


@dataclass(frozen=True)
class Machine:
    """The facts that `auto` is decided by."""

    device: Device
    name: str
    bf16: bool  # fast bf16 matrix products
    fp16: bool
    memory: int  # bytes: the GPU's, or the machine's


@dataclass(frozen=True)
class Plan:
    """How a step will run, and why."""

    device: Device
    precision: Precision
    micro_batch: int
    compile: bool
    reasons: tuple[str, ...]


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets that Linux reports; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return frozenset()
    lines = path.read_text(errors="replace").splitlines()
    return frozenset(
        next((line.split(":", 1)[1] for line in lines if line.startswith(("flags", "Features"))), "").split()
    )


def look(asked: str = "auto") -> Machine:
    """The facts about a device; "auto" is a CUDA GPU, else Apple's, else the CPU. Raises Error (exit 2) if absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    device = next(name for name in ("cuda", "mps", "cpu") if available[name]) if asked == "auto" else asked
    if not available.get(device):
        have = ", ".join(name for name, there in available.items() if there)
        raise Error(f"device {device}", "is not available to torch here", f"use one of: {have}")
    device = cast(Device, device)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return Machine(device, properties.name, properties.major >= 8, True, properties.total_memory)
    if device == "mps":
        return Machine(device, f"Apple {platform.machine()}", False, False, _ram())
    flags = cpu_flags()
    fast = bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})  # Intel AMX, AVX-512, Arm
    return Machine(device, f"CPU, {torch.get_num_threads()} threads", fast, False, _ram())


def _ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30


def choose_precision(asked: str, machine: Machine) -> tuple[Precision, str]:
    """The precision of matrix products, and why. Weights, sums and the optimizer stay in fp32 in any case."""
    if asked != "auto":
        if asked == "fp16" and machine.device != "cuda":
            raise Error("precision", f"fp16 needs its loss scaler, which {machine.device} lacks", "use fp32 or bf16")
        return cast(Precision, asked), "as asked"
    if machine.bf16:
        return "bf16", f"this {machine.device.upper()} multiplies bf16 faster than fp32"
    if machine.fp16:
        return "fp16", "this GPU has fp16 but no bf16; the loss is scaled"
    return "fp32", f"this {machine.device.upper()} has no fast bf16"


@dataclass(frozen=True)
class Sizes:
    """What the memory of a training step depends on."""

    n_ctx: int
    d_ff: int
    n_layers: int
    vocab_size: int
    n_params: int


def choose_micro_batch(batch: int, sizes: Sizes, precision: Precision, machine: Machine) -> int:
    """The largest divisor of the batch that fits."""
    fits = fitting(sizes, precision, machine)
    return max(divisor for divisor in range(1, min(batch, fits) + 1) if batch % divisor == 0)


def fitting(sizes: Sizes, precision: Precision, machine: Machine) -> int:
    """How many sequences of n_ctx tokens fit the cache of a CPU, or half of what the model leaves of a GPU; at least 1.

    On a CPU the widest activations count, MLP or logits. On a GPU, per token: about nine d_ff-wide tensors a layer that
    the backward pass needs, and three fp32 logits; weights, gradients and the two moments take 16 bytes a parameter.
    """
    if machine.device == "cpu":
        bytes_per_sequence, budget = sizes.n_ctx * max(sizes.d_ff, sizes.vocab_size) * 4, _CPU_CACHE_BYTES
    else:
        width = 4 if precision == "fp32" else 2
        bytes_per_sequence = sizes.n_ctx * (sizes.n_layers * sizes.d_ff * 9 * width + sizes.vocab_size * 12)
        budget = int((machine.memory - 16 * sizes.n_params) * _GPU_SHARE)
    return max(1, budget // bytes_per_sequence)


def keep_freed_memory() -> None:
    """Have glibc keep the memory that tensors free for the next ones, instead of giving it back to the system.

    A training step frees and asks for the same hundreds of megabytes each time, and getting them anew from the system,
    page by page, takes up to half of a CPU's step. Whoever has set one of glibc's own variables, MALLOC_..., has
    decided for this process; other systems have other ways, and are left alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)  # never


def choose_compile(asked: bool | str, machine: Machine) -> tuple[bool, str]:
    """Whether to compile the model, and why: it pays on a GPU that Triton supports (compute capability 7 and up)."""
    if asked != "auto":
        return bool(asked), "compiled, as asked" if asked else "not compiled, as asked"
    if machine.device != "cuda":
        return False, "not compiled (it pays on a CUDA GPU only)"
    if torch.cuda.get_device_capability(0)[0] < 7 or importlib.util.find_spec("triton") is None:
        return False, "not compiled (no Triton for this GPU)"
    return True, "compiled"


def autocast(device: str, precision: str) -> AbstractContextManager:
    """The context that runs matrix products in the precision; fp32 needs none."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device, torch.bfloat16 if precision == "bf16" else torch.float16)
