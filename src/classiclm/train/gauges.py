"""What a machine reaches and what a run takes of it: the peak of its matrix products, and memory.

A peak is never timed during a run, where it would slow what it is to judge. `classiclm doctor` measures it and writes
it into the cache; a run looks it up there, and shows no share of a peak that nobody has measured.
"""

import functools
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

from classiclm.data.locate import cache_folder
from classiclm.files import make_folder, write_file
from classiclm.train.machine import autocast, look

_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # large enough that a product takes longer than its start
_SECONDS = 0.5
_LEAST = 3  # products, however long they take


def measure_peak(device: str, precision: str, size: int | None = None) -> float:
    """FLOPs/s of the fastest of several square matrix products, under the autocast that training uses.

    Takes about a second and leaves torch's random numbers alone. Pages, clocks and other processes only slow a
    product down, so the fastest is the one to go by.
    """
    n = size or _SIZE[device]
    # Random numbers of a generator of its own: a GPU is faster on equal ones, which no model has.
    random = torch.Generator(device).manual_seed(0)
    a, b = (torch.rand(n, n, device=device, generator=random) for _ in range(2))
    times: list[float] = []
    with torch.no_grad(), autocast(device, precision):
        a, b = (a @ b) / n, (b @ a) / n  # warm, and in the precision that the products will be in
        _wait(device)
        while len(times) < _LEAST or sum(times) < _SECONDS:
            began = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times)


def remember_peak(device: str, precision: str, peak: float) -> None:
    """Write a peak into the cache. Raises Error (exit 4) if that cannot be written."""
    path = _cache()
    make_folder(path.parent)
    write_file(path, json.dumps({**_peaks(path), _key(device, precision): peak}, indent=1).encode())


def known_peak(device: str, precision: str) -> float | None:
    """The FLOPs/s that `remember_peak` was told of for this machine, this torch and as many threads; None if none."""
    peak = _peaks(_cache()).get(_key(device, precision))
    return float(peak) if isinstance(peak, int | float) and peak > 0 else None


def memory_in_use(device: str) -> int | None:
    """Bytes: what torch holds of a GPU, or the resident set of this process (outside Linux its maximum so far)."""
    if device == "cuda":
        return torch.cuda.memory_reserved()
    if device == "mps":
        return torch.mps.driver_allocated_memory()
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return None
    import resource  # Windows has none

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def _cache() -> Path:
    return cache_folder() / "peaks.json"


def _peaks(path: Path) -> dict[str, object]:
    """What the cache holds; nothing if it cannot be read, since it can be measured again."""
    try:
        peaks = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return peaks if isinstance(peaks, dict) else {}


def _key(device: str, precision: str) -> str:
    """What a peak depends on. A home folder may be shared by machines of many kinds, so the CPU is named."""
    here = look(device)
    name = f"{_cpu()}, {here.name}" if device == "cpu" else here.name
    return f"{name}, {precision}, torch {torch.__version__}"


@functools.cache
def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
