"""What a name or path on the command line stands for, and documents of files from any position on."""

import dataclasses
import json
import shutil
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from classiclm.data import plays
from classiclm.data.cleaning import DUPLICATE_STEPS, Cleaning, make_steps
from classiclm.data.locate import find
from classiclm.data.readers import Notes, Reading
from classiclm.data.sources import SOURCES, LocalFiles, resolve
from classiclm.errors import BAD_INPUT, USAGE, Error

SIX = ("cnn", "enron", "gutenberg", "openwebtext", "wikipedia", "edu")


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    """A data folder and a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def failure(*arguments, **options):
    with pytest.raises(Error) as caught:
        resolve(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def texts(origin):
    return [document.text.strip() for document, _ in origin.read(None, Notes())]


# The table


def test_each_source_says_what_it_is_where_it_is_and_how_it_is_cleaned():
    assert set(SOURCES) == {*SIX, "shakespeare", "plays", "wikitext2", "multi30k"}
    for name, source in SOURCES.items():
        assert source.name == name
        assert source.about
        assert source.licence
        assert source.size > 0
        assert (source.hub is None) == (name not in SIX)
        plain = [step for step in source.steps if step not in DUPLICATE_STEPS]
        assert [step.name for step in make_steps(plain, Cleaning())] == plain
        assert not set(plain) & set(source.steps[len(plain) :])  # documents are compared after they are cleaned


def test_expected_tokens_are_a_plausible_share_of_the_size():
    for source in SOURCES.values():
        unpacked = 3_911_636 if source.name == "multi30k" else source.size
        assert source.tokens is None or 3 < unpacked / source.tokens < 5


def test_known_files_are_where_others_keep_them():
    places = [file.place for source in SOURCES.values() for file in source.files]
    assert places == ["shakespeare/input.txt", "wikitext2/train.txt", "multi30k/train.de.gz", "multi30k/train.en.gz"]


# Names


def test_a_known_corpus_is_found_as_a_folder_or_file_of_the_data_folder(own_folders):
    write(own_folders / "wikipedia" / "a" / "b.txt", "An article.")
    write(own_folders / "cnn.jsonl", json.dumps({"text": "News."}))
    for name, files in (("wikipedia", ["a/b.txt"]), ("cnn", ["cnn.jsonl"])):
        origin = resolve(name)
        assert [row["name"] for row in origin.describe()["files"]] == files
        assert origin.source == SOURCES[name]
        assert origin.steps == SOURCES[name].steps
        assert origin.reading == SOURCES[name].reading
        assert len(texts(origin)) == 1


def test_a_data_folder_with_signs_of_a_pattern_in_its_name_is_read(monkeypatch, tmp_path):
    write(tmp_path / "d[1]" / "cnn.jsonl", json.dumps({"text": "News."}))
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path / "d[1]"))
    assert texts(resolve("cnn")) == ["News."]


def test_a_name_with_a_path_reads_and_cleans_the_files_as_that_corpus(tmp_path):
    write(tmp_path / "rows.jsonl", '{"paragraph": "a", "book_name": "A"}\n{"paragraph": "b", "book_name": "A"}')
    origin = resolve(f"gutenberg={tmp_path / 'rows.jsonl'}")
    assert origin.name == "gutenberg"
    assert origin.steps == SOURCES["gutenberg"].steps
    assert texts(origin) == ["a\n\nb"]


def test_mail_of_enron_is_read_from_its_own_tree_and_from_tables(tmp_path):
    mail = "Message-ID: <1>\nFrom: a@enron.com\nTo: b@enron.com\nSubject: gas\n\nBuy gas.\n"
    write(tmp_path / "maildir" / "allen-p" / "inbox" / "1.", mail)
    write(tmp_path / "rows.jsonl", json.dumps({"text": mail}))
    for path in ("maildir", "rows.jsonl"):
        assert texts(resolve(f"enron={tmp_path / path}")) == [mail.strip()]
    assert resolve(f"enron={tmp_path / 'maildir'}").reading.format == "mail"
    assert resolve(f"enron={tmp_path / 'rows.jsonl'}").reading.format == "auto"


def test_a_path_is_read_as_it_is_and_named_after_its_folder_or_file(tmp_path):
    write(tmp_path / "letters" / "one.txt", "Dear Sir")
    write(tmp_path / "letters" / "two.txt", "Dear Madam")
    for path, name, files in (
        ("letters", "letters", ["one.txt", "two.txt"]),
        ("letters/one.txt", "one", ["one.txt"]),
        ("letters/*.txt", "letters", ["one.txt", "two.txt"]),
    ):
        origin = resolve(str(tmp_path / path))
        assert (origin.name, origin.source, origin.steps, origin.reading) == (name, None, (), Reading())
        assert [row["name"] for row in origin.describe()["files"]] == files


def test_flags_win_over_what_a_corpus_says(tmp_path):
    write(tmp_path / "rows.jsonl", '{"body": "a"}')
    origin = resolve(f"cnn={tmp_path / 'rows.jsonl'}", {"text": "body"}, ["whitespace"])
    assert origin.steps == ("whitespace",)
    assert texts(origin) == ["a"]
    assert resolve(str(tmp_path / "rows.jsonl"), {"text": "body"}, []).steps == ()


def test_a_missing_column_is_answered_with_those_there_are(tmp_path):
    write(tmp_path / "rows.jsonl", '{"body": "a", "title": "b"}')
    with pytest.raises(Error, match="body, title") as caught:
        texts(resolve(f"cnn={tmp_path / 'rows.jsonl'}"))
    assert caught.value.code == BAD_INPUT


@pytest.mark.parametrize(
    ("argument", "code", "hint"),
    [
        ("wikipdia", USAGE, "did you mean 'wikipedia'"),
        ("wikipdia=./files", USAGE, "did you mean 'wikipedia'"),
        ("./nothing", BAD_INPUT, "./nothing"),
        ("cnn=./nothing", BAD_INPUT, "./nothing"),
        ("shakespeare@abc", USAGE, "shakespeare"),
        ("wikipedia", BAD_INPUT, "wikipedia=DIR"),  # no network here
        ("wikitext2", BAD_INPUT, "wikitext2/train.txt"),
        ("pyproject.toml", USAGE, "./pyproject.toml"),
    ],
)
def test_what_cannot_be_found_is_an_error_with_a_remedy(argument, code, hint):
    if argument.startswith("wikipedia"):
        pytest.importorskip("huggingface_hub")
    error = failure(argument)
    assert error.code == code
    assert hint in str(error)


def test_a_path_that_has_an_equals_sign_is_a_path(monkeypatch, tmp_path):
    write(tmp_path / "a=b.txt", "text")
    assert texts(resolve(str(tmp_path / "a=b.txt"))) == ["text"]
    monkeypatch.chdir(tmp_path)
    assert texts(resolve("./a=b.txt")) == ["text"]


def test_plays_are_made_on_this_machine_in_blocks(tmp_path):
    origin = resolve("plays")
    assert "\n\n".join(texts(origin)) == plays.generate(1_000_000, 1).strip()
    shutil.rmtree(tmp_path / "cache")
    assert resolve("plays").describe() == origin.describe()


def test_known_texts_have_as_many_documents_as_they_have_blocks_or_lines(monkeypatch):
    monkeypatch.undo()
    if not all(find(file) for name in ("shakespeare", "multi30k") for file in SOURCES[name].files):
        pytest.skip("needs CLASSICLM_DATA")
    assert len(texts(resolve("shakespeare"))) == 7222
    assert len(texts(resolve("multi30k"))) == 58_000


# Descriptions and positions


def test_a_description_depends_on_the_content_and_not_on_the_place(tmp_path):
    for folder in ("one", "two"):
        write(tmp_path / folder / "x" / "a.txt", "text")
        write(tmp_path / folder / "b.txt", "more")
    one, two = (resolve(str(tmp_path / folder)).describe() for folder in ("one", "two"))
    assert one == two
    assert str(tmp_path) not in json.dumps(one)
    assert one["size"] == 8
    write(tmp_path / "two" / "b.txt", "less")
    assert resolve(str(tmp_path / "two")).describe()["sha256"] != one["sha256"]


def test_a_description_of_very_many_files_does_not_list_them(tmp_path):
    file = write(tmp_path / "a.txt", "text")
    origin = LocalFiles("many", None, Reading(), (), tuple((f"{i}.txt", file) for i in range(1001)))
    described = origin.describe()
    assert (described["files"], described["n_files"], described["size"]) == (None, 1001, 4004)
    assert described["sha256"] != dataclasses.replace(origin, files=origin.files[::-1]).describe()["sha256"]


def test_a_file_that_is_gone_is_named(tmp_path):
    origin = resolve(str(write(tmp_path / "a.txt", "text")))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(Error, match=r"a\.txt") as caught:
        origin.describe()
    assert caught.value.code == BAD_INPUT


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=st.lists(st.lists(st.sampled_from(["a", "b", None]), max_size=4), min_size=1, max_size=4))
def test_reading_on_from_any_position_gives_the_rest_and_counts_nothing_twice(tmp_path, files):
    paths = []
    for i, rows in enumerate(files):
        lines = "\n".join(json.dumps({"text": row}) for row in rows)
        paths.append((f"{i}.jsonl", write(tmp_path / f"{i}.jsonl", lines)))
    origin, notes = LocalFiles("rows", None, Reading(), (), tuple(paths)), Notes()
    whole, counts = [], []
    for document, position in origin.read(None, notes):
        whole.append((document, position))
        counts.append(Counter(notes.counts))
    assert [document.text for document, _ in whole] == [row for rows in files for row in rows if row]
    for i, (_, position) in enumerate(whole):
        rest = Notes()
        assert list(origin.read(json.loads(json.dumps(position)), rest)) == whole[i + 1 :]
        assert counts[i] + Counter(rest.counts) == Counter(notes.counts)
