"""The live view and the plain lines: what a person is shown, read back from the console that it was drawn on."""

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from classiclm.train import progress
from classiclm.train.progress import Gauges, History, ProgressLog, format_bytes, say, sparkline, view

NO_GAUGES = Gauges()


def row(step, loss=1.5, **more):
    return {"step": step, "loss": loss, "tokens_per_s": 12345.6, **more}


def history_of(*rows):
    history = History()
    for each in rows:
        history.add(each)
    return history


def drawn(history, width=100, step=600, total=1000, remaining=None, gauges=NO_GAUGES, ascii_only=False):
    console = Console(record=True, force_terminal=True, width=width, file=io.StringIO())
    console.print(view("rung 3", step, total, history, remaining, gauges, ascii_only))
    return console.export_text().splitlines()


def test_the_view_says_how_far_how_good_and_how_fast():
    history = history_of(row(200, 3.0, val_loss=2.5), row(400, 2.0, val_loss=2.25), row(600, 1.0, val_loss=2.75))
    gauges = Gauges(flops_per_token=1e6, peak=4 * 12345.6e6, memory=lambda: 812 << 20)
    far, good, fast = drawn(history, remaining=187, gauges=gauges)
    assert far.startswith("rung 3 ")
    assert far.rstrip().endswith("600/1,000 steps  3:07 min to go")
    assert good.rstrip() == "loss 1.0000 █▅▁  val 2.7500 (best 2.2500 at step 400)"
    assert fast.rstrip() == "12,346 tokens/s, 25.0% of this machine's peak, 812 MiB in use"


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_bar_is_as_long_as_the_share_of_the_steps(share):
    console = Console(force_terminal=True, width=80, file=io.StringIO(), color_system="truecolor")
    pieces = list(console.render(view("a", round(1000 * share), 1000, History(), None)))
    whole = sum(piece.text.count("━") for piece in pieces)
    grey = sum(piece.text.count("━") for piece in pieces if "grey" in str(piece.style))
    assert whole > 50
    assert 1 - grey / whole == pytest.approx(share, abs=0.03)


def test_what_is_not_known_is_not_shown():
    far, good, fast = drawn(history_of(row(600)))
    assert "to go" not in far
    assert "val" not in good
    assert fast.rstrip() == "12,346 tokens/s"
    assert Gauges(flops_per_token=1e6).share(1.0) is None
    assert Gauges(peak=1e12).share(1.0) is None


def test_before_the_first_row_there_is_the_bar_alone():
    (far,) = drawn(History(), step=40)
    assert far.rstrip().endswith("40/1,000 steps")


@pytest.mark.parametrize("width", [20, 40, 60])
def test_on_a_narrow_terminal_no_line_is_broken(width):
    history = history_of(row(1, val_loss=1.0), row(600))
    lines = drawn(history, width, remaining=187, gauges=Gauges(1.0, 1e6, lambda: 3 << 30))
    assert len(lines) == 3
    assert max(map(len, lines)) <= width


def test_a_terminal_without_block_characters_gets_others():
    assert drawn(history_of(row(1, 3.0), row(2, 1.0)), ascii_only=True)[1].rstrip() == "loss 1.0000 @_"


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([], ""),
        ([5.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, math.nan, 0], "█ ▁"),
        ([math.inf, 1.0, 0.0], " █▁"),
        ([math.nan], " "),
    ],
)
def test_a_curve_in_one_line(values, line):
    assert sparkline(values, 30) == line


def test_a_long_curve_is_drawn_by_means():
    assert sparkline([0, 0, 14, 0, 7, 7], 3) == "▁██"
    assert sparkline([0] * 500 + [1] * 500, 4) == "▁▁██"


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(1, 40))
def test_a_curve_has_at_most_its_width_and_its_ends_are_the_extremes(values, width):
    line = sparkline(values, width)
    assert len(line) == min(width, len(values))
    assert set(line) <= set("▁▂▃▄▅▆▇█")
    if len(values) <= width and max(values) > min(values):
        assert line[values.index(max(values))] == "█"
        assert line[values.index(min(values))] == "▁"


def test_the_best_is_the_first_of_the_lowest():
    rows = [row(1, val_loss=3.0), row(2, val_loss=1.0), row(3), row(4, val_loss=1.0), row(5, val_loss=2.0)]
    history = history_of(*rows)
    assert history.best == (1.0, 2)
    assert history.val_loss == 2.0
    assert history.last == rows[-1]


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0 MiB"), (812 << 20, "812 MiB"), (1 << 30, "1.0 GiB"), (3 << 29, "1.5 GiB")]
)
def test_bytes_in_words(n, text):
    assert format_bytes(n) == text


def terminal():
    return Console(force_terminal=True, width=90, file=io.StringIO())


def test_a_live_view_draws_at_most_four_pictures_a_second_and_every_validation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = terminal()
    with ProgressLog("train", 1000, 0, console=console) as log:
        for step in range(1, 1001):
            now[0] += 0.01
            log.show(row(step, **({"val_loss": 2.0} if step == 500 else {})))
        pictures = console.file.getvalue().count("tokens/s") - 1  # one is in the line of the validation
    # The last is drawn once more around that line.
    assert 10 / 0.25 * 0.9 <= pictures <= 10 / 0.25 + 3
    assert "train: step 500/1000 loss 1.5000, val 2.0000" in console.file.getvalue()


def test_a_live_view_begins_where_the_run_goes_on_with_the_curve_so_far():
    console = terminal()
    with ProgressLog("train", 1000, 400, rows=[row(200, 3.0), row(400, 2.0)], console=console):
        text = console.file.getvalue()
    assert "400/1,000 steps" in text
    assert "loss 2.0000 █▁" in text


def test_a_warning_during_the_view_stands_above_it_and_stdout_is_left_alone(capsys):
    console = terminal()
    with ProgressLog("train", 10, 0, console=console) as log:
        log.show(row(1))
        say("warning: look out")
        print("product")
        log.show(row(2))
    assert "warning: look out\n" in console.file.getvalue()
    assert "product" not in console.file.getvalue()
    assert capsys.readouterr().out == "product\n"


def test_without_a_terminal_there_are_plain_lines_seldom_and_at_validations(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with ProgressLog("train", 300, 0) as log:
        for step in range(1, 301):
            now[0] += 0.125
            log.show(row(step, **({"val_loss": 2.0} if step in (50, 300) else {})))
    out, err = capsys.readouterr()
    assert out == ""
    shown = [line.split()[2] for line in err.splitlines()]
    assert shown == ["1/300", "50/300", "130/300", "210/300", "290/300", "300/300"]
    assert "\x1b" not in err


def test_all_processes_but_the_first_show_nothing(capsys):
    for console in (terminal(), Console(file=io.StringIO(), force_terminal=False)):
        with ProgressLog("train", 10, 0, shown=False, console=console) as log:
            log.show(row(1, val_loss=1.0))
        assert console.file.getvalue() == ""
    assert capsys.readouterr() == ("", "")
