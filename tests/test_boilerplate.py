"""Frames of publishers: what Project Gutenberg and CNN put around a text goes, and the text itself never does."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from classiclm.data.boilerplate import gutenberg, news
from classiclm.data.cleaning import whitespace
from samples import BOILERPLATE, Writer, make_cnn, make_gutenberg

BOOK = Writer("book").text(12)
STARTS = [
    "*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***",
    "*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***",
    "***START OF THE PROJECT GUTENBERG EBOOK A BOOK***",
    "** START OF THIS PROJECT GUTENBERG ETEXT, A BOOK **",
    "*** Start of the Project Gutenberg EBook of A Book, Vol. 1",
    "*** START OF THIS PROJECT GUTENBERG EBOOK A VERY LONG TITLE\nTHAT GOES ON, AND ON ***",
    "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
    "*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.03.17.94*END*",
    "***START**THE SMALL PRINT!**FOR ETEXTS**START***\nWhy?\n*END*THE SMALL PRINT! FOR PUBLIC ETEXTS*END*",
]
ENDS = [
    "*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n\nSTART: FULL LICENSE",
    "***END OF THIS PROJECT GUTENBERG EBOOK A BOOK***",
    "End of Project Gutenberg's A Book, by Nobody",
    "End of the Project Gutenberg EBook of A Book\n\n*** END OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\nlicence",
    "End of The Project Gutenberg Etext of A Book\n\n***START**THE SMALL PRINT!**FOR ETEXTS**\nWhy?\n"
    "*END*THE SMALL PRINT! FOR ETEXTS*Ver.12.12.00*END*\n" + "[Portions of this header are copyright.]\n" * 9,
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_frame_of_a_book_goes(start, end, newline):
    text = f"The Project Gutenberg EBook of A Book\n\nTitle: A Book\n\n{start}\n\n\n{BOOK}\n\n\n{end}\n\nmore\n"
    assert gutenberg(text.replace("\n", newline)) == BOOK


def test_one_mark_is_enough():
    assert gutenberg(f"header\n\n{STARTS[0]}\n\n{BOOK}") == BOOK
    assert gutenberg(f"{BOOK}\n\n{ENDS[0]}") == BOOK


@pytest.mark.parametrize(
    "text",
    [
        "",
        BOOK,
        BOOK.replace("\n\n", "\r\n\r\n* * *\r\n\r\n"),
        f"*** START ***\n\nIt was the start of the project. {BOOK}\n\n*** END OF PART ONE ***\n",
        f"{BOOK}\n\nHe printed books for Project Gutenberg, and the end of Project Gutenberg's work was far.",
        f"Produced by A. Person\n\n{BOOK}",
    ],
)
def test_a_book_without_marks_stays(text):
    assert gutenberg(text) == text


def test_stars_within_a_book_stay():
    body = f"{BOOK}\n\n*** \n\n*** END OF THE FIRST PART ***\n\n{BOOK}"
    assert gutenberg(f"{STARTS[0]}\n\n{body}\n\n{ENDS[0]}") == body


def test_books_joined_in_one_file_are_all_kept():
    framed = f"{STARTS[0]}\n\n{BOOK}\n\n{ENDS[2]}\n\n"
    assert gutenberg(framed + framed).count(BOOK) == 2


CREDITS = [
    "Produced by A. Person and the Online Distributed\nProofreading Team at https://www.pgdp.net",
    "E-text prepared by A. Person",
    "This eBook was produced by A. Person",
    "Transcribed by A. Person from the 1890 edition",
    "Produced by A. Person\n\n(This file was produced from images generously made available by a library)",
    "[Transcriber's Note: spelling was kept.]",
    "Transcriber’s Notes\n\nSpelling was kept.",
    "Produced by A. Person\n\n\nTranscriber's note:\n\nSpelling was kept.",
]


@pytest.mark.parametrize("credit", CREDITS)
def test_credits_in_front_of_a_book_go(credit):
    assert gutenberg(f"{STARTS[0]}\n\n{credit}\n\n\n\n{BOOK}\n\n{ENDS[0]}") == BOOK


@pytest.mark.parametrize("first", ["Produced in haste, this book", "A Note by the author", "Prepared by fate"])
def test_a_long_first_paragraph_stays_even_if_it_begins_like_credits(first):
    body = f"{first} {'and so on ' * 80}\n\n{BOOK}"
    assert gutenberg(f"{STARTS[0]}\n\n{body}\n\n{ENDS[0]}") == body


def test_notes_of_the_transcriber_at_the_end_go():
    assert gutenberg(f"{STARTS[0]}\n\n{BOOK}\n\nTranscriber's Notes:\n\nA comma was added.\n\n{ENDS[0]}") == BOOK
    early = f"A Title\n\nTranscriber's Notes:\n\n{BOOK[:1000].strip()}"  # whatever it is, it is most of the text
    assert gutenberg(f"{STARTS[0]}\n\n{early}\n\n{ENDS[0]}") == early


def test_the_sample_of_gutenberg_has_only_its_books_left(tmp_path):
    for path in sorted(make_gutenberg(tmp_path).iterdir()):
        text = path.read_bytes().decode("utf-8-sig")
        left = gutenberg(text)
        assert [mark for mark in BOILERPLATE["gutenberg"] if mark in left] == []
        assert left.startswith("CHAPTER I\n") or left == "Too short."
        assert left in text.replace("\r\n", "\n")


ARTICLE = Writer("article").text(3)


@pytest.mark.parametrize(
    "dateline",
    [
        "(CNN) -- ", "(CNN)", "(CNN) ", "(CNN) — ", "(CNN Business)", "(CNNMoney) -- ", "London (CNN) -- ",
        "LONDON, England (CNN) -- ", "Rio de Janeiro, Brazil (CNN)", "New York (CNN Business) ", "St. Paul (CNN) - ",
        "By Anna Abbott, CNN\n\n(CNN) -- ", "Story highlights\n(CNN) ", "\n\n(CNN)",
    ],
)  # fmt: skip
def test_datelines_go(dateline):
    assert news(dateline + ARTICLE) == ARTICLE


@pytest.mark.parametrize(
    "line",
    [
        "READ MORE: Ten things to see", "READ: Ten things to see", "Read More", "Story highlights", "STORY HIGHLIGHTS",
        "Follow Anna Abbott on Twitter", "Follow @CNNPolitics on Twitter and Facebook.",
        "CNN's Anna Abbott, Bruno Barnes Jr. and Clara Calder contributed to this report.",
        "CNN’s Anna Abbott contributed to this story", "Click here to see the pictures",
        "Copyright 2013 CNN. All rights reserved. This material may not be published, broadcast, rewritten, or"
        " redistributed.",
        "Copyright 2009 The Associated Press. All rights reserved.", "© 2015 Cable News Network. All rights reserved.",
        "E-mail to a friend",
    ],
)  # fmt: skip
def test_lines_that_are_not_the_article_go(line):
    assert whitespace(news(f"{ARTICLE}\n{line}\n{ARTICLE}")).replace("\n\n", "\n") == f"{ARTICLE}\n{ARTICLE}".replace(
        "\n\n", "\n"
    )
    assert news(f"{ARTICLE}\n{line}").strip() == ARTICLE


def test_a_credit_that_ends_an_article_of_one_line_goes():
    assert news("It rained. CNN's Anna Abbott contributed to this report.") == "It rained."


@pytest.mark.parametrize(
    "text",
    [
        ARTICLE,
        "The network (CNN) said so.",
        "She told CNN (the network) -- and us.",
        "He said: follow the river on Sunday.\nFollow me on the road.",
        "Rivers contributed to this report of a flood.",
        "Read more books, says the teacher.",
        "You must click here to see it.",
        "The copyright of 2013 was CNN's. All rights reserved.",
        "In 2013, All rights reserved signs were common.",
        "A long sentence about what happened in the city of London when people saw it (CNN) -- no dateline.",
        "",
    ],
)
def test_an_article_that_speaks_of_these_things_stays(text):
    assert news(text) == text


def test_the_sample_of_cnn_has_only_its_articles_left(tmp_path):
    with make_cnn(tmp_path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        left = news(row["text"])
        assert [mark for mark in BOILERPLATE["cnn"] if mark in left] == []
        assert len(left) > 0.8 * len(row["text"]) - 30


@given(st.lists(st.sampled_from([*STARTS, *ENDS, *CREDITS, "(CNN) -- ", "READ MORE: x", BOOK, "*", "\n", " "])))
def test_nothing_is_ever_added(pieces):
    text = "\n\n".join(pieces)
    assert gutenberg(text) == text or gutenberg(text) in text
    assert len(news(text)) <= len(text)
