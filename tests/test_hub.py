"""Streams of the hub, shown on local parquet and JSON through the same loader: exact positions, groups, and errors."""

import json
import subprocess
import sys

import pytest

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from classiclm.data import hub as module  # noqa: E402
from classiclm.data.hub import HubSet, commit_of, open_stream, read_rows  # noqa: E402
from classiclm.data.readers import Notes, Reading  # noqa: E402
from classiclm.data.sources import resolve  # noqa: E402
from classiclm.errors import BAD_INPUT, Error  # noqa: E402

SET = HubSet("someone/books", revision="0" * 40)
COMMIT = "0123456789abcdef" * 2 + "01234567"
PLAIN = Reading(text="paragraph")
GROUPED = Reading(text="paragraph", group="book_name")
ROWS = [
    ("", "Before"),
    *[(f"Emma, paragraph {i}.", "Emma") for i in range(5)],
    ("Persuasion, paragraph 0.", "Persuasion"),
    *[(f"Ulysses, paragraph {i}.", "Ulysses") for i in range(9)],
    *[(None, "Ulysses"), ("Once more.", "Ulysses"), (None, None), ("No book.", None), ("None either.", None)],
    *[("Emma again.", "Emma"), (None, "Emma")],
]


def write_parquet(folder):
    """The rows in three files, whose borders and row groups cut through the books."""
    for i in range(3):
        part = ROWS[i * 8 : (i + 1) * 8] if i < 2 else ROWS[16:]
        columns = {"paragraph": [text for text, _ in part], "book_name": [book for _, book in part]}
        columns |= {"id": list(range(len(part)))}
        schema = pa.schema([("paragraph", pa.string()), ("book_name", pa.string()), ("id", pa.int64())])
        pq.write_table(pa.table(columns, schema), folder / f"{i}.parquet", row_group_size=3)
    return sorted(str(path) for path in folder.glob("*.parquet"))


@pytest.fixture
def parquet(tmp_path):
    files = write_parquet(tmp_path)
    load = datasets.load_dataset
    return lambda: load("parquet", data_files=files, split="train", streaming=True)


@pytest.fixture
def jsonl(tmp_path):
    lines = [json.dumps({"paragraph": text, "book_name": book}) for text, book in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / "rows.jsonl")]
    return lambda: datasets.load_dataset("json", data_files=files, split="train", streaming=True)


def read(stream, reading, position=None, notes=None):
    position = json.loads(json.dumps(position))
    return list(read_rows(stream, SET, reading, "books", position, notes or Notes()))


def test_every_row_with_text_is_a_document_without_a_group(parquet):
    documents = [document for document, _ in read(parquet(), PLAIN)]
    assert [document.text for document in documents] == [text for text, _ in ROWS if text]
    assert documents[0].name == "books:2"


def test_neighbouring_rows_of_a_group_make_one_document_joined_by_blank_lines(parquet):
    documents = [document for document, _ in read(parquet(), GROUPED)]
    assert [document.name for document in documents] == ["books:2", "books:7", "books:8", "books:20", "books:22"]
    assert documents[1].text == "Persuasion, paragraph 0."
    assert documents[0].text == "\n\n".join(f"Emma, paragraph {i}." for i in range(5))
    assert documents[2].text.endswith("paragraph 8.\n\nOnce more.")
    assert documents[3].text == "No book.\n\nNone either."


@pytest.mark.parametrize("reading", [PLAIN, GROUPED])
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("max_chars", [8 << 20, 50, 10])
def test_reading_on_from_any_position_gives_the_rest_and_counts_nothing_twice(
    request, monkeypatch, reading, kind, max_chars
):
    use_limit(monkeypatch, max_chars)
    stream, whole_notes = request.getfixturevalue(kind), Notes()
    whole, counts = [], []
    for document, position in read_rows(stream(), SET, reading, "books", None, whole_notes):
        whole.append((document, json.loads(json.dumps(position))))
        counts.append(dict(whole_notes.counts))
    assert len(whole) >= 5
    for i, (_, position) in enumerate(whole):
        notes = Notes()
        assert places(read(stream(), reading, position, notes)) == places(whole[i + 1 :])
        together = {what: n + counts[i].get(what, 0) for what, n in notes.counts.items()}
        assert {**counts[i], **together} == dict(whole_notes.counts)


def places(pairs):
    """Documents and how far they reach; the state itself may be written in several ways."""
    return [(document, position["row"], position["pieces"]) for document, position in pairs]


def use_limit(monkeypatch, max_chars):
    """Documents of at most so many characters."""
    monkeypatch.setattr(module, "MAX_CHARS", max_chars)


def test_long_documents_come_in_pieces_that_hold_the_whole_text(monkeypatch, parquet):
    use_limit(monkeypatch, 10)
    notes = Notes()
    pieces = [document.text for document, _ in read(parquet(), PLAIN, None, notes)]
    assert max(map(len, pieces)) <= 10
    long = sum(len(text or "") > 10 for text, _ in ROWS)
    assert dict(notes.counts) == {"records without text": 4, "documents cut because they are too long": long}
    assert "".join(pieces).replace("\n", "") == "".join(text for text, _ in ROWS if text)


def test_a_group_that_grows_too_long_is_closed_between_two_rows(monkeypatch, parquet):
    use_limit(monkeypatch, 50)
    texts = [document.text for document, _ in read(parquet(), GROUPED)]
    assert texts[0] == "Emma, paragraph 0.\n\nEmma, paragraph 1."
    assert texts[2] == "Emma, paragraph 4."


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_missing_column_is_answered_with_those_there_are(request, kind):
    stream = request.getfixturevalue(kind)
    for reading, flag in ((Reading(text="text"), "--text"), (Reading(text="paragraph", group="title"), "--group")):
        with pytest.raises(Error, match="paragraph, book_name") as caught:
            read(stream(), reading)
        assert caught.value.code == BAD_INPUT
        assert flag in str(caught.value)


def test_a_long_text_is_cut_behind_a_line_break_where_there_is_one(monkeypatch, tmp_path):
    use_limit(monkeypatch, 10)
    pq.write_table(pa.table({"text": ["one\ntwo\nthree\nfour", "x" * 23]}), tmp_path / "a.parquet")
    stream = open_stream(HubSet(str(tmp_path)), "books", ())
    texts = [document.text for document, _ in read(stream, Reading())]
    assert texts == ["one\ntwo\n", "three\nfour", "x" * 10, "x" * 10, "xxx"]


def test_streaming_does_not_import_torch(tmp_path):
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "a.parquet")
    code = (
        "import sys\n"
        "from classiclm.data.hub import HubSet, open_stream\n"
        "rows = list(open_stream(HubSet(sys.argv[1]), 'books', ()))\n"
        "print(len(rows), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]


def test_line_ends_of_other_systems_become_plain_ones(tmp_path):
    pq.write_table(pa.table({"text": ["a\r\nb\r\n"]}), tmp_path / "a.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    assert read(stream, Reading())[0][0].text == "a\nb\n"


def test_without_a_network_the_error_says_how_to_get_the_files_elsewhere():
    for ask in (lambda: commit_of(HubSet("someone/books"), "gutenberg"), lambda: open_stream(SET, "gutenberg", ())):
        with pytest.raises(Error) as caught:
            ask()
        assert caught.value.code == BAD_INPUT
        assert "cannot be reached" in str(caught.value)
        assert "hf download --repo-type dataset someone/books" in str(caught.value)
        assert "gutenberg=DIR" in str(caught.value)
        assert "\n" not in str(caught.value)


PROBLEMS = [
    (RuntimeError("Dataset scripts are no longer supported, but found openwebtext.py"), "is made by a script"),
    (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist\non the Hub."), "is not on the hub"),
    (ValueError("Bad split: trian. Available splits: ['train']"), "Bad split"),
    (ConnectionError("reset by peer"), "cannot be reached (reset by peer)"),
    (pa.ArrowInvalid("Parquet magic bytes not found"), "cannot be read (Parquet magic"),
]


@pytest.mark.parametrize(("problem", "why"), PROBLEMS)
def test_what_the_hub_refuses_is_one_line_that_names_the_alternatives(monkeypatch, problem, why):
    def load_dataset(*_, **__):
        raise problem

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(Error) as caught:
        open_stream(SET, "gutenberg", ("sedthh/gutenberg_english", "another/one"))
    assert why in str(caught.value)
    assert "also in sedthh/gutenberg_english and another/one" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == BAD_INPUT


def test_a_stream_that_breaks_on_the_way_is_an_error_of_input(parquet):
    class Breaking:
        column_names = None

        def __iter__(self):
            yield {"paragraph": "one"}
            raise ConnectionError("reset")

        def state_dict(self):
            return {}

    with pytest.raises(Error, match="reset") as caught:
        read(Breaking(), PLAIN)
    assert caught.value.code == BAD_INPUT


def test_a_bug_of_our_own_is_not_dressed_up_as_bad_input():
    class Odd:
        column_names = None

        def __iter__(self):
            yield {"paragraph": "one"}
            raise KeyError("ours")

        def state_dict(self):
            return {}

    with pytest.raises(KeyError):
        read(Odd(), PLAIN)


def test_a_commit_is_taken_as_it_is_and_a_branch_is_looked_up(monkeypatch):
    import huggingface_hub

    asked = []

    class Api:
        def dataset_info(self, id, revision):
            asked.append((id, revision))
            return type("Info", (), {"sha": COMMIT})()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert commit_of(HubSet("a/b", revision="f" * 40), "a") == "f" * 40
    assert commit_of(HubSet("a/b"), "a") == commit_of(HubSet("a/b", revision="main"), "a") == COMMIT
    assert asked == [("a/b", None), ("a/b", "main")]


def test_a_known_corpus_is_streamed_at_the_commit_that_its_description_names(monkeypatch, parquet):
    opened = []

    def load_dataset(*arguments, **options):
        opened.append((*arguments, options["revision"]))
        return parquet()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.delenv("CLASSICLM_DATA", raising=False)
    origin = resolve("gutenberg", revision=COMMIT)
    assert origin.describe()["revision"] == COMMIT
    documents = list(origin.read(None, Notes()))
    assert documents[0][0].name == "gutenberg:2"
    assert places(origin.read(documents[2][1], Notes())) == places(documents[3:])
    assert set(opened) == {("Navanjana/Gutenberg_books", None, COMMIT)}
    assert resolve(f"gutenberg@{COMMIT}").describe() == origin.describe()
