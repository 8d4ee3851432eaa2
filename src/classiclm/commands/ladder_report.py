"""The page that `classiclm ladder` leaves behind: what each rung adds to a small model, and what it buys.

`render` is a pure function from the rows of ladder.json to one HTML file that needs nothing else: no script,
no font, no network. The page is also well-formed XML, so that a test can read it strictly.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from classiclm.commands import ladder_drawing, svg
from classiclm.commands.svg import Bar, Mark, Series, element, escape

Row = dict[str, Any]  # one rung, as in ladder.json
Range = tuple[float, float]

WIDE, PHONE = 960, 360  # a chart is drawn at both widths, and the page shows the one that fits
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # the browser itself keeps the page off the network
TITLE = "From a table of bigrams to a GPT"
TRAINING, VALIDATION = 1, 2  # the columns of a curve, after the step

STYLE = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  -webkit-text-size-adjust: 100%; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
main { max-width: 1160px; margin: 0 auto; padding: 56px 40px 72px; }
h1, h2 { font: 600 25px/1.2 Charter, "Iowan Old Style", Palatino, Georgia, serif; }
h1 { font-size: 40px; letter-spacing: -.01em; margin: 0 0 12px; }
h2 { margin: 64px 0 6px; }
h3 { font-size: 16px; margin: 0; }
p { margin: 0; max-width: 68ch; text-wrap: pretty; }
.lead { font-size: 19px; }
.settings, .note, figcaption, dt { color: var(--muted); font-size: 14px; }
.settings { margin-top: 14px; padding-top: 12px; border-top: 1px solid var(--rule); max-width: none; }
.note { margin-bottom: 22px; max-width: 90ch; text-wrap: balance; }
.legend { margin: 30px 0 16px; }
.narrow { display: none; }
.cards { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); }
.cards.samples { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.panels { gap: 22px 16px; }
figure { margin: 0; }
figcaption b, h3 b { color: var(--ink); font-weight: 600; }
.number { font-weight: 700; margin-right: .35em; font-variant-numeric: tabular-nums; }
.card { border: 1px solid var(--rule); border-top: 3px solid currentColor; border-radius: 3px;
  padding: 14px 14px 12px; break-inside: avoid; }
.card > * { color: var(--ink); }
.card .idea { font-size: 14px; line-height: 1.45; margin: 4px 0 12px; }
.rung { display: grid; grid-row: span 4; grid-template-rows: subgrid; row-gap: 0; }
.rung > svg { align-self: end; max-width: 244px; margin: 0 auto; }
dl { display: grid; grid-template-columns: auto 1fr; align-content: start; gap: 1px 8px; margin: 0 0 18px; }
dt, dd { font-size: 14px; white-space: nowrap; margin: 0; }
dd { text-align: right; font-variant-numeric: tabular-nums; }
.card pre { margin: 8px 0 0; font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 28px 18px 48px; }
  h1 { font-size: 31px; } h2 { font-size: 22px; margin-top: 48px; } .lead { font-size: 17px; }
  .wide { display: none; } .narrow { display: block; }
  .cards.panels { grid-template-columns: 1fr 1fr; } .panel svg text { font-size: 15px; }
}
@media print {
  main { padding: 0; } h2 { margin-top: 36px; }
  h2, .note { break-after: avoid; } figure { break-inside: avoid; }
  .cards, .cards.panels { grid-template-columns: repeat(4, 1fr); gap: 10px; }
  .cards.samples { grid-template-columns: repeat(3, 1fr); }
  .card .idea, dt, dd { font-size: 10px; } .card pre { font-size: 9px; } h3, figcaption { font-size: 12px; }
}
"""


def render(rows: list[Row], baselines: dict[str, float], corpus: str, settings: str) -> str:
    """The whole page. `baselines` are reference losses in nats per character, drawn across the bars."""
    sections = [
        _header(rows, corpus, settings),
        _losses(rows, baselines),
        _curves(rows),
        _architectures(rows),
        _samples(rows),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", escape(TITLE)),
        element("style", svg.STYLE + ladder_drawing.STYLE + STYLE),
    )
    page = element("html", head, element("body", element("main", *sections)), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _header(rows: Sequence[Row], corpus: str, settings: str) -> str:
    lead = (
        "A language model built up one idea at a time: every rung adds one thing to the rung before it, "
        "and all of them learn to predict the next character of the same text."
    )
    return element(
        "header",
        element("h1", escape(TITLE)),
        _paragraph(lead, "lead"),
        _paragraph(" · ".join(filter(None, [corpus, settings])), "settings"),
    )


def _paragraph(content: str, style: str) -> str:
    return element("p", escape(content), class_=style)


def _section(title: str, note: str, *content: str) -> str:
    return element("section", element("h2", escape(title)), _paragraph(note, "note"), *content)


def _both(chart: Callable[[int], str]) -> str:
    """The same chart for a screen and for a phone."""
    wide, narrow = (element("div", chart(width), class_=style) for width, style in ((WIDE, "wide"), (PHONE, "narrow")))
    return element("figure", wide, narrow)


def _losses(rows: Sequence[Row], baselines: dict[str, float]) -> str:
    bars = [Bar(_label(row), row["val_loss"], _hue(row)) for row in rows]
    marks = [Mark(name, value) for name, value in baselines.items()]
    title = "Validation loss of every rung, as bars"
    axis = "validation loss, nats per character"
    best = min(rows, key=lambda row: row["val_loss"])
    note = (
        f"Shorter is better. The best rung, {best['name']}, needs {best['val_loss']:.3f}\u00a0nats "
        f"({best['bits_per_char']:.2f} bits) per character of text that it has never seen."
    )
    chart = _both(lambda width: svg.bar_chart(bars, marks, title=title, axis=axis, width=width))
    return _section("What each rung reaches", note, chart)


def _curves(rows: Sequence[Row]) -> str:
    """All validation curves on one chart, then each rung's own with its training loss and the rung before."""
    steps = (0.0, max((step for row in rows for step, *_ in row["curve"]), default=1))
    seen = [loss for row in rows for _, loss in _points(row, VALIDATION)]
    losses = _loss_range(rows, seen)
    note = "Validation loss while they train."
    if seen and max(seen) > losses[1]:
        note += f" Above {losses[1]:.1f}, where all fall steeply in their first steps, the lines are cut off."
    chart = _both(lambda width: _curve_chart(rows, width, steps, losses))
    lower = _loss_range(rows, [*seen, *(loss for row in rows for _, loss in _points(row, TRAINING))])
    panels = [_panel(row, before, steps, lower) for row, before in _with_before(rows)]
    legend = "One by one: validation (thick), training (thin), and validation of the rung before (grey)."
    small = element("div", *panels, class_="cards panels")
    return _section("How they learn", note, chart, _paragraph(legend, "note legend"), small)


def _curve_chart(rows: Sequence[Row], width: int, steps: Range, losses: Range) -> str:
    """On a phone, where names would leave no room for lines, only the numbers of the rungs."""
    names = [_label(row) if width >= svg.NARROW else str(row["rung"]) for row in rows]
    lines = [Series(name, _points(row, VALIDATION), _hue(row)) for name, row in zip(names, rows, strict=True)]
    title = "Validation loss of every rung against the training step"
    return svg.line_chart(
        lines,
        title=title,
        x_axis="training step",
        y_axis="nats per character",
        width=width,
        height=200 + width / 4,
        x_range=steps,
        y_range=losses,
    )


def _loss_range(rows: Sequence[Row], losses: Sequence[float]) -> Range:
    """From the lowest loss to half a nat above the worst last one: higher up, all lines fall side by side."""
    if not losses:
        return 0.0, 1.0
    curves = [_points(row, VALIDATION) or _points(row, TRAINING) for row in rows]
    last = max(points[-1][1] for points in curves if points)
    return min(losses) - 0.05, min(max(losses), last + 0.5)


def _points(row: Row, column: int) -> list[tuple[float, float]]:
    """The (step, loss) of a curve where it was measured."""
    measured = [(point[0], point[column]) for point in row["curve"] if point[column] is not None]
    return [(step, loss) for step, loss in measured if math.isfinite(loss)]


def _with_before(rows: Sequence[Row]) -> list[tuple[Row, Row | None]]:
    """Each rung with the one before it on this page."""
    return list(zip(rows, [None, *rows[:-1]], strict=True))


def _panel(row: Row, before: Row | None, steps: Range, losses: Range) -> str:
    lines = [Series(f"training loss of {row['name']}", _points(row, TRAINING), f"thin {_hue(row)}")]
    if before:
        lines.append(Series(f"validation loss of {before['name']}", _points(before, VALIDATION), "ghost"))
    lines.append(Series(f"validation loss of {row['name']}", _points(row, VALIDATION), _hue(row)))
    title = f"Training and validation loss of {row['name']}"
    chart = svg.line_chart(lines, title=title, width=225, height=140, x_range=steps, y_range=losses, labels=False)
    return element("figure", element("figcaption", _numbered(row)), chart, class_="panel")


def _architectures(rows: Sequence[Row]) -> str:
    note = "Read each drawing from the bottom to the top. What the rung before does not have is in colour."
    cards = [_architecture(row, before) for row, before in _with_before(rows)]
    return _section("What each rung adds", note, element("div", *cards, class_="cards"))


def _architecture(row: Row, before: Row | None) -> str:
    facts = {"parameters": f"{row['params']:,}", "loss": f"{row['val_loss']:.3f}"}
    if before:
        facts["change"] = f"{row['val_loss'] - before['val_loss']:+.3f}".replace("-", "−")
    facts["bits per character"] = f"{row['bits_per_char']:.2f}"
    facts["trained in"] = _duration(row["seconds"])
    terms = [element("dt", escape(name)) + element("dd", escape(value)) for name, value in facts.items()]
    return element(
        "article",
        element("h3", _numbered(row)),
        _paragraph(row["idea"], "idea"),
        element("dl", *terms),
        ladder_drawing.draw(row, before, _hue(row)),
        class_=f"card rung {_hue(row)}",
    )


def _samples(rows: Sequence[Row]) -> str:
    cards = [
        # A browser drops the first newline of a <pre>: this one, and not the sample's.
        element(
            "figure",
            element("figcaption", element("b", _numbered(row)), f" · loss {row['val_loss']:.3f}"),
            element("pre", "\n" + escape(row["sample"])),
            class_=f"card {_hue(row)}",
        )
        for row in rows
    ]
    note = "Text that each rung makes up, one character after the other."
    return _section("What they write", note, element("div", *cards, class_="cards samples"))


def _numbered(row: Row) -> str:
    return element("span", str(row["rung"]), class_="number") + escape(row["name"])


def _label(row: Row) -> str:
    """A number and a name for a chart; the figure space keeps one digit as wide as two."""
    return f"{row['rung']:\u2007>2} {row['name']}"


def _hue(row: Row) -> str:
    return f"hue-{row['rung']}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s" if seconds >= 10 else f"{seconds:.1f} s"
