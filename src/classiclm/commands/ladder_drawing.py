"""The architecture of one rung of the ladder as a small drawing: boxes and arrows, read from the bottom up.

A rung is first spelled as a list of `Part`s, then stacked; a part that the rung before lacks is in colour.
"""

import itertools
from dataclasses import dataclass
from typing import Any

from classiclm.commands.svg import drawing, element, line, number, text

STYLE = """
.arch .box { fill: var(--panel); stroke: var(--muted); }
.arch .repeat { fill: none; stroke: var(--muted); stroke-dasharray: 2 3; }
.arch .flow { fill: none; stroke: var(--muted); }
.arch .head { fill: var(--muted); }
.arch text { text-anchor: middle; }
.arch text.detail { font-size: 10.5px; fill: var(--muted); }
.arch .new .box { fill: color-mix(in srgb, currentColor 14%, var(--paper)); }
.arch .new .box, .arch .new .flow, .arch .new .repeat { stroke: currentColor; stroke-width: 1.75; }
.arch .new .head { fill: currentColor; }
.arch .new text { font-weight: 600; fill: var(--ink); }
.arch .new text.detail { font-weight: 400; fill: var(--ink); }
"""

WIDTH, CENTRE = 224, 100  # of the drawing, and of its trunk: the room at the right is for "× 3"
BYPASS = 14  # where a residual runs past its layer
FRAME = (4, 186)  # the left and right side of what is repeated
BOX, WIDE_BOX = 134, 158  # an MLP that is wide in the middle is drawn wider
GAP, SHORT_GAP = 13, 7  # below a part; below a point where lines meet


@dataclass(frozen=True)
class Part:
    """One thing on the trunk. `place` tells apart what looks alike: norms before and after a layer."""

    kind: str  # a key of HEIGHT
    name: str = ""
    detail: str = ""
    place: str = ""


@dataclass(frozen=True)
class Placed:
    """A part and where it stands; y counts downwards, so `top` is less than `bottom`."""

    part: Part
    top: float
    bottom: float


HEIGHT = {"end": 13, "box": 34, "heads": 34, "wide": 34, "slim": 19, "fork": 0, "add": 14, "edge": 0}
FORK, ADD = Part("fork"), Part("add", "+")  # where a residual leaves the trunk, and where it comes back


def draw(row: dict[str, Any], before: dict[str, Any] | None, style: str) -> str:
    """The drawing of a rung, in which all that `before` lacks has the colour of `style`."""
    known = set(parts(before if before else row))
    column = stack(parts(row))
    height = -column[-1].top + 4
    shapes = [_frame(column, known), *_bypasses(column, known), *_arrows(column)]
    shapes += [_new(_shape(placed), placed.part, known) for placed in column]
    moved = element("g", *shapes, transform=f"translate(0 {number(height)})", class_=f"arch {style}")
    names = ", ".join(f"{part.name} {part.detail}".strip() for part in parts(row) if part.name)
    return drawing(f"{row['name']}, from the bottom to the top: {names}", WIDTH, height + 4, moved)


def parts(row: dict[str, Any]) -> list[Part]:
    """The whole model, from the characters to the logits."""
    if row["block"] == "none":
        table = Part("box", "table", "one row per character")
        return [Part("end", "character"), table, Part("end", "next-character logits")]
    edge = [Part("edge", f"× {row['n_layers']}")] if row["n_layers"] > 1 else []
    final = [Part("slim", "LayerNorm", place="final")] if row["block"] == "PreLNBlock" else []
    return [
        Part("end", "characters"),
        *dropped(row, Part("box", "embedding", f"token + position, {row['d_model']}")),
        *edge,
        *block(row),
        *edge,
        *final,
        Part("slim", "linear, tied"),  # its weights are the token embedding's
        Part("end", "next-character logits"),
    ]


def block(row: dict[str, Any]) -> list[Part]:
    """What is repeated: attention, and an MLP except in the first rungs."""
    heads, width, middle = row["n_heads"], row["d_model"], row["d_ff"]
    many = heads > 1
    attention = Part("heads" if many else "box", "attention", f"{heads} head{'s' * many} of {width // heads}")
    if row["block"] == "attention":
        return [attention]
    mlp = Part("wide" if middle > width else "box", "MLP", f"{width} → {middle} → {width}")
    return sublayer(row, attention) + sublayer(row, mlp)


def sublayer(row: dict[str, Any], layer: Part) -> list[Part]:
    """A layer, with the residual and the norm where its block puts them (see nn/blocks.py)."""
    match row["block"]:
        case "ResidualBlock":
            return [FORK, *dropped(row, layer), ADD]
        case "PostLNBlock":
            return [FORK, *dropped(row, layer), ADD, Part("slim", "LayerNorm", place="after")]
        case "PreLNBlock":
            return [FORK, Part("slim", "LayerNorm", place="before"), *dropped(row, layer), ADD]
    return dropped(row, layer)


def dropped(row: dict[str, Any], layer: Part) -> list[Part]:
    """A layer, and dropout on what it puts out if the rung has any."""
    return [layer, Part("slim", f"dropout {row['dropout']:g}")] if row["dropout"] else [layer]


def stack(column: list[Part]) -> list[Placed]:
    """Put the parts on top of one another, the first at the bottom, at y = 0."""
    placed: list[Placed] = []
    for part in column:
        gap = SHORT_GAP if part.kind in ("fork", "edge") else GAP
        bottom = placed[-1].top - gap if placed else 0.0
        placed.append(Placed(part, bottom - HEIGHT[part.kind], bottom))
    return placed


def _new(shape: str, part: Part, known: set[Part]) -> str:
    """The two ends are on every drawing; anything else is new if the rung before does not have it."""
    old = not shape or part in known or part.kind == "end"
    return shape if old else element("g", shape, class_="new")


def _shape(placed: Placed) -> str:
    """The part itself: a word, a circle with a plus, or a box with one or two lines in it."""
    part, top, bottom = placed.part, placed.top, placed.bottom
    if part.kind in ("fork", "edge"):
        return ""
    if part.kind == "end":
        return text(CENTRE, bottom - 2, part.name, class_="detail")
    if part.kind == "add":
        y = (top + bottom) / 2
        plus = line(CENTRE - 4, y, CENTRE + 4, y, class_="flow") + line(CENTRE, y - 4, CENTRE, y + 4, class_="flow")
        return element("circle", cx=CENTRE, cy=y, r=(bottom - top) / 2, class_="box") + plus
    return _boxes(placed) + _words(placed)


def _boxes(placed: Placed) -> str:
    """One box, or several behind one another: the heads of an attention that has many."""
    width = WIDE_BOX if placed.part.kind == "wide" else BOX
    height = placed.bottom - placed.top
    shifts = (6, 3, 0) if placed.part.kind == "heads" else (0,)
    return "".join(
        element(
            "rect",
            x=CENTRE - width / 2 + by,
            y=placed.top - by,
            width=width,
            height=height,
            rx=4,
            class_="box",
        )
        for by in shifts
    )


def _words(placed: Placed) -> str:
    if not placed.part.detail:
        return text(CENTRE, placed.bottom - 5.5, placed.part.name)
    detail = text(CENTRE, placed.bottom - 6, placed.part.detail, class_="detail")
    return text(CENTRE, placed.bottom - 19, placed.part.name) + detail


def _arrows(column: list[Placed]) -> list[str]:
    """From each part to the next one up; no head where the next is only a point on the line."""
    arrows = []
    for below, above in itertools.pairwise(column):
        arrows.append(line(CENTRE, below.top, CENTRE, above.bottom, class_="flow"))
        if above.part.kind not in ("fork", "edge"):
            head = f"M{CENTRE} {number(above.bottom)}l-3.5 6h7z"
            arrows.append(element("path", d=head, class_="head"))
    return arrows


def _bypasses(column: list[Placed], known: set[Part]) -> list[str]:
    """The residuals: from each fork, out to the left, up past the layer, and into the side of the plus."""
    forks = [placed.top for placed in column if placed.part == FORK]
    joins = [placed for placed in column if placed.part == ADD]
    paths = []
    for fork, join in zip(forks, joins, strict=True):
        y, side = (join.top + join.bottom) / 2, CENTRE - HEIGHT["add"] / 2
        route = f"M{CENTRE} {number(fork)}H{BYPASS + 6}q-6 0 -6 -6V{number(y + 6)}q0 -6 6 -6H{number(side)}"
        head = element("path", d=f"M{number(side)} {number(y)}l-6 -3.5v7z", class_="head")
        paths.append(_new(element("path", d=route, class_="flow") + head, ADD, known))
    return paths


def _frame(column: list[Placed], known: set[Part]) -> str:
    """The frame around what is repeated, and how often it is."""
    edges = [placed for placed in column if placed.part.kind == "edge"]
    if not edges:
        return ""
    (left, right), bottom, top = FRAME, edges[0].bottom, edges[1].top
    frame = element("rect", x=left, y=top, width=right - left, height=bottom - top, rx=8, class_="repeat")
    times = text((right + WIDTH) / 2, (top + bottom) / 2 + 4, edges[0].part.name)
    return _new(frame + times, edges[0].part, known)
