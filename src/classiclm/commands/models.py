"""classiclm models: every preset, its sizes, and how many parameters it really has."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from classiclm import registry
from classiclm.commands.tables import show, table
from classiclm.config import parse_flags, validate

_SIZES = ("n_layers", "d_model", "n_heads", "n_ctx", "vocab_size")


@dataclass(frozen=True)
class ModelsFlags:
    """List all presets with their sizes and true parameter counts, each beside the paper's headline."""

    json: bool = False  # as JSON, with every size


def main(argv: Sequence[str], prog: str) -> int:
    """A table, or JSON; nothing is allocated."""
    flags = validate(ModelsFlags, parse_flags(ModelsFlags, argv, prog), "the command line")
    rows = [describe(preset) for preset in registry.presets().values()]
    if flags.json:
        print(json.dumps(rows, indent=1))
    else:
        _print_table(rows)
    return 0


def describe(preset: registry.Preset) -> dict[str, Any]:
    """One preset: name, family, counts, sizes. `paper_params` is what the paper prints, null where no paper does."""
    counts = {"params": registry.count_parameters(preset), "paper_params": preset.paper_params}
    return {"name": preset.name, "family": preset.family, **counts, **dataclasses.asdict(preset.config)}


def _print_table(rows: list[dict[str, Any]]) -> None:
    made = table(["preset"], ["parameters", "paper says", *_SIZES])
    for row in rows:
        sizes = [str(row.get(name, "")) for name in _SIZES]
        made.add_row(row["name"], f"{row['params']:,}", row["paper_params"] or "", *sizes)
    show(made)
