"""Mail: raw messages in many forms give their body, by hand-made cases, the standard library's writer, and fuzzing."""

import random
from email.message import EmailMessage
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.data.cleaning import Cleaning, clean, make_steps
from classiclm.data.documents import Document
from classiclm.data.mail import forwards, mail, replies, signatures, strip_html
from samples import BOILERPLATE, make_enron

HEAD = "From: a@example.com\nTo: b@example.com\nSubject: Lunch\n"
BODY = "Dear Anna,\n\nshall we meet at noon?\n\nBruno"


def read(data: bytes) -> str:
    """A file's bytes as the reader gives them."""
    return data.decode("utf-8", "surrogateescape")


@pytest.mark.parametrize("charset", ["utf-8", "iso-8859-1", "windows-1252", "koi8-r", "shift_jis"])
@pytest.mark.parametrize("encoding", ["8bit", "base64", "quoted-printable"])
def test_charsets_and_transfer_encodings_are_decoded(charset, encoding):
    text = {"koi8-r": "Привет, мир = 5\n", "shift_jis": "東京 = 5\n"}.get(charset, "Málaga, señor = 5\n")
    message = EmailMessage()
    message["From"], message["Subject"] = "a@example.com", "x"
    message.set_content(text, charset=charset, cte=encoding)
    assert mail(read(message.as_bytes())) == text


@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]) | st.just("\n"), max_size=200))
def test_what_the_standard_library_writes_is_read_back(text):
    message = EmailMessage()
    message["From"], message["Subject"] = "a@example.com", "x"
    message.set_content(text)
    message.add_alternative("<p>other</p>", subtype="html")
    message.add_attachment(b"\x00\xff", maintype="application", subtype="octet-stream", filename="x.bin")
    message.add_attachment("a,b\n", subtype="csv", filename="x.csv")
    message.add_attachment("notes", filename="notes.txt")
    expected = text if text.strip() else "other"
    assert mail(read(message.as_bytes())).split() == expected.split()


def part(kind, text):
    return f"--b\nContent-Type: {kind}\n\n{text}\n"


MULTI = HEAD + "MIME-Version: 1.0\nContent-Type: multipart/{}; boundary=b\n\npreamble\n"
MESSAGES = {
    "plain": (HEAD + "\n" + BODY, BODY),
    "mbox": ("From a@example.com Mon May 14 2001\n" + HEAD + "\n" + BODY, BODY),
    "html": (HEAD + "Content-Type: text/html\n\n<p>Fish &amp;\nchips</p><p>Peas</p>", "Fish & chips\n\nPeas"),
    "html first": (MULTI.format("alternative") + part("text/html", "<p>no") + part("text/plain", "yes") + "--b--",
                   "yes"),
    "empty plain": (MULTI.format("alternative") + part("text/plain", " ") + part("text/html", "<p>yes") + "--b--",
                    "yes"),
    "utf-16": (HEAD + "Content-Type: text/plain; charset=utf-16\nContent-Transfer-Encoding: base64\n\n//55AOkAcwA=",
               "yés"),
    "html and a footer": (MULTI.format("mixed") + part("text/html", "<p>yes") + part("text/plain", "list") + "--b--",
                          "yes\n\nlist"),
    "attached message": (MULTI.format("mixed") + part("text/plain", "yes") + part("message/rfc822", HEAD + "\nno") +
                         "--b--", "yes"),
    "no text": (MULTI.format("mixed") + part("image/png", "no") + "--b--", ""),
    "cut off": (MULTI.format("mixed") + part("text/plain", "yes"), "yes"),
    "no border": (HEAD + "Content-Type: multipart/mixed\n\nyes", "yes"),
    "folded header": (HEAD + "X-Long: a\n\tb\n\nyes", "yes"),
    "unknown charset": (HEAD + "Content-Type: text/plain; charset=klingon\n\nyes", "yes"),
    "codec that is none": (HEAD + "Content-Type: text/plain; charset=idna\n\nyés", "yés"),
    "bytes to bytes": (HEAD + "Content-Type: text/plain; charset=zlib\n\nyes", "yes"),
    "wrong charset": (HEAD + "Content-Type: text/plain; charset=us-ascii\n\nyés", "yés"),
    "half a surrogate": (HEAD + "Content-Type: text/plain; charset=utf-7\n\na+2AA-b", "a?b"),
    "carriage returns": (HEAD.replace("\n", "\r\n") + "\r\nyes\r\nsir", "yes\nsir"),
    "headers only": (HEAD, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_gives_its_body(name):
    raw, body = MESSAGES[name]
    assert mail(raw) == body


@pytest.mark.parametrize(
    "text",
    ["", "Plain words.", "Note: this\n\nis no header", "Subject: one line is not enough\n\ntext", BODY, "a:b\n\n" * 9],
)
def test_a_text_without_headers_stays(text):
    assert mail(text) == text


def test_stray_bytes_of_a_text_without_headers_are_decoded():
    assert mail(read("señor".encode("latin-1"))) == "señor"
    assert mail("lone \ud800 here") == "lone ? here"


def test_parts_a_thousand_deep_end_in_no_text():
    deep = "".join(f"Content-Type: multipart/mixed; boundary={i}\n\n--{i}\n" for i in range(3000))
    assert mail(HEAD + deep) == ""


PIECES = [
    b"Content-Type: ", b"multipart/mixed; boundary=", b"charset=", b"idna", b"\x00", b"zlib", b"\n\n",
    b"message/rfc822", b"\n--=_next\n", b"base64", b"x-uuencode", b"begin 644 x\n", b"=?utf-8?b?",
    b"filename*0*=utf-8''%e9", b"((", b"<!--", b"charset*=\x00''a", b"\xff\xfe", b"<![foo", b"&#x110000;", b";",
    b'"', b"+2AA-", b"undefined", b"quoted-printable",
]  # fmt: skip


def test_no_broken_message_raises(tmp_path):
    rng = random.Random(5)
    seeds = [path.read_bytes() for path in sorted(make_enron(tmp_path).rglob("*")) if path.is_file()]
    for _ in range(1500):
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 8)):
            place = rng.randrange(min(len(data), rng.choice((600, 10**6))))
            data[place : place + rng.choice((0, 0, 1, 30))] = rng.choice([*PIECES, b"", bytes([rng.randrange(256)])])
        text = mail(read(bytes(data)))
        for step in (forwards, replies, signatures):
            text = step(text)
        text.encode()  # no surrogates


class Oracle(HTMLParser):
    def __init__(self):
        super().__init__()
        self.words, self.skip = [], 0

    def handle_starttag(self, tag, attrs):
        self.skip += tag in ("script", "style", "head", "title")

    def handle_endtag(self, tag):
        self.skip -= tag in ("script", "style", "head", "title")

    def handle_data(self, data):
        self.words += [] if self.skip else data.split()


BITS = st.sampled_from([
    "<p>", "</p>", "<br/>", " <b>", "</b> ", "word ", "<a href='x'>", "</a> ", "&amp; ", "&eacute; ", "\n",
    "&lt;b&gt; ", "<!-- no <p> -->", "<style>p {no}</style>", "<script>if (a < b) no</script>", "1 < 2 ",
    "<TABLE border=1>", "<!DOCTYPE html>", "&#8217; ",
])  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(BITS, max_size=20).map(" ".join))
def test_html_has_the_words_that_the_standard_parser_finds(page):
    oracle = Oracle()
    oracle.feed(page)
    oracle.close()
    assert strip_html(page).split() == oracle.words


@pytest.mark.parametrize(
    ("piece", "left"), [("<", "<"), ("<!--", ""), ("<style", ""), ("<a ", "<a "), ("&", "&"), ("<p>", "")]
)
def test_broken_html_takes_linear_time(piece, left):
    assert strip_html(piece * 200_000) == (left * 200_000).strip()  # quadratic time would be hours


def test_blocks_of_html_have_their_own_lines():
    assert strip_html("<p>one\ntwo</p>\n<p>three<br>four<ul><li>five</ul>") == "one two\n\nthree\nfour\n\nfive"


MARKS = [
    "---------------------- Forwarded by Rosa Lomax/HOU/ECT on 05/14/2001 09:13 AM ---------------------------",
    "---------------------- Forwarded by Rosa Lomax/HOU/ECT on 05/14/2001 \n09:13 AM ---------------------------",
    "----- Forwarded by Rosa Lomax/NA/Enron on 05/14/2001 09:13 AM -----",
    " -----Original Message-----",
    "---- Original Message ----",
    "---------- Forwarded message ----------",
    "----- Forwarded message from Rosa <r@example.com> -----",
    "Begin forwarded message:",
]


@pytest.mark.parametrize("mark", MARKS)
def test_what_was_forwarded_goes(mark):
    assert forwards(f"{BODY}\n\n{mark}\nFrom: x\n\nold text") == BODY
    assert forwards(f"{mark}\n\nold text").strip() == ""


@pytest.mark.parametrize(
    "text",
    [
        "Please read the original message.\nI forwarded it: -----",
        "He wrote: 'Begin forwarded message: no'",
        "--- Chapter ---\nForwarded by nobody",
        "The -----Original Message----- mark is within a line",
    ],
)
def test_a_text_about_forwarding_stays(text):
    assert forwards(text) == text


QUOTES = {
    "quoted lines": ("yes\n> a\n> b\n>\nno", "yes\nno"),
    "without blanks": ("yes\n>a\n>b\nno", "yes\nno"),
    "nested": ("yes\n>> a\n> > b\n", "yes\n"),
    "lead-in": ("yes\n\nOn Mon, 14 May 2001, Rosa Lomax wrote:\n\n> a\n> b", "yes\n\n"),
    "lead-in on two lines": ("yes\n\nOn Mon, 14 May 2001 at 9:13 AM, Rosa Lomax\n<rosa@example.com> wrote:\n> a",
                             "yes\n\n"),
    "lead-in with address": ("yes\nRosa Lomax <rosa@example.com> wrote:\n> a\nno", "yes\nno"),
    "Outlook": (f"{BODY}\n\nFrom: Rosa\nSent: Monday, May 14, 2001\nTo: Bruno; Anna;\nClara\nSubject: x\n\nold", BODY),
    "Outlook, date": (f"{BODY}\n\n\tFrom:\tRosa\n\tDate:\tMay 14\n\tTo:\tBruno\n\tSubject:\tx\n\nold", BODY),
    "Lotus": (f"{BODY}\n\n\nRosa Lomax\n05/14/2001 09:13 AM\nTo: Bruno/HOU/ECT@ECT\ncc: \nSubject: x\n\nold", BODY),
    "Lotus, indented": (f"{BODY}\n\n\tRosa Lomax@ENRON\n\t05/14/2001 09:13:10 AM\n\t\t \n\t\t To: B\n\t\t cc: \n"
                        "\t\t Subject: x\n\nold", BODY),
    "Lotus, one line": (f'{BODY}\n\n"Rosa" <r@example.com> on 05/14/2001 09:13:10 AM\nTo: B\nSubject: x\n\nold', BODY),
    "Lotus, elsewhere": (f"{BODY}\n\nRosa\n05/14/2001 09:13 AM\nPlease respond to r@example.com\nTo: B\nSubject: x",
                         BODY),
    "Lotus, from": (f"{BODY}\n\nFrom: Rosa Lomax            05/14/2001 09:13 AM\n\t\n\nTo: B\nSubject: x\n\nold", BODY),
}  # fmt: skip


@pytest.mark.parametrize("name", QUOTES)
def test_quoted_replies_go(name):
    text, left = QUOTES[name]
    assert replies(text) == left


@pytest.mark.parametrize(
    "text",
    [
        "On Monday my father wrote:\n\nDear son, come home.",
        "a > b and c >= d\n>100 MW were sold\n",
        ">From the start we knew\n>From the end, too\n",
        "TO: All\nFROM: Rosa\nDATE: May 14\nSUBJECT: Parking\n\nNo parking.",
        "To: All\nFrom: Rosa\nDate: May 14\nSubject: Parking\n\nNo parking.",
        "From: Lisbon\nTo: Oslo\nwe flew in a day, and the Subject: never came up",
        "Date: 05/14/2001 09:13 AM\nTo: All\nSubject: Parking\n\nNo parking.",
        "To: do\nSubject: to change\n\nall of it",
        "From: me\n\nTo: you",
    ],
)
def test_what_only_looks_like_a_reply_stays(text):
    assert replies(text) == text


LEGAL = """**********************************************************************
This e-mail is the property of Enron Corp. and/or its relevant affiliate and
may contain confidential and privileged material for the sole use of the
intended recipient (s). Any review, use, distribution or disclosure by others
is strictly prohibited.
**********************************************************************"""
NOTICES = [
    LEGAL,
    LEGAL + "\n\n" + LEGAL.replace("*", "=") + "\n\n",
    "CONFIDENTIALITY NOTICE: The information may be privileged and confidential. It is intended for the addressee.",
    "The information contained in this e-mail is confidential and intended only for the person above.",
    "This message is intended for the addressee and may contain\nprivileged information.",
]


@pytest.mark.parametrize("notice", NOTICES)
def test_disclaimers_at_the_end_go_and_signatures_too(notice):
    assert signatures(f"{BODY}\n\n{notice}") == BODY
    assert signatures(f"{BODY}\n{LEGAL}") == BODY
    assert signatures(f"{BODY}\n\n-- \nBruno Fenwick\nTel. 555\n\n{notice}") == BODY


@pytest.mark.parametrize(
    "text",
    [
        f"{LEGAL}\n\nThat is what our lawyers write.",
        "This message is confidential, so tell nobody.",
        "We discussed a confidential and privileged matter. It is strictly prohibited.",
        "A table:\n-----\n1 2\n-- 3\n",
        "**********\n",
        "-- \n" + "a long digest\n" * 40,
    ],
)
def test_what_is_not_surely_a_signature_stays(text):
    assert signatures(text) == text


def test_only_the_last_signature_mark_counts():
    assert signatures("a\n-- \nb\n-- \nBruno") == "a\n-- \nb"


def test_the_sample_of_enron_comes_out_as_its_senders_wrote_it(tmp_path):
    make_enron(tmp_path)
    paths = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    steps = make_steps(["mail", "forwards", "replies", "signatures", "whitespace", "short"], Cleaning())
    stream, _ = clean([Document(read(path.read_bytes()), path.name) for path in paths], steps)
    texts = [document.text for document in stream]
    assert len(texts) == len(paths) - 1  # the short one
    assert [mark for mark in BOILERPLATE["enron"] for text in texts if mark in text] == []
    assert sum("Café = 5 €" in text for text in texts) == sum("Málaga, señor" in text for text in texts) == 4
    assert sum("Zoë" in text for text in texts) == sum("Fish & chips" in text for text in texts) == 4
    assert min(map(len, texts)) > 700
