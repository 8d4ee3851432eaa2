"""What a measurement was made on: without it no number means anything."""

import datetime
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8",
    "bf16", "sve",
)  # fmt: skip
PACKAGES = ("torch", "transformers", "accelerate", "ctranslate2", "safetensors", "numpy")


def describe(threads: int) -> dict[str, Any]:
    """The machine and what is installed, as JSON can hold it."""
    info = _fields(Path("/proc/cpuinfo"))
    flags = set(info.get("flags", info.get("Features", "")).split())
    return {
        "cpu": info.get("model name", platform.processor() or platform.machine()),
        "family": f"{info.get('cpu family', '?')}/{info.get('model', '?')}",
        "flags": [flag for flag in FLAGS if flag in flags],
        "cache": info.get("cache size", "?"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def load() -> list[float]:
    """The load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()]


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has taken, all threads; 0 where Linux is not, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fields(path: Path) -> dict[str, str]:
    """The first value of each name in a file of "name : value" lines."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    pairs = [line.split(":", 1) for line in lines if ":" in line]
    return {name.strip(): value.strip() for name, value in reversed(pairs)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
