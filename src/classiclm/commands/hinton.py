"""Hinton diagrams: weights as squares, as Figs 1 and 4 of the paper of 1986 draw them.

White is positive, black is negative, and the area of a square is the size of the weight. Each unit that receives
connections has a panel of its own: a row of squares per group that feeds it (at most twelve wide, so that the 24 people
stand in two rows, one per family), and its bias apart at the right. The scale is one per group.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from classiclm.commands import svg
from classiclm.models.rumelhart1986 import Floats, Net

STYLE = """
.hinton .paper { fill: var(--paper); }
.hinton .panel { fill: #8b9099; }
.hinton .plus { fill: #ffffff; }
.hinton .minus { fill: #000000; }
@media screen and (prefers-color-scheme: dark) { .hinton .panel { fill: #767c86; } }
"""

CELL = 20  # pixels of the square that the largest weight of a group fills
COLUMNS = 12  # squares in a row
GAP = 22  # between panels
LABEL = 20  # a line of words
MARGIN = 12
WIDTH = 1080  # at most

Names = Mapping[str, Sequence[str]]  # group -> the words for its units; others are numbered


@dataclass(frozen=True)
class Panel:
    """Where the weights of one unit are drawn, and at which scale."""

    x: float
    y: float
    columns: int  # squares in a row, without the bias
    largest: float  # the weight that fills its cell
    label: str  # the unit


def draw(net: Net, weights: Mapping[str, Floats], names: Names, title: str) -> str:
    """The weights of one net, group: (F + 1, N), as an <svg>.

    A square is a <rect> of class plus or minus with its data-weight, and says in words what it joins.
    """
    legend = "white +, black −, area = size (one scale per group), apart at the right: the bias"
    parts, width, y = [svg.text(MARGIN, 24, legend, class_="muted")], MARGIN + svg.text_width(legend), 48.0
    for target, matrix in weights.items():
        largest = float(abs(matrix).max()) or 1.0
        words, y = _heading(net, target, largest, names, y)
        panels, y = _panels(net, target, matrix.shape[1], largest, names, y)
        parts.append(words)
        for unit, panel in enumerate(panels):
            parts.append(_panel(net, target, matrix[:, unit], names, panel))
            width = max(width, panel.x + _size(net, target)[0])
    width += MARGIN
    ground = svg.element("rect", width=width, height=y, class_="paper")
    return svg.drawing(title, width, y, svg.element("g", ground, *parts, class_="hinton"))


def standalone(drawing: str) -> str:
    """A drawing as a file of its own: with the name space and the styles that a page would give it."""
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return opened.replace("</title>", f"</title><style>{svg.STYLE}{STYLE}</style>", 1) + "\n"


def unit_names(net: Net, input_names: Sequence[str], output_names: Sequence[str]) -> Names:
    """Input or output group -> the words for its units, where the input groups share one list."""
    sizes = [net.config.units[name] for name in net.config.inputs]
    ends = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    named = {name: input_names[a:b] for name, (a, b) in zip(net.config.inputs, ends, strict=True)}
    return {**named, net.config.output: output_names}


def _size(net: Net, target: str) -> tuple[float, float]:
    """Width and height of a unit's panel."""
    units = [net.config.units[source] for source in net.rows[target]]
    return (min(COLUMNS, max(units)) + 1.5) * CELL, sum(map(_lines, units)) * CELL


def _heading(net: Net, target: str, largest: float, names: Names, y: float) -> tuple[str, float]:
    """What feeds the group, with the names of the squares row by row; and where the panels begin."""
    parts = [svg.text(MARGIN, y + 12, f"{target} ← {' + '.join(net.rows[target])}, largest {largest:.2f}")]
    for source in net.rows[target]:
        known = names.get(source, ())
        for first in range(0, len(known), COLUMNS):
            y += LABEL
            parts.append(svg.text(MARGIN, y + 12, ", ".join(known[first : first + COLUMNS]), class_="muted"))
    return "".join(parts), y + LABEL


def _panels(net: Net, target: str, count: int, largest: float, names: Names, top: float) -> tuple[list[Panel], float]:
    """The panels of one group, side by side as far as there is room; and where the next group begins."""
    width, height = _size(net, target)
    across = max(1, int((WIDTH - 2 * MARGIN + GAP) // (width + GAP)))
    columns = int(width // CELL) - 1
    places = [
        (MARGIN + i % across * (width + GAP), top + LABEL + i // across * (height + LABEL + 6)) for i in range(count)
    ]
    panels = [Panel(x, y, columns, largest, _name(names, target, i)) for i, (x, y) in enumerate(places)]
    return panels, places[-1][1] + height + GAP


def _panel(net: Net, target: str, column: Floats, names: Names, panel: Panel) -> str:
    """One unit: its name, its ground, and a square per weight of (F + 1,)."""
    width, height = _size(net, target)
    parts = [
        svg.text(panel.x, panel.y - 5, panel.label, class_="muted"),
        svg.element("rect", x=panel.x, y=panel.y, width=width, height=height, class_="panel"),
    ]
    line = 0
    for source, rows in net.rows[target].items():
        for i, weight in enumerate(column[rows]):
            label = f"{_name(names, source, i)} → {panel.label}"
            parts.append(_square(panel, i % COLUMNS, line + i // COLUMNS, float(weight), label))
        line += _lines(net.config.units[source])
    parts.append(_square(panel, panel.columns + 0.5, 0, float(column[-1]), f"bias of {panel.label}"))
    return "".join(parts)


def _square(panel: Panel, column: float, line: int, weight: float, label: str) -> str:
    side = 0.94 * CELL * math.sqrt(abs(weight) / panel.largest)
    x, y = panel.x + (column + 0.5) * CELL - side / 2, panel.y + (line + 0.5) * CELL - side / 2
    shape = {"x": f"{x:.2f}", "y": f"{y:.2f}", "width": f"{side:.2f}", "height": f"{side:.2f}"}
    words = svg.element("title", svg.escape(f"{label}: {weight:+.2f}"))
    return svg.element("rect", words, **shape, class_="plus" if weight > 0 else "minus", data_weight=f"{weight:.4f}")


def _lines(units: int) -> int:
    return math.ceil(units / COLUMNS)


def _name(names: Names, group: str, unit: int) -> str:
    return names[group][unit] if group in names else f"{group} {unit + 1}"
