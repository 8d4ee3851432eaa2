"""The ladder's page and the SVG helpers it is drawn with."""

import html.parser
import itertools
import math
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from classiclm.commands import ladder_drawing, svg
from classiclm.commands.ladder_report import render

BASELINES = {"uniform": 4.17, "unigram": 3.31, "trigram table": 1.98, "4-gram table": 1.97}
TOPOLOGIES = [  # name, block, n_layers, n_heads, d_ff, dropout
    ("bigram table", "none", 0, 0, 0, 0.0),
    ("one attention head", "attention", 1, 1, 0, 0.0),
    ("multi-head", "attention", 1, 4, 0, 0.0),
    ("+ MLP", "PlainBlock", 1, 4, 64, 0.0),
    ("three blocks", "PlainBlock", 3, 4, 64, 0.0),
    ("+ residual", "ResidualBlock", 3, 4, 64, 0.0),
    ("+ wide MLP", "ResidualBlock", 3, 4, 256, 0.0),
    ("post-LN", "PostLNBlock", 3, 4, 256, 0.0),
    ("pre-LN", "PreLNBlock", 3, 4, 256, 0.0),
    ("+ dropout", "PreLNBlock", 3, 4, 256, 0.1),
    ("deeper", "PreLNBlock", 6, 4, 256, 0.1),
    ("scaled up", "PreLNBlock", 6, 8, 512, 0.1),
]


def make_row(rung: int, **changes: Any) -> dict[str, Any]:
    """A plausible row of ladder.json, with a curve of the full fifty points."""
    name, block, n_layers, n_heads, d_ff, dropout = TOPOLOGIES[rung - 1]
    loss = 2.6 - 0.0913 * rung
    curve = [[40 * i, loss + 2 * math.exp(-i / 4), loss + 2 * math.exp(-i / 5)] for i in range(50)]
    row = {
        "rung": rung,
        "name": name,
        "idea": f"Idea of rung {rung}.",
        "params": 1000 * rung + 7,
        "val_loss": loss,
        "bits_per_char": loss / math.log(2),
        "seconds": 7.0 * rung,
        "sample": f"\n  Sample {rung}:\n    to be, or " + "not to be " * 15,
        "curve": curve,
        "block": block,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "d_model": 64 if rung < 12 else 128,
        "d_ff": d_ff,
        "dropout": dropout,
    }
    return row | changes


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [make_row(rung) for rung in range(1, 13)]


def parse(page: str) -> ElementTree.Element:
    return ElementTree.fromstring(page)


def by_class(root: ElementTree.Element, tag: str, name: str) -> list[ElementTree.Element]:
    return [node for node in root.iter(tag) if name in node.get("class", "").split()]


def words(node: ElementTree.Element) -> str:
    return " ".join(node.itertext())


def wide_bars(root: ElementTree.Element) -> ElementTree.Element:
    return by_class(root, "div", "wide")[0]


# The page


def test_page_is_well_formed_and_small(rows):
    page = render(rows, BASELINES, "plays", "2,000 steps")
    root = parse(page)
    html.parser.HTMLParser().feed(page)
    assert page.startswith("<!DOCTYPE html>")
    assert [node.text for node in root.iter("h2")] == [
        "What each rung reaches",
        "How they learn",
        "What each rung adds",
        "What they write",
    ]
    assert "plays · 2,000 steps" in words(root)
    assert len(page) < 300_000


def test_page_needs_nothing_else(rows):
    page = render(rows, BASELINES, "plays", "")
    tags = {node.tag for node in parse(page).iter()}
    assert not tags & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"https?:|//\w|url\(|@import|\bsrc=|\bhref=", page)


def test_every_drawing_has_a_name(rows):
    root = parse(render(rows, BASELINES, "plays", ""))
    drawings = [node for node in root.iter("svg") if "plot" not in node.get("class", "")]
    assert len(drawings) == 2 * 2 + 12 + 12  # two charts for two screens, small curves, architectures
    for node in drawings:
        assert node.get("role") == "img"
        assert node[0].tag == "title"
        assert node[0].text


def test_no_element_but_void_ones_closes_itself(rows):
    """`<p/>` is fine as XML, but opens a paragraph in HTML."""
    page = render([make_row(1, sample="", idea="")], {}, "", "")
    closed = set(re.findall(r"<(\w+)[^<>]*/>", page))
    assert closed <= {"meta", "rect", "line", "circle", "path", "polyline"}


def test_hostile_text_is_escaped():
    evil = "<script>alert('1')</script>\x00\ud800 & \"x\" </pre></svg></title></style>"
    row = make_row(2, name=evil, idea=evil, sample=evil)
    page = render([row], {evil: 3.0}, evil, evil)
    root = parse(page)
    page.encode("utf-8")
    shown = evil.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")
    assert not list(root.iter("script"))
    assert next(root.iter("pre")).text == "\n" + shown
    assert shown in words(next(root.iter("h3")))


def test_every_rung_has_a_bar_a_curve_a_card_and_a_sample(rows):
    root = parse(render(rows, BASELINES, "plays", ""))
    cards, samples = list(root.iter("article")), list(root.iter("pre"))
    charts = by_class(root, "div", "wide")
    assert len(cards) == len(samples) == 12
    for row, card, sample in zip(rows, cards, samples, strict=True):
        loss, label = f"{row['val_loss']:.3f}", f"{row['rung']:\u2007>2} {row['name']}"
        for chart in charts:
            assert [node.text for node in chart.iter("text")].count(label) == 1
        assert [node.text for node in charts[0].iter("text")].count(loss) == 1
        assert words(card.find("h3")).split() == [str(row["rung"]), *row["name"].split()]
        assert card.find("p").text == row["idea"]
        assert loss in [node.text for node in card.iter("dd")]
        assert f"{row['params']:,}" in [node.text for node in card.iter("dd")]
        assert sample.text == "\n" + row["sample"]  # the first newline is the one that a browser drops


@pytest.mark.parametrize("screen", ["wide", "narrow"])
def test_bars_are_in_proportion_to_the_loss(rows, screen):
    rows[4]["val_loss"] = 2.5  # not every idea helps
    chart = by_class(parse(render(rows, BASELINES, "plays", "")), "div", screen)[0]
    bars = by_class(chart, "rect", "bar")
    losses = [row["val_loss"] for row in rows]
    widths = [float(bar.get("width")) for bar in bars]
    assert [float(bar.get("data-value")) for bar in bars] == losses
    assert [width / widths[0] for width in widths] == pytest.approx([x / losses[0] for x in losses], abs=2e-3)
    assert sorted(range(12), key=widths.__getitem__) == sorted(range(12), key=losses.__getitem__)
    assert len({bar.get("x") for bar in bars}) == 1


@pytest.mark.parametrize("screen", ["wide", "narrow"])
def test_baselines_are_on_the_scale_of_the_bars(rows, screen):
    chart = by_class(parse(render(rows, BASELINES, "plays", "")), "div", screen)[0]
    first, last = (by_class(chart, "rect", "bar")[i] for i in (0, -1))
    values, widths = ([float(bar.get(key)) for bar in (first, last)] for key in ("data-value", "width"))
    pixels = (widths[0] - widths[1]) / (values[0] - values[1])
    marks = by_class(chart, "line", "mark")
    assert [float(mark.get("data-value")) for mark in marks] == sorted(BASELINES.values())
    for mark in marks:
        expected = float(first.get("x")) + widths[0] + (float(mark.get("data-value")) - values[0]) * pixels
        assert float(mark.get("x1")) == float(mark.get("x2")) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("screen", ["wide", "narrow"])
def test_labels_of_close_baselines_do_not_overlap(rows, screen):
    close = {f"baseline {i}": 2 + 0.01 * i for i in range(6)} | {"uniform": 4.17, "unigram": 4.16}
    chart = by_class(parse(render(rows, close, "plays", "")), "div", screen)[0]
    width = float(next(chart.iter("svg")).get("viewBox").split()[2])
    labels = [
        (float(node.get("x")), float(node.get("y")), svg.text_width(node.text))
        for node in chart.iter("text")
        if node.text.rsplit(" ", 1)[0] in close
    ]
    assert len(labels) == 8
    assert all(x + size <= width for x, _, size in labels)
    for (x, y, size), (other_x, other_y, other) in itertools.combinations(labels, 2):
        assert abs(y - other_y) >= svg.FONT or x + size <= other_x or other_x + other <= x


def test_curves_skip_what_was_not_measured(rows):
    for row in rows:
        for point in row["curve"][1::2]:
            point[2] = None
    rows[2]["curve"] = [[step, train, None] for step, train, _ in rows[2]["curve"]]
    chart = by_class(parse(render(rows, {}, "plays", "")), "div", "wide")[1]
    points = [len(node.get("points").split()) for node in chart.iter("polyline")]
    assert points == [25, 25, 0] + [25] * 9


@pytest.mark.parametrize("rungs", [[1], [12], [2, 5, 9], [8, 9]])
def test_a_subset_of_the_rungs(rungs):
    root = parse(render([make_row(rung) for rung in rungs], {}, "plays", ""))
    assert len(list(root.iter("article"))) == len(rungs)
    assert len(by_class(wide_bars(root), "rect", "bar")) == len(rungs)
    assert not by_class(root, "line", "mark")


def test_curves_of_one_point_or_none():
    odd = [make_row(1, curve=[]), make_row(2, curve=[[0, 4.0, None]]), make_row(3, curve=[[0, 4.0, 4.1]])]
    for row in odd:
        assert "nan" not in render([row], {}, "plays", "")
    parse(render(odd, BASELINES, "plays", ""))


# The architectures


def spelled(rung: int) -> list[str]:
    return [part.name for part in ladder_drawing.parts(make_row(rung)) if part.kind != "fork"]


def test_topologies_are_spelled_as_the_blocks_compute():
    inner = {rung: spelled(rung)[3:-3] for rung in (5, 6, 8)}  # between the edges of what is repeated
    assert spelled(1) == ["character", "table", "next-character logits"]
    assert spelled(3) == ["characters", "embedding", "attention", "linear, tied", "next-character logits"]
    assert spelled(4)[2:-2] == inner[5] == ["attention", "MLP"]
    assert inner[6] == ["attention", "+", "MLP", "+"]
    assert inner[8] == ["attention", "+", "LayerNorm", "MLP", "+", "LayerNorm"]
    layer = ["LayerNorm", "attention", "dropout 0.1", "+", "LayerNorm", "MLP", "dropout 0.1", "+"]
    assert spelled(10)[2:-1] == ["dropout 0.1", "× 3", *layer, "× 3", "LayerNorm", "linear, tied"]


@pytest.mark.parametrize(
    ("rung", "new"),
    [
        (2, ["embedding", "attention", "linear, tied"]),
        (3, ["attention"]),
        (4, ["MLP"]),
        (5, ["× 3"]),
        (6, []),  # two arrows and two plus signs: no words
        (7, ["MLP"]),
        (8, ["LayerNorm", "LayerNorm"]),
        (9, ["LayerNorm", "LayerNorm", "LayerNorm"]),
        (10, ["dropout 0.1", "dropout 0.1", "dropout 0.1"]),
        (11, ["× 6"]),
        (12, ["embedding", "attention", "MLP"]),
    ],
)
def test_what_is_new_stands_out(rung, new):
    root = parse(ladder_drawing.draw(make_row(rung), make_row(rung - 1), "hue-1"))
    marked = by_class(root, "g", "new")
    texts = [node for group in marked for node in group.iter("text") if not node.get("class")]
    assert sorted(node.text for node in texts) == sorted(new)
    assert len(marked) == (4 if rung == 6 else len(new))


def test_nothing_is_new_without_a_rung_before():
    assert not by_class(parse(ladder_drawing.draw(make_row(9), None, "")), "g", "new")


@pytest.mark.parametrize("rung", range(1, 13))
def test_words_fit_in_their_boxes(rung):
    """Measured a little tighter than in the charts, which have room to spare."""
    for placed in ladder_drawing.stack(ladder_drawing.parts(make_row(rung))):
        widths = {"wide": ladder_drawing.WIDE_BOX, "end": ladder_drawing.WIDTH}
        width = widths.get(placed.part.kind, ladder_drawing.BOX)
        assert 0.55 * 12 * len(placed.part.name) <= width
        assert 0.55 * 10.5 * len(placed.part.detail) <= width


def test_arrows_end_at_boxes():
    row = make_row(9)
    column = ladder_drawing.stack(ladder_drawing.parts(row))
    for below, above in itertools.pairwise(column):
        assert above.top <= above.bottom < below.top
    root = parse(ladder_drawing.draw(row, None, ""))
    joints = [float(node.get("cy")) for node in root.iter("circle")]
    ends = [float(match[1]) for node in root.iter("path") if (match := re.search(r"V(\S+)q", node.get("d")))]
    assert ends == [pytest.approx(y + 6, abs=0.11) for y in joints]  # the corner is a radius below the arrow


# The helpers


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 4.17), (1.43, 2.98), (0, 2000), (-3, 7), (0.001, 0.0042)])
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_ticks_are_nice(low, high, count):
    ticks = svg.nice_ticks(low, high, count)
    step = (high - low) / count if len(ticks) < 2 else ticks[1] - ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    if len(ticks) > 1:
        assert any(mantissa == pytest.approx(nice) for nice in (1, 2, 5))
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    assert count / 2 - 1 <= len(ticks) <= 2 * count + 1


def test_ticks_of_an_empty_range():
    assert svg.nice_ticks(2, 2) == [2]
    assert svg.nice_ticks(0, 4.2) == [0, 1, 2, 3, 4]


def test_tick_labels_have_the_decimals_of_the_step():
    assert svg.tick_labels([0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert svg.tick_labels([0, 1000]) == ["0", "1,000"]
    assert svg.tick_labels([0.05 * i for i in range(3)]) == ["0.00", "0.05", "0.10"]


def test_chart_maps_corners_to_corners():
    corners = [(0, 3), (10, 3), (10, 1), (0, 1)]  # clockwise from the top left
    chart = parse(svg.line_chart([svg.Series("a", corners)], title="t", x_axis="x", y_axis="y"))
    plot = by_class(chart, "svg", "plot")[0]
    width, height = float(plot.get("width")), float(plot.get("height"))
    points = [tuple(map(float, point.split(","))) for point in next(plot.iter("polyline")).get("points").split()]
    flat = [value for point in points for value in point]
    assert flat == pytest.approx([0, 0, width, 0, width, height, 0, height], abs=0.11)
    grid = [node for node in chart.iter("line") if node.get("x1") == node.get("x2")]
    assert float(grid[0].get("x1")) == float(plot.get("x"))
    assert float(grid[-1].get("x1")) == pytest.approx(float(plot.get("x")) + width, abs=0.11)


def test_chart_keeps_to_the_ranges_it_is_given():
    line = [svg.Series("a", [(0, 100.0), (5, 2.0)])]
    plot = by_class(parse(svg.line_chart(line, title="t", x_range=(0, 10), y_range=(1, 3))), "svg", "plot")[0]
    x, y = next(plot.iter("polyline")).get("points").split()[-1].split(",")
    assert float(x) == pytest.approx(float(plot.get("width")) / 2, abs=0.11)
    assert float(y) == pytest.approx(float(plot.get("height")) / 2, abs=0.11)


@pytest.mark.parametrize("width", [960, 360])
def test_empty_charts_are_well_formed(width):
    zero = svg.bar_chart([svg.Bar("zero", 0.0)], [svg.Mark("none", 0.0)], title="t", axis="", width=width)
    empty = [svg.bar_chart([], title="t", axis="", width=width), svg.line_chart([], title="t", width=width)]
    for drawing in (zero, *empty):
        parse(drawing)  # raises if it is not XML
        assert "nan" not in drawing
        assert "inf" not in drawing
    assert "zero" in zero
    assert "none" in zero


def test_spread_moves_labels_apart_and_no_further():
    assert svg.spread([10, 40, 80], 15, 0, 100) == [10, 40, 80]
    assert svg.spread([50, 50], 10, 0, 100) == [45, 55]
    assert svg.spread([99, 98, 0], 10, 0, 100) == [100, 90, 0]
    placed = svg.spread([30, 31, 29, 30.5, 90], 12, 0, 100)
    assert all(b - a >= 12 - 1e-9 for a, b in itertools.pairwise(sorted(placed)))
    assert sorted(range(5), key=placed.__getitem__) == [2, 0, 3, 1, 4]


def test_lanes_keep_flags_apart():
    assert svg.lanes([0, 100, 200], [50, 50, 50]) == [0, 0, 0]
    assert svg.lanes([0, 10, 20], [50, 50, 50]) == [2, 1, 0]
    assert svg.lanes([0, 40, 60], [50, 50, 50]) == [2, 1, 0]


def test_element_escapes_attributes_and_names():
    assert svg.element("a", "b", class_="x", stroke_width=1.25, data_x='"<&') == (
        '<a class="x" stroke-width="1.2" data-x="&quot;&lt;&amp;">b</a>'
    )
