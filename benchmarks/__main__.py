"""python -m benchmarks: measure ours beside its peers, write a JSON file and a page.

    python -m benchmarks [NAMES...] [--quick] [--repeats N] [--threads N] [--nanogpt DIR]
                         [--python litgpt=DIR/bin/python] [--out DIR] [--profile] [--list] [--report FILE.json ...]

A name chooses the cases that begin so: `train`, `decode-gpt2` ... Two words are programs of their own: `prepare` (how
fast text becomes shards) and `losses` (do the fast forms learn what the readable ones do?).
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness, machine, report
from benchmarks.cases import CASES, Case

DOCS = harness.ROOT / "docs"
FILE = "benchmarks.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, list or report; 1 if nothing of ours took part in one of the cases."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.path.insert(0, str(harness.ROOT / "src"))
    if arguments[:1] in (["prepare"], ["losses"]):
        importlib.import_module(f"benchmarks.{arguments[0]}").main(arguments[1:])
        return 0
    flags = parse(arguments)
    if flags.report:
        print(report.write(merged(flags.report), flags.docs))
        return 0
    chosen = [case.quick() if flags.quick else case for case in choose(flags.names)]
    if flags.list:
        for case in chosen:
            print(f"{case.name}: {case.title}\n    " + ", ".join(entry.name for entry in case.entries))
        return 0
    return measure(chosen, flags)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The flags; ends the program for wrong ones, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of cases' names; none = all")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see whether everything runs")
    parser.add_argument("--repeats", type=int, help="rounds (default: 5, quick: 2)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each contender")
    parser.add_argument("--nanogpt", help="a checkout of nanoGPT")
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a peer")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="where the JSON file and the page go")
    parser.add_argument("--profile", action="store_true", help="also say where a unit of ours goes")
    parser.add_argument("--list", action="store_true", help="the cases and who takes part")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE.json", help="only write the page")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where --report writes")
    flags = parser.parse_args(argv)
    wrong = [pair for pair in flags.python if "=" not in pair]
    if wrong:
        parser.error(f"--python {wrong[0]}: should be NAME=PATH, as in litgpt=other/bin/python")
    unknown = [name for name in flags.names if not any(case.name.startswith(name) for case in CASES)]
    if unknown:
        parser.error(f"no case begins with {unknown[0]!r}; see --list")
    return flags


def choose(names: Sequence[str]) -> list[Case]:
    """All cases, or those whose name begins with one of these."""
    return [case for case in CASES if not names or any(case.name.startswith(name) for name in names)]


def measure(chosen: Sequence[Case], flags: argparse.Namespace) -> int:
    """Case by case; the file is written anew after each, so that nothing measured is lost."""
    settings = harness.Settings(
        repeats=flags.repeats or (2 if flags.quick else 5),
        threads=flags.threads,
        warm_up=1 if flags.quick else 2,
        at_once=flags.threads if flags.quick else 1,
        python=dict(pair.split("=", 1) for pair in flags.python),
        nanogpt=flags.nanogpt and str(Path(flags.nanogpt).resolve()),
    )
    flags.out.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"machine": machine.describe(flags.threads), "repeats": settings.repeats}
    data |= {"quick": flags.quick, "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        for case in chosen:
            data["cases"].append(harness.measure(case, settings, Path(folder), flags.profile))
            (flags.out / FILE).write_text(json.dumps(data, indent=1))
    report.write(data, flags.out)
    print(report.page(data))
    return int(any(not took_part(case) for case in data["cases"]))


def took_part(case: dict[str, Any]) -> bool:
    """Whether one of ours did."""
    return any(row["role"] == "ours" and row["why"] is None for row in case["contenders"])


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """One file of several, the later ones' cases in place of the earlier ones'. Ends the program for two machines."""
    parts = [json.loads(file.read_text()) for file in files]
    cases = {case["name"]: case for part in parts for case in part["cases"]}
    machines = {part["machine"]["cpu"] for part in parts}
    if len(machines) > 1:
        raise SystemExit(f"these files are of {len(machines)} machines, whose numbers do not belong on one page")
    order = {case.name: place for place, case in enumerate(CASES)}
    ordered = sorted(cases.values(), key=lambda case: order.get(case["name"], len(order)))
    losses = {result["preset"]: result for part in parts for result in part.get("losses", [])}
    repeats = min((part["repeats"] for part in parts if part["cases"]), default=0)
    return {**parts[-1], "repeats": repeats, "cases": ordered, "losses": list(losses.values())}


if __name__ == "__main__":
    sys.exit(main())
