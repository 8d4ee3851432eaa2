"""From the JSON file to docs/benchmarks.md: tables, what was slower, how to run it again."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks import plots
from benchmarks.losses import WINDOW, distances, windows
from benchmarks.measures import Row, fastest, judge, quartiles, rate, slower, taken, times_as_fast
from benchmarks.profiling import GROUPS

RESTLESS = 0.02  # of a core: a contender that takes more while it waits disturbs the others

HEAD = """# How fast

Ours beside its peers and beside what this machine can do, measured by `benchmarks/` and written by it: nobody edits
this page. All contenders of a table are processes that live at the same time, prepared and warm; one of them runs at a
time, a unit each in turn, {repeats} rounds or more. Numbers are medians with quartiles; a ratio is the median of the
rounds' own ratios, so that what disturbs a round disturbs both sides of it. **An absolute number is worth nothing
without its ratio**: it is this machine's, on that day. Peak memory is the process's highest resident memory less what
it had when its libraries were loaded; of commands, the whole of it.
"""

LOSSES = f"""The first steps of whole recipes, both ways, from the same weights and on the same batches. Readable is
fp32, the whole batch at once, attention and layer norms as their equations are written, torch's own dropout; fast is
what `auto` chooses here. Losses are averaged over {WINDOW} steps; a distance is between the two forms' means over the
seeds, a spread is the readable form's standard deviation over the seeds, and both are root mean squares over the
windows.
"""

AGAIN = """## Again

```sh
make bench                                        # all of it, into runs/bench
python -m benchmarks --list                       # the cases and who takes part
python -m benchmarks train-shakespeare --repeats 9 --nanogpt ../nanoGPT
python -m benchmarks losses                       # do fast forms learn what readable ones do?
python -m benchmarks --quick                      # does everything run? toy sizes, numbers that mean nothing
python -m benchmarks --report runs/bench/benchmarks.json    # this page, from the file
```

nanoGPT is a checkout that you give with `--nanogpt`. A peer whose pins do not agree with ours goes into an environment
of its own: `--python litgpt=other/bin/python`. Who is missing is listed with the reason.
"""


def page(data: dict[str, Any], images: str = "img") -> str:
    """The whole page."""
    parts = [HEAD.format(repeats=data["repeats"]), machine(data), summary(data["cases"])]
    parts += [section(case, images) for case in data["cases"]]
    if data.get("losses"):
        parts += ["## Fast forms learn what readable ones do\n", LOSSES, losses(data["losses"]) + "\n"]
    return "\n".join([*parts, AGAIN])


def machine(data: dict[str, Any]) -> str:
    """What it was measured on."""
    m = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["packages"].items() if version)
    loads = [case["load"] for case in data["cases"]]
    highest = max((load[0] for pair in loads for load in pair), default=0.0)
    lines = [
        f"Measured {m['date']} on {m['cpu']} ({', '.join(m['flags'])}), {m['cores']} cores, {m['ram_gib']} GiB,",
        f"{m['system']}, {m['threads']} threads for each; Python {m['python']},",
        f"{versions}.",
        f"The load average around a case was at most {highest:.1f}; who has the turn makes {m['threads']} of it.",
    ]
    quick = ["", "**A quick run: toy sizes. Nothing on this page means anything.**"] if data["quick"] else []
    return "\n".join([*lines, *quick, ""])


def summary(cases: Sequence[dict[str, Any]]) -> str:
    """What we set ourselves, and what was slower."""
    judged = [(case, judge(case, bar)) for case in cases for bar in case["bars"]]
    lines = ["## In short", ""]
    rows = [_bar(case, bar) for case, bar in judged if bar is not None]
    if rows:
        lines += [_table(["case", "ours", "against", "ratio", "wanted", ""], rows), ""]
    lines += ["**What was slower:**", "", *_slower(cases), ""]
    return "\n".join(lines)


def _bar(case: dict[str, Any], bar: dict[str, Any]) -> list[str]:
    goal = f" (goal {bar['goal']:g})" if bar["goal"] else ""
    wanted = f"{'at least' if bar['of'] == 'speed' else 'at most'} {bar['floor']:g}{goal}"
    met = "" if bar["met"] else "missed"
    return [case["name"], bar["mine"], bar["other"], f"{bar['of']} {bar['ratio']:.2f}", wanted, met]


def _slower(cases: Sequence[dict[str, Any]]) -> list[str]:
    found = [(case, *behind) for case in cases if case["axis"] is None for behind in slower(case)]
    if not found:
        return ["- nothing that was measured here: at each precision the fastest of ours is ahead of the fastest peer"]
    return [
        f"- {case['name']}, {measure}: {mine['name']} at {ratio:.2f} times the speed of {peer['name']}"
        for case, measure, mine, peer, ratio in found
    ]


def section(case: dict[str, Any], images: str) -> str:
    """One case: what is compared, its tables, who did not take part, who disturbed the others."""
    lines = [f"## {case['title']}", "", f"`{case['name']}`. {case['about']}", ""]
    rows = [row for row in case["contenders"] if row["why"] is None]
    if case["axis"]:
        lines += [_growth(case, rows), "", f"![{case['title']}]({images}/{case['name']}.svg)", ""]
    else:
        lines += [part for measure in case["measures"] for part in (_measured(case, rows, measure), "")]
    lines += _profiles(rows)
    lines += [f"- {row['name']} did not take part: {row['why']}" for row in case["contenders"] if row["why"]]
    restless = [row for row in rows if (row["idle"] or 0) > RESTLESS]
    lines += [f"- {row['name']} took {row['idle']:.0%} of a core while it waited" for row in restless]
    return "\n".join(lines).rstrip() + "\n"


def _measured(case: dict[str, Any], rows: Sequence[Row], measure: dict[str, Any]) -> str:
    name, unit = measure["name"], measure["unit"]
    shown = [row for row in rows if taken(row, name)]
    peer = fastest(rows, name, "peer")
    head = [name, unit, "quartiles", "times the best peer", "of the limit"]
    head += ["peak MB"] if measure == case["measures"][0] else []
    head += ["same tokens"] if name == "decode" else []
    head += ["loss"] if any(row.get("loss") for row in rows) else []
    cells = [_cells(row, rows, name, peer, head) for row in shown]
    return _table([*head, "what"], cells)


def _cells(row: Row, rows: Sequence[Row], measure: str, peer: Row | None, head: Sequence[str]) -> list[str]:
    limit = next((other for other in rows if other["name"] == row["limit"]), None)
    is_limit = row["role"] == "limit"
    cells = [_bold(row), _number(rate(row, measure, median(taken(row, measure)))), _spread(row, measure)]
    cells.append("" if peer is None or is_limit else _ratio(times_as_fast(row, peer, measure)))
    cells.append("" if limit is None or is_limit else _percent(times_as_fast(row, limit, measure)))
    cells += ["" if row["peak"] is None else f"{row['peak'] / 1e6:,.0f}"] if "peak MB" in head else []
    cells += [_percent(row.get("same"))] if "same tokens" in head else []
    cells += [", ".join(f"{loss:.3f}" for loss in row["loss"])] if "loss" in head else []
    return [*cells, row["note"]]


def _growth(case: dict[str, Any], rows: Sequence[Row]) -> str:
    name, unit = case["measures"][0]["name"], case["measures"][0]["unit"]
    shown = [row for row in rows if taken(row, name)]
    cells = []
    for row in shown:
        speed, first = (rate(r, name, median(taken(r, name))) for r in (row, shown[0]))
        numbers = [_number(speed), _spread(row, name), f"{speed / first:.2f}", f"{row['peak'] / 1e6:,.0f}"]
        cells.append([row["name"], f"{row['n_params']:,}", *numbers, row["note"]])
    return _table([case["axis"], "parameters", unit, "quartiles", "times the first", "peak MB", "what"], cells)


def losses(results: Sequence[dict[str, Any]]) -> str:
    """The table of `benchmarks.losses`."""
    head = ["recipe", "steps", "seeds", "last loss, readable", "last loss, fast", "distance", "spread", "ratio"]
    return _table([*head, "largest distance"], [_forms(result) for result in results])


def _forms(result: dict[str, Any]) -> list[str]:
    apart, spread = zip(*distances(result), strict=True)
    distance, deviation = (fmean(x * x for x in values) ** 0.5 for values in (apart, spread))
    last = [f"{fmean(windows(row)[-1] for row in result[form]):.4f}" for form in ("readable", "fast")]
    numbers = [f"{distance:.4f}", f"{deviation:.4f}", f"{distance / deviation:.2f}", f"{max(apart):.4f}"]
    return [f"`{result['preset']}`", str(result["steps"]), str(len(result["fast"])), *last, *numbers]


def _profiles(rows: Sequence[Row]) -> list[str]:
    """Where a unit of ours goes, in per cent of the operations' own time."""
    profiled = [row for row in rows if row.get("profile")]
    if not profiled:
        return []
    totals = [sum(row["profile"].values()) for row in profiled]
    cells = [
        [group, *(_percent(row["profile"][group] / total) for row, total in zip(profiled, totals, strict=True))]
        for group in GROUPS
    ]
    return [_table(["where it goes", *(row["name"] for row in profiled)], cells), ""]


def _bold(row: Row) -> str:
    return f"**{row['name']}**" if row["role"] == "ours" else row["name"]


def _spread(row: Row, measure: str) -> str:
    ends = [rate(row, measure, seconds) for seconds in quartiles(taken(row, measure))]
    return f"{_number(min(ends))} to {_number(max(ends))}"


def _number(value: float) -> str:
    """Three significant digits, or all in front of the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(cells).join(("| ", " |")) for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def write(data: dict[str, Any], docs: Path) -> Path:
    """benchmarks.md and the pictures that it shows, in a folder such as docs/."""
    docs.mkdir(parents=True, exist_ok=True)
    for case in data["cases"]:
        if case["axis"]:
            plots.draw(case, docs / "img")
    path = docs / "benchmarks.md"
    path.write_text(page(data))
    return path
