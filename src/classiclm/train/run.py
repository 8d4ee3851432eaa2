"""A run's folder: its lock, its config, its environment and its metrics.

RUN/config.yaml     all settings but the folder itself; starts the same run again
RUN/env.json        versions and machine
RUN/metrics.jsonl   one object per logged step
RUN/samples/        what the model wrote at some steps: see samples.py
RUN/checkpoints/    see checkpoint.py
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from classiclm import __version__
from classiclm.config import difference, load_yaml
from classiclm.errors import BAD_INPUT, USAGE, Error
from classiclm.files import write_file, writing
from classiclm.train.progress import say
from classiclm.train.settings import MAY_CHANGE


def check_config(run: Path, text: str, saved_steps: Sequence[int]) -> None:
    """Compare with the config.yaml that is there; a changed length is warned of.

    Raises Error: exit 2 with the difference, exit 3 if there are checkpoints and no config to compare with.
    """
    path = run / "config.yaml"
    if not path.is_file():
        if saved_steps:
            raise Error(
                path, "is missing, and the run has checkpoints", "restore it, or choose another --out", BAD_INPUT
            )
        return
    old, new = load_yaml(path), yaml.safe_load(text)
    changed = difference(old, new, MAY_CHANGE)
    if changed:
        why = "holds a run of another config (" + "; ".join(changed) + ")"
        raise Error(run, why, "choose another --out, or the settings it was started with", USAGE)
    if saved_steps and old.get("steps") != new.get("steps"):
        planned = f"{run} was planned for {old.get('steps')} steps, not {new['steps']}"
        say(f"warning: {planned}: what ends with the run, as a schedule of learning rates may, is another from here on")


def write_config(run: Path, text: str) -> None:
    """config.yaml."""
    write_file(run / "config.yaml", text.encode())


def write_environment(run: Path) -> None:
    """env.json: what bit-exactness depends on besides the config; a warning if it is not what it was."""
    environment = {
        "classiclm": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    path = run / "env.json"
    if path.is_file():
        changed = difference(load_yaml(path), environment)  # JSON is YAML
        if changed:
            say(f"warning: equal bytes are not promised across {'; '.join(changed)}")
    write_file(path, json.dumps(environment, indent=1).encode())


class Metrics:
    """metrics.jsonl: one line per row, one write per line."""

    def __init__(self, run: Path):
        self.path = run / "metrics.jsonl"

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows; a last line torn by a crash is left out."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                row = json.loads(line)
                rows.append({**row, "step": int(row["step"])})
            except (ValueError, TypeError, KeyError) as e:
                if not line.endswith(b"\n"):
                    break
                fix = "remove the line, or restore the file from a copy"
                raise Error(self.path, f"line {len(rows) + 1} is no JSON object with a step", fix, BAD_INPUT) from e
        return rows

    def cut_behind(self, step: int) -> list[dict[str, Any]]:
        """Drop the rows of steps that will be done again; return those that stay."""
        rows = [row for row in self.rows() if row["step"] <= step]
        write_file(self.path, b"".join(_line(row) for row in rows))
        return rows

    def append(self, row: dict[str, Any]) -> None:
        """Add one row."""
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            file.write(_line(row))

    def flush_to_disk(self) -> None:
        """Rows must not be lost while a checkpoint of the same step stays."""
        with writing(self.path), self.path.open("ab") as file:
            os.fsync(file.fileno())


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
