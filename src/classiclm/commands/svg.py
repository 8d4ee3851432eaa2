"""Charts as inline SVG, with the standard library only: what the reports draw with.

Everything is a pure function that returns a string of well-formed markup. A drawing names its colours by
class, and `STYLE` gives the classes their colours in light and dark, so a page needs `<style>{STYLE}</style>`
and no script. Sizes are CSS pixels of a drawing `width` wide; for phones, a page draws a chart a second time,
narrower than `NARROW`, and shows the one that fits.
"""

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

NARROW = 500  # below this width, a bar's label goes above the bar and not beside it
FONT = 12
BAR = 15  # thickness of a bar
LANE = 17  # height of one line of reference labels

# (in light, in dark): from the first to the last, the contrast with the background grows in both.
HUES = [
    ("#c98a12", "#8a6be0"),
    ("#cf7a1c", "#a066dc"),
    ("#d36a28", "#b463d2"),
    ("#d45937", "#c663c2"),
    ("#cf4a4a", "#d566ae"),
    ("#c33d60", "#e06c98"),
    ("#b13577", "#e87582"),
    ("#9a308c", "#ed816e"),
    ("#80309c", "#f0905c"),
    ("#6531a3", "#f2a24e"),
    ("#4b32a0", "#f4b748"),
    ("#302c8c", "#f6cf50"),
]


def _palette(scheme: int) -> str:
    return "".join(f".hue-{i} {{ color: {hue[scheme]}; }}\n" for i, hue in enumerate(HUES, start=1))


STYLE = f"""
:root {{ --paper: #ffffff; --ink: #1d2026; --muted: #666d78; --rule: #e2e4e8; --panel: #f7f7f8; }}
{_palette(0)}
@media screen and (prefers-color-scheme: dark) {{
:root {{ --paper: #15171b; --ink: #e8e9ec; --muted: #979eaa; --rule: #31353c; --panel: #1c1f24; }}
{_palette(1)}
}}
svg {{ display: block; width: 100%; height: auto; }}
svg text {{ font: {FONT}px system-ui, sans-serif; fill: var(--ink); font-variant-numeric: tabular-nums; }}
svg .grid {{ stroke: var(--rule); }}
svg text.muted {{ fill: var(--muted); }}
svg .bar, svg .dot {{ fill: currentColor; }}
svg .line {{ fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }}
svg .line.thin {{ stroke-width: 1; opacity: .75; }}
svg .line.ghost {{ color: var(--muted); stroke-width: 1.25; opacity: .6; }}
svg .leader {{ fill: none; stroke: currentColor; stroke-width: 1; opacity: .55; }}
svg .mark {{ stroke: var(--ink); stroke-dasharray: 3 3; opacity: .6; }}
svg .bed {{ stroke: var(--paper); stroke-width: 3; opacity: .5; }}
svg .halo {{ paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }}
"""

# What HTML and XML cannot hold: control characters and lone surrogates. An untrained model does write them.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class Scale:
    """The straight line from data to pixels: `low` is drawn at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


@dataclass(frozen=True)
class Series:
    """A line of a chart. `style` is a list of classes: a hue, and "thin" or "ghost" for what stands back."""

    label: str
    points: Sequence[tuple[float, float]]
    style: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar: its label, its length in the units of the axis, and a CSS class."""

    label: str
    value: float
    style: str = ""


@dataclass(frozen=True)
class Mark:
    """A reference value, drawn as a line across all bars."""

    label: str
    value: float


def escape(content: object) -> str:
    """Any text, safe in an element and in a quoted attribute."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(content)))


def element(tag: str, *children: str, **attributes: object) -> str:
    """One element: the children are markup, the attributes are escaped; stroke_width becomes stroke-width.

    Without children it closes itself, as SVG and the void elements of HTML may; an empty <p> has a child "".

    >>> element("rect", width=2.50, class_="bar")
    '<rect width="2.5" class="bar"/>'
    """
    pairs = ((name.rstrip("_").replace("_", "-"), value) for name, value in attributes.items())
    start = tag + "".join(f' {name}="{_attribute(value)}"' for name, value in pairs)
    return f"<{start}>{''.join(children)}</{tag}>" if children else f"<{start}/>"


def _attribute(value: object) -> str:
    return number(value) if isinstance(value, int | float) else escape(value)


def number(value: float) -> str:
    """A number as a coordinate: a tenth of a pixel is enough, and keeps a page of curves small."""
    return f"{value:.1f}".removesuffix(".0")


def text(x: float, y: float, content: object, **attributes: object) -> str:
    """Words at a point."""
    return element("text", escape(content), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> str:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, **attributes)


def drawing(title: str, width: float, height: float, *children: str) -> str:
    """A whole SVG that fills the width it is given; the title is what a screen reader says."""
    box = f"0 0 {number(width)} {number(height)}"
    return element("svg", element("title", escape(title)), *children, viewBox=box, role="img")


def text_width(content: str, size: float = FONT) -> float:
    """About how wide a text is drawn, on the safe side: there is no font here to measure."""
    return 0.58 * size * len(content)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten: nice_ticks(0, 4.2) -> [0, 1, 2, 3, 4]."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    # The nearest nice step by ratio: two neighbours meet where the square is their product.
    meet = ((1, 1 * 2), (2, 2 * 5), (5, 5 * 10), (10, math.inf))
    step = power * next(nice for nice, square in meet if (raw / power) ** 2 < square)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """All with the decimals that their step needs: [0, 0.5, 1] -> 0.0, 0.5, 1.0."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:,.{decimals}f}" for tick in ticks]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart to at least `gap`, within [low, high], as little as possible (in squares).

    With i gaps taken off the i-th label it is isotonic regression: neighbours out of order get their mean.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    pools: list[list[float]] = []
    for rank, i in enumerate(order):
        pools.append([wanted[i] - rank * gap])
        while len(pools) > 1 and fmean(pools[-2]) >= fmean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [fmean(pool) for pool in pools for _ in pool]
    ceiling = max(low, high - (len(flat) - 1) * gap)
    placed = {i: min(max(flat[rank], low), ceiling) + rank * gap for rank, i in enumerate(order)}
    return [placed[i] for i in range(len(wanted))]


def lanes(starts: Sequence[float], widths: Sequence[float]) -> list[int]:
    """How high (0 = lowest) each label flies, like a flag at the right of its pole; poles from left to right.

    A label is above every label whose pole stands under it: no two overlap, and no pole crosses a label.
    """
    result = [0] * len(starts)
    for i in reversed(range(len(starts))):
        under = [result[j] for j in range(i + 1, len(starts)) if starts[j] < starts[i] + widths[i]]
        result[i] = max(under, default=-1) + 1
    return result


def bar_chart(bars: Sequence[Bar], marks: Sequence[Mark] = (), *, title: str, axis: str, width: float = 960) -> str:
    """Horizontal bars from zero, each with its label and value, and the marks as labelled lines across them.

    A bar is a <rect class="bar"> and a mark a <line class="mark">, both with their data-value.
    """
    marks = sorted(marks, key=lambda mark: mark.value)
    stacked = width < NARROW
    left = 1 if stacked else 62 + max((text_width(bar.label) for bar in bars), default=0)
    scale = _bar_scale(bars, marks, left, width)
    heights = lanes([scale(mark.value) for mark in marks], [text_width(_flag(mark)) + 8 for mark in marks])
    top = LANE * (max(heights, default=-1) + 1) + 12
    pitch = BAR * (2.6 if stacked else 1.75)
    bottom = top + pitch * len(bars)
    rows = [(bar, top + pitch * i - BAR - 5) for i, bar in enumerate(bars, start=1)]
    flown = [(mark, top - LANE * height) for mark, height in zip(marks, heights, strict=True)]
    layers = [  # from the back to the front: a mark runs over the bars and under the words
        _grid_x(scale, top, bottom, axis),
        *(_bar(bar, y, scale) for bar, y in rows),
        *(_pole(mark, y, bottom, scale) for mark, y in flown),
        *(_bar_label(bar, y, left, stacked) for bar, y in rows),
        *(text(scale(mark.value) + 4, y - 6, _flag(mark), class_="muted") for mark, y in flown),
    ]
    return drawing(title, width, bottom + 46, *layers)


def _flag(mark: Mark) -> str:
    return f"{mark.label} {mark.value:.2f}"


def _bar_scale(bars: Sequence[Bar], marks: Sequence[Mark], left: float, width: float) -> Scale:
    """The widest scale at which every bar, and the flag of every mark, ends inside the drawing."""
    room = width - left - 2
    wants = [(bar.value, room) for bar in bars]
    wants += [(mark.value, max(room - text_width(_flag(mark)) - 4, room / 3)) for mark in marks]
    pixels = min((space / value for value, space in wants if value > 0), default=room)
    return Scale(0, room / pixels, left, left + room)


def _bar(bar: Bar, y: float, scale: Scale) -> str:
    size = {"width": scale(bar.value) - scale(0), "height": BAR, "rx": 2}
    tooltip = element("title", escape(f"{bar.label}: {bar.value:.3f}"))
    return element("rect", tooltip, x=scale(0), y=y, **size, class_=f"bar {bar.style}", data_value=str(bar.value))


def _bar_label(bar: Bar, y: float, zero: float, stacked: bool) -> str:
    """The label and the value: above the bar, or in two columns at its left."""
    value = f"{bar.value:.3f}"
    if stacked:
        return text(zero, y - 5, f"{bar.label}\u2002{value}", class_="halo")
    return text(0, y + 12, bar.label) + text(zero - 10, y + 12, value, text_anchor="end", class_="muted")


def _pole(mark: Mark, y: float, bottom: float, scale: Scale) -> str:
    """From beside the label down to the axis."""
    x = scale(mark.value)
    ends = {"x1": x, "y1": y - 15, "x2": x, "y2": bottom}
    bed = element("line", **ends, class_="bed")  # the dashes must show on a dark bar too
    return bed + element("line", **ends, class_="mark", data_value=str(mark.value))


def _grid_x(scale: Scale, top: float, bottom: float, name: str) -> str:
    """Vertical grid lines, their numbers below, and what they count."""
    ticks = nice_ticks(scale.low, scale.high, max(2, round((scale.end - scale.start) / 130)))
    parts = []
    for tick, label in zip(ticks, tick_labels(ticks), strict=True):
        x = scale(tick)
        # A number at the very edge is pulled inside: half of it would be cut off.
        half = text_width(label) / 2
        anchor = "start" if x < half else "end" if x > scale.end - half else "middle"
        parts.append(line(x, top, x, bottom, class_="grid"))
        parts.append(text(x, bottom + 16, label, text_anchor=anchor, class_="muted"))
    return "".join(parts) + (text(scale.start, bottom + 36, name, class_="muted") if name else "")


def _ticks_y(scale: Scale) -> list[tuple[float, str]]:
    """Where the horizontal grid lines are, and their numbers."""
    ticks = nice_ticks(scale.low, scale.high, max(3, round((scale.start - scale.end) / 55)))
    return [(scale(tick), label) for tick, label in zip(ticks, tick_labels(ticks), strict=True)]


def _grid_y(ticks: Sequence[tuple[float, str]], left: float, right: float, name: str) -> str:
    """Horizontal grid lines, their numbers at the left, and what they measure above them all."""
    parts = []
    for y, label in ticks:
        parts.append(line(left, y, right, y, class_="grid"))
        parts.append(text(left - 7, y + 4, label, text_anchor="end", class_="muted"))
    return "".join(parts) + (text(0, 12, name, class_="muted") if name else "")


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_axis: str = "",
    y_axis: str = "",
    width: float = 960,
    height: float = 420,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    labels: bool = True,
) -> str:
    """Lines over two axes, each named at its right end. What is outside the ranges is cut off at the frame.

    The plot is an inner <svg class="plot">, which does the cutting; its origin is the plot's top left corner.
    """
    top, bottom = (26.0 if y_axis else 8.0), height - (42 if x_axis else 22)
    y_scale = Scale(*_range(y_range, [y for one in series for _, y in one.points]), bottom, top)
    ticks = _ticks_y(y_scale)
    left = 10 + max([text_width(label) for _, label in ticks], default=0)
    right = width - (24 + max((text_width(one.label) for one in series), default=0) if labels else 8)
    x_scale = Scale(*_range(x_range, [x for one in series for x, _ in one.points]), left, right)
    behind = _grid_x(x_scale, top, bottom, x_axis) + _grid_y(ticks, left, right, y_axis)
    paths = [_path(one, x_scale, y_scale) for one in series]
    frame = {"x": left, "y": top, "width": right - left, "height": bottom - top}
    plot = element("svg", *paths, class_="plot", **frame) if paths else ""
    ends = _end_labels(series, x_scale, y_scale) if labels else ""
    return drawing(title, width, height, behind, plot, ends)


def _range(given: tuple[float, float] | None, values: Sequence[float]) -> tuple[float, float]:
    """The range to draw, never empty: a single value gets some room around it."""
    low, high = given or (min(values, default=0.0), max(values, default=1.0))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _path(one: Series, x_scale: Scale, y_scale: Scale) -> str:
    points = " ".join(f"{number(x_scale(x) - x_scale.start)},{number(y_scale(y) - y_scale.end)}" for x, y in one.points)
    return element("polyline", element("title", escape(one.label)), points=points, class_=f"line {one.style}")


def _end_labels(series: Sequence[Series], x_scale: Scale, y_scale: Scale) -> str:
    """The names at the right, moved apart, each joined to the last point of its line."""
    top, bottom, edge = y_scale.end, y_scale.start, x_scale.end
    ended = [one for one in series if one.points]
    ends = [(x_scale(one.points[-1][0]), y_scale(one.points[-1][1])) for one in ended]
    heights = spread([min(max(y, top), bottom) for _, y in ends], FONT + 3, top, bottom)
    parts = []
    for one, (x, y), beside in zip(ended, ends, heights, strict=True):
        bend = f"M{number(x)} {number(y)}H{number(edge + 4)}L{number(edge + 18)} {number(beside)}"
        if top <= y <= bottom:
            parts.append(element("path", d=bend, class_=f"leader {one.style}"))
            parts.append(element("circle", cx=x, cy=y, r=2.5, class_=f"dot {one.style}"))
        parts.append(text(edge + 22, beside + 4, one.label))
    return "".join(parts)
