"""Curves of the cases that grow, as SVG files that a page can show: speed at the left, memory at the right."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measures import rate, taken

WIDTH, HEIGHT = 480, 300
AXES = {
    "context": "tokens in a sequence",
    "batch": "sequences in a step",
    "size": "parameters, millions",
    "ranks": "processes",
}


def points(case: dict[str, Any]) -> list[tuple[float, float, float]]:
    """(x, tokens per second, peak MB) of every contender that took part, by x."""
    rows = [row for row in case["contenders"] if taken(row, "step")]
    found = [(_x(case, row), rate(row, "step", median(taken(row, "step"))), row["peak"] / 1e6) for row in rows]
    return sorted(found)


def _x(case: dict[str, Any], row: dict[str, Any]) -> float:
    return row["n_params"] / 1e6 if case["axis"] == "size" else row["x"]


def draw(case: dict[str, Any], folder: Path) -> Path:
    """Write the case's file; two lines that begin at zero."""
    from classiclm.commands import svg

    found, axis = points(case), AXES[case["axis"]]
    speed = [(x, tokens) for x, tokens, _ in found]
    memory = [(x, megabytes) for x, _, megabytes in found]
    charts = [
        svg.line_chart(
            [svg.Series("", values, hue)],
            title=f"{case['title']}: {name}",
            x_axis=axis,
            y_axis=name,
            width=WIDTH,
            height=HEIGHT,
            y_range=(0, 1.1 * max((y for _, y in values), default=1)),
            labels=False,
        )
        for name, values, hue in (("tokens/s", speed, "hue-10"), ("peak memory, MB", memory, "hue-4"))
    ]
    placed = [
        chart.replace("<svg ", f'<svg x="{i * WIDTH}" y="0" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for i, chart in enumerate(charts)
    ]
    whole = svg.drawing(case["title"], 2 * WIDTH, HEIGHT, *placed)
    opened = whole.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case['name']}.svg"
    path.write_text(opened.replace("</title>", f"</title><style>{svg.STYLE}</style>", 1))
    return path
