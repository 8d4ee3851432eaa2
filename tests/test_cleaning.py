"""Cleaning: steps against ftfy itself and by example, and counts that add up."""

import json
import os
import pickle
import sys
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data import cleaning
from classiclm.data.cleaning import (
    STEP_NAMES,
    Cleaning,
    Effects,
    Step,
    clean,
    make_steps,
    run_step,
    short,
    unicode,
    whitespace,
)
from classiclm.data.documents import Document, Removal
from classiclm.errors import Error
from samples import BOILERPLATE, make_samples

ftfy = pytest.importorskip("ftfy")
CONFIG = ftfy.TextFixerConfig(uncurl_quotes=False, normalization="NFC")
ODD = st.sampled_from(
    list("ab z,.?!<>'\"#\n\t\r&;\x00\x1b\x7f“”‘’–—…éÉàÀÃÂâĳŉŐžŽßœ€™\xa0\x85\ufeffﬁＡ\u0301\u2028\ud800東й")
)


def documents(*texts):
    return [Document(text, f"file.txt:{i}") for i, text in enumerate(texts)]


def drop_short(text):
    return Removal("tiny") if len(text) < 3 else text


@settings(max_examples=500, deadline=None)
@given(st.lists(ODD | st.sampled_from(["Ã©", "â€™", "&amp;", "caf"]), max_size=14).map("".join))
def test_unicode_is_ftfy_where_it_passes_lines_over(text):
    expected = "".join(ftfy.fix_text(line, CONFIG, unescape_html="<" not in text) for line in text.splitlines(True))
    if not any(c in text for c in "\r\x85\u2028\x1b\x1c\x1d\x0b\x0c"):  # other ends of lines to splitlines
        assert unicode(text) == expected


@settings(max_examples=1000, deadline=None)
@given(st.text("ab ?!.éÉàÀÃÂâßŽžœĐ“”‘’–—…", max_size=12))
def test_accents_and_typographic_marks_are_left_as_ftfy_leaves_them(text):
    assert unicode(text) == ftfy.fix_text(text, CONFIG)


def test_unicode_repairs_and_composes_but_leaves_curly_quotes():
    assert unicode("It doesnâ€™t “matter”, cafe\u0301 &amp; bar") == "It doesn’t “matter”, café & bar"
    assert unicode("<b>fish &amp; chips</b>") == "<b>fish &amp; chips</b>"
    assert unicode("bell\x07 and\x00 nul\ufeff") == "bell and nul"


def test_plain_text_needs_no_ftfy(monkeypatch):
    monkeypatch.setattr(cleaning, "_fixer", None)  # a call would be an error
    text = "Plain — “typeset” — text, a naïve one.\n\tx = {1: 'a'}; y < z # 100%\n" * 3
    assert unicode(text) == text


def test_whitespace_keeps_what_is_inside_lines():
    text = "\ufeff\n \n  def f():  \n\treturn  1 \t\r\n\r\n\n \n\na\rb  c\xa0\n\n"
    assert whitespace(text) == "  def f():\n\treturn  1\n\na\nb  c"
    assert whitespace("a\n\nb\nc") == "a\n\nb\nc"


@given(st.text(" \t\r\n\ufeffab", max_size=40))
def test_whitespace_twice_is_whitespace_once_and_keeps_every_letter(text):
    once = whitespace(text)
    assert whitespace(once) == once
    assert "".join(once.split()) == "".join(text.replace("\ufeff", "").split())
    assert "\n\n\n" not in once


def test_short_counts_characters_and_keeps_the_limit_itself():
    assert short("é" * 10, 10) == "é" * 10
    assert short("é" * 9, 10) == Removal("short")


def test_effects_count_documents_characters_changes_and_reasons():
    upper = Step("upper", lambda text: text.replace("a", "bb"))
    stream, (first, second) = clean(documents("xay", "q", "  ", "aaa", "zzz"), [upper, Step("tiny", drop_short)])
    assert [document.text for document in stream] == ["xbby", "bbbbbb", "zzz"]
    assert (first.documents_in, first.documents_out, first.characters_in, first.characters_out) == (5, 4, 12, 14)
    assert (first.changed, first.removed) == (2, {"empty": 1})
    assert (second.documents_in, second.documents_out, second.changed, second.removed) == (4, 3, 0, {"tiny": 1})
    assert second.characters_in == first.characters_out
    assert first.examples["changed"] == {"document": "file.txt:0", "before": "xay", "after": "xbby"}
    assert second.examples["tiny"] == {"document": "file.txt:1", "before": "q", "after": ""}


def test_cleaning_is_lazy():
    def endless():
        while True:
            yield Document("text", "n")

    stream, (effects,) = clean(endless(), [Step("same", str)])
    assert next(stream).text == "text"
    assert effects.documents_in == 1


def test_an_example_shows_the_place_of_the_change():
    text = "x" * 5000 + "WRONG" + "y" * 5000
    effects = Effects("fix")
    list(run_step(Step("fix", lambda text: text.replace("WRONG", "right")), documents(text), effects))
    shown = effects.examples["changed"]
    assert "WRONG" in shown["before"]
    assert "right" in shown["after"]
    assert len(shown["before"]) <= 200 >= len(shown["after"])


def test_examples_of_texts_with_stray_bytes_can_be_written():
    effects = Effects("fix")
    list(run_step(Step("fix", drop_short), [Document("\udcff", "odd\udce9.txt")], effects))
    assert json.dumps(effects.to_json(), ensure_ascii=False).encode()


TEXTS = st.lists(st.text("ab ", max_size=5), max_size=12)


@given(TEXTS, TEXTS)
def test_effects_of_two_halves_merge_to_those_of_the_whole(a, b):
    def effects_of(docs):
        stream, effects = clean(docs, [Step("edit", lambda t: t.replace("ab", "b")), Step("tiny", drop_short)])
        list(stream)
        return effects

    everything = documents(*a, *b)
    whole, halves = effects_of(everything), [effects_of(everything[: len(a)]), effects_of(everything[len(a) :])]
    for total, one, two in zip(whole, *halves, strict=True):
        one.merge(Effects.from_json(json.loads(json.dumps(two.to_json()))))
        assert json.dumps(one.to_json()) == json.dumps(total.to_json())
        assert total.documents_in == total.documents_out + sum(total.removed.values())


def test_effects_of_different_steps_do_not_merge():
    with pytest.raises(ValueError, match="'a'"):
        Effects("b").merge(Effects("a"))


def test_steps_are_made_by_name_in_the_order_given_and_follow_the_settings():
    names = [name for name in STEP_NAMES if name not in ("exact", "near")]
    assert [step.name for step in make_steps(names[::-1], Cleaning())] == names[::-1]
    (step,) = make_steps(["short"], Cleaning(min_chars=3))
    assert step.edit("ab") == Removal("short")
    assert step.edit("abc") == "abc"


@pytest.mark.parametrize(("name", "near"), [("unicod", "unicode"), ("exakt", "exact"), ("signature", "signatures")])
def test_an_unknown_step_is_refused_with_the_nearest_name(name, near):
    with pytest.raises(Error, match=f"did you mean '{near}'") as error:
        make_steps(["unicode", name], Cleaning())
    assert error.value.code == 2


def test_steps_can_be_sent_to_another_process():
    steps = make_steps([name for name in STEP_NAMES if name not in ("exact", "near")], Cleaning())
    assert [step.name for step in pickle.loads(pickle.dumps(steps))] == [step.name for step in steps]


def test_a_missing_ftfy_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    monkeypatch.setattr(cleaning, "_fixer", cleaning._fixer.__wrapped__)
    with pytest.raises(Error, match=r"classiclm\[data\]") as error:
        unicode("â€™")
    assert error.value.code == 4


def _digest(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _make(folder):
    make_samples(folder)


def test_samples_are_equal_whenever_they_are_made(tmp_path):
    pytest.importorskip("pyarrow")
    pytest.importorskip("zstandard")
    paths = make_samples(tmp_path / "a")
    assert set(paths) == set(BOILERPLATE)
    process = get_context("spawn").Process(target=_make, args=(tmp_path / "b",))  # with another hash seed
    process.start()
    process.join()
    assert process.exitcode == 0
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    assert os.path.getsize(paths["cnn"]) > 60_000
