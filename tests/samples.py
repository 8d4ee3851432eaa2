"""Small samples of six corpora in their real formats, made from a seeded grammar: equal calls give equal bytes.

`make_samples(folder)` writes them to folder/NAME, as they would lie under $CLASSICLM_DATA. Each corpus has some forty
documents with the boilerplate of its kind, an exact duplicate and a near-duplicate of its second document (in mail the
second message, and so on), and a document too short to keep; those of the web also have one that quality rules remove.
"""

import base64
import csv
import json
import quopri
import random
import re
from pathlib import Path

NOUNS = """river bridge market teacher engine garden letter window captain village doctor harbour winter factory paper
lantern mountain farmer kitchen museum painter valley clock soldier library forest railway orchard tower merchant island
student theatre blanket carpenter prison meadow ladder festival telescope senator candle violin corridor basket hospital
shepherd printer compass chapel journal glacier kettle ferry workshop neighbour council wheel storm pupil station field
lawyer horse camera ocean border table singer road curtain bakery pilot cellar desert stone mirror report contract
budget pipeline meeting account customer price committee schedule agreement plant energy question answer method
theory planet atom number triangle lesson chapter history language machine signal network weather climate"""
VERBS = """carried painted followed visited repaired measured described crossed borrowed covered discovered opened
watched studied sold bought counted moved guarded questioned admired ignored explained collected finished reached
planned changed joined built tested answered noticed remembered prepared supported replaced examined shared cleaned"""
ADJECTIVES = """old quiet narrow bright heavy distant gentle broken curious wooden early public private famous empty
careful golden frozen crowded local northern ancient modern simple difficult careless patient rapid silent useful
ordinary remarkable careworn yellow foreign honest nervous steady shallow deep wide strange familiar"""
PLACES = "Lisbon Oslo Cairo Lima Geneva Havana Kyoto Dublin Nairobi Quito Prague Athens Boston Denver Houston Portland"
PEOPLE = "Anna Bruno Clara David Elena Frank Greta Henry Irene Jacob Karin Louis Maria Nils Olga Peter Rosa Simon"
FAMILIES = "Abbott Barnes Calder Dorsey Ellwood Fenwick Garland Hobart Ingram Jarvis Keating Lomax Mercer Norwood"
TEMPLATES = (
    "The {a} {n} {v} the {n} near {p}, and nobody in the {n} knew why",
    "In {p} a {a} {n} {v} what the {n} had left behind the {a} {n}",
    "{w} {f} {v} the {n} that stood between the {n} and the {a} {n}",
    "When the {n} {v} the {a} {n}, {w} went back to {p} with a {n}",
    "It was the {n} of {p}, not the {n}, that {v} every {a} {n} in those {d} years",
    "{w} {v} the {a} {n} and then {v} the {n}, for the {n} would not wait",
    "Few people have seen how a {n} from {p} {v} the {a} {n} of {w} {f}",
    "To be sure, the {n} {v} more than {d} {a} letters about the {n} and the {n}",
    "They say that {w}, who {v} the {n}, never found the {a} {n} of {p}",
    "With the {n} gone, the {a} {n} of {f} and {f} {v} the {n} for {d} days",
    "After {d} weeks the {n} in {p} was as {a} as the {n} that {w} {v}",
    "Nothing about the {a} {n} is {a}, but the {n} {v} it all the same",
    "Why the {n} {v} a {n} on the road to {p} is a {a} question",
    "A {n} and a {n} have one thing in common: {w} {f} {v} both of them",
)


class Writer:
    """Sentences of a small grammar, from a seed of any name."""

    def __init__(self, seed: str):
        self.random = random.Random(seed)
        words = {"n": NOUNS, "v": VERBS, "a": ADJECTIVES, "p": PLACES, "w": PEOPLE, "f": FAMILIES}
        self.words = {key: text.split() for key, text in words.items()}

    def word(self, kind: str) -> str:
        return str(self.random.randint(3, 99)) if kind == "d" else self.random.choice(self.words[kind])

    def sentence(self) -> str:
        pieces = self.random.choice(TEMPLATES).split("{")
        filled = pieces[0] + "".join(self.word(piece[0]) + piece[2:] for piece in pieces[1:])
        filled = re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", filled)
        return filled[0].upper() + filled[1:] + "."

    def paragraph(self, sentences: int) -> str:
        return " ".join(self.sentence() for _ in range(sentences))

    def text(self, paragraphs: int, sentences: int = 5) -> str:
        return "\n\n".join(self.paragraph(sentences) for _ in range(paragraphs))

    def title(self) -> str:
        return f"The {self.word('a')} {self.word('n')} of {self.word('p')}".title()


def make_samples(folder: Path) -> dict[str, Path]:
    """Write all six below folder; name of the corpus -> the file or folder to read."""
    makers = {
        "cnn": make_cnn, "enron": make_enron, "gutenberg": make_gutenberg,
        "openwebtext": make_openwebtext, "wikipedia": make_wikipedia, "edu": make_edu,
    }  # fmt: skip
    for name in makers:
        (folder / name).mkdir(parents=True)
    return {name: make(folder / name) for name, make in makers.items()}


def spoiled(texts: list[str]) -> list[str]:
    """The texts and three more: an exact and a near-duplicate of the second, and one that is too short."""
    near = texts[1].replace(" the ", " that ", 1)
    return [*texts, texts[1], near, "Too short."]


# What cleaning must not leave in any document of the corpus.
BOILERPLATE = {
    "cnn": (
        "(CNN)",
        "Story highlights",
        "READ MORE",
        "on Twitter",
        "contributed to this",
        "All rights reserved",
    ),
    "enron": ("Message-ID", "Content-T", "Forwarded by", "Original Message", "wrote:", "\n>", "-- \n", "e-mail is the"),
    "gutenberg": ("Project Gutenberg", "PROJECT GUTENBERG", "***", "\r", "\ufeff", "Produced by", "www.gutenberg.org"),
    "openwebtext": ("â€", "&amp;", "\r"),
    "wikipedia": (),
    "edu": ("\u200b\u200b", "â€"),
}


def make_cnn(folder: Path) -> Path:
    """A csv file with the columns text, label; the text has quotes, commas and line breaks in it."""
    writer = Writer("cnn")
    texts = []
    for i in range(40):
        place = writer.word("p")
        dateline = (f"{place} (CNN) -- ", f"{place}, Ohio (CNN)", "(CNN) -- ", "(CNN)", "(CNN Business)", "")[i % 6]
        body = f'"{writer.sentence()}" said {writer.word("w")} {writer.word("f")}, a {writer.word("n")}.\n\n'
        lines = [dateline + writer.paragraph(4), body + writer.text(3), f"READ MORE: {writer.title()}"]
        lines += [writer.text(2), _end_of_article(writer, i)]
        texts.append("\n".join(line for line in lines if line))
    texts[4] = "Story highlights\n" + texts[4]
    junk = "\n".join(["# # # ... !!! 12 45 ### ..."] * 60)
    path = folder / "articles.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        rows.writerows([text, ("news", "sport", "business")[i % 3]] for i, text in enumerate([*spoiled(texts), junk]))
    return path


def _end_of_article(writer: Writer, i: int) -> str:
    person = f"{writer.word('w')} {writer.word('f')}"
    ends = (
        f"CNN's {person} contributed to this report.",
        f"Follow {person} on Twitter",
        "Copyright 2013 CNN. All rights reserved. This material may not be published, broadcast, rewritten, or"
        " redistributed.",
        "",
    )
    return ends[i % 4]


def make_enron(folder: Path) -> Path:
    """CMU's tree, maildir/USER/FOLDER/NUMBER. with a message in each file; line feeds; some messages are not UTF-8."""
    writer = Writer("enron")
    kinds = (
        _plain,
        _forward,
        _original,
        _reply,
        _alternative,
        _base64,
        _latin1,
        _html,
        _signed,
        _legal,
        _attached,
    )
    root = folder / "maildir"
    bodies = spoiled([writer.text(2, 6) for _ in range(44)])
    for i, body in enumerate(bodies):
        user, box = ("allen-p", "arnold-j", "beck-s")[i % 3], ("inbox", "sent_items", "_sent_mail")[i // 3 % 3]
        place = root / user / box
        place.mkdir(parents=True, exist_ok=True)
        part = (kinds[i % len(kinds)] if i < 44 else _plain)(body, writer)
        (place / f"{i + 1}.").write_bytes(_header(i, user, writer) + part)
    return root


def _header(i: int, user: str, writer: Writer) -> bytes:
    return (
        f"Message-ID: <{1000000 + 7919 * i}.10758556{i:05d}.JavaMail.evans@thyme>\n"
        f"Date: {('Mon', 'Tue', 'Wed', 'Thu', 'Fri')[i % 5]}, {i % 28 + 1} May 2001 16:{i:02d}:00 -0700 (PDT)\n"
        f"From: {user}@example.com\nTo: {writer.word('w').lower()}.{writer.word('f').lower()}@example.com\n"
        f"Subject: {writer.title()}\nMime-Version: 1.0\n"
    ).encode()


def _mime(kind: str, encoding: str, body: bytes) -> bytes:
    return f"Content-Type: {kind}\nContent-Transfer-Encoding: {encoding}\n\n".encode() + body


def _seven_bit(text: str) -> bytes:
    headers = "X-From: A Person\nX-Folder: \\A_Person_June2001\\Notes Folders\\Inbox\nX-FileName: aperson.nsf\n"
    return headers.encode() + _mime("text/plain; charset=us-ascii", "7bit", text.encode() + b"\n")


def _plain(body: str, writer: Writer) -> bytes:
    return _seven_bit(body)


def _forward(body: str, writer: Writer) -> bytes:
    line = f"---------------------- Forwarded by {writer.word('w')} {writer.word('f')}/HOU/ECT on 05/14/2001 "
    return _seven_bit(f"{body}\n\n{line}\n09:13 AM ---------------------------\n\n\n{writer.text(1)}")


def _original(body: str, writer: Writer) -> bytes:
    heads = (
        f" -----Original Message-----\nFrom: \t{writer.word('f')}, {writer.word('w')}  \nSent:\tMonday, May 14, 2001\n"
    )
    return _seven_bit(f"{body}\n\n{heads}To:\tAllen, Phillip\nSubject:\tRE: {writer.title()}\n\n{writer.text(1)}")


def _reply(body: str, writer: Writer) -> bytes:
    quoted = "\n".join("> " + writer.sentence() for _ in range(4))
    return _seven_bit(f"{body}\n\nOn Mon, 14 May 2001, {writer.word('w')} {writer.word('f')} wrote:\n\n{quoted}\n>")


def _alternative(body: str, writer: Writer) -> bytes:
    plain = _mime("text/plain; charset=utf-8", "quoted-printable", quopri.encodestring(f"{body} Café = 5 €.".encode()))
    html = _mime("text/html; charset=utf-8", "quoted-printable", quopri.encodestring(f"<p>{body}</p>".encode()))
    return _multipart("alternative", plain, html)


def _multipart(kind: str, *parts: bytes) -> bytes:
    head = f'Content-Type: multipart/{kind}; boundary="=_next"\n\nThis is a multi-part message in MIME format.\n'
    return head.encode() + b"".join(b"\n--=_next\n" + part for part in parts) + b"\n--=_next--\n"


def _base64(body: str, writer: Writer) -> bytes:
    return _mime("text/plain; charset=utf-8", "base64", base64.encodebytes(f"{body} Zoë said so.".encode()))


def _latin1(body: str, writer: Writer) -> bytes:
    return _mime("text/plain; charset=iso-8859-1", "8bit", f"{body} See you in Málaga, señor.\n".encode("latin-1"))


def _html(body: str, writer: Writer) -> bytes:
    page = f"<html><head><style>p {{color: red}}</style></head><body><p>{body}</p>Fish &amp; chips</body></html>"
    return _mime('text/html; charset="us-ascii"', "7bit", page.encode())


def _signed(body: str, writer: Writer) -> bytes:
    return _seven_bit(f"{body}\n\n-- \n{writer.word('w')} {writer.word('f')}\nTel. 713 555 0100\n")


def _legal(body: str, writer: Writer) -> bytes:
    legal = """
**********************************************************************
This e-mail is the property of Enron Corp. and/or its relevant affiliate and may contain confidential and privileged
material for the sole use of the intended recipient (s). Any review, use, distribution or disclosure by others is
strictly prohibited.
**********************************************************************"""
    return _seven_bit(f"{body}\n\n{legal}")


def _attached(body: str, writer: Writer) -> bytes:
    table = b"Content-Disposition: attachment; filename=prices.xls\n"
    attachment = table + _mime("application/vnd.ms-excel", "base64", base64.encodebytes(bytes(range(256))))
    return _multipart("mixed", _mime("text/plain; charset=us-ascii", "7bit", body.encode()), attachment)


def _books() -> list[tuple[str, str]]:
    """Title and text of each book, without the publisher's frame."""
    writer = Writer("gutenberg")
    texts = [
        "\n\n".join(f"CHAPTER {chapter}\n\n{writer.text(3, 4)}" for chapter in ("I", "II", "III")) for _ in range(32)
    ]
    return [(writer.title(), text) for text in spoiled(texts)]


def make_gutenberg(folder: Path) -> Path:
    """A folder of books as files, framed by headers and licences of several ages; most with CRLF, one with a BOM."""
    for i, (title, text) in enumerate(_books()):
        book = (_new_frame, _old_frame, _spaced_frame)[i % 3](title, text)
        data = book.encode("utf-8-sig" if i == 3 else "utf-8")
        (folder / f"pg{100 + i}.txt").write_bytes(data if i % 5 == 4 else data.replace(b"\n", b"\r\n"))
    return folder


def _new_frame(title: str, text: str) -> str:
    return f"""The Project Gutenberg eBook of {title}

This ebook is for the use of anyone anywhere in the United States and most other parts of the world at no cost. You may
copy it under the terms of the Project Gutenberg License included with this ebook or online at www.gutenberg.org.

Title: {title}

Language: English

*** START OF THE PROJECT GUTENBERG EBOOK {title.upper()} ***




Produced by a group of volunteers and the Online Distributed
Proofreading Team



{text}

*** END OF THE PROJECT GUTENBERG EBOOK {title.upper()} ***

Updated editions will replace the previous one. Redistribution is subject to the Project Gutenberg License.
"""


def _old_frame(title: str, text: str) -> str:
    return f"""The Project Gutenberg Etext of {title}

**Welcome To The World of Free Plain Vanilla Electronic Texts**

*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*




{text}




End of Project Gutenberg's {title}
"""


def _spaced_frame(title: str, text: str) -> str:
    return f"""Project Gutenberg's {title}

***START OF THIS PROJECT GUTENBERG EBOOK {title.upper()}***


{text}


End of the Project Gutenberg EBook of {title}

***END OF THIS PROJECT GUTENBERG EBOOK {title.upper()}***

***** This file should be named 100.txt *****
"""


def make_gutenberg_rows(folder: Path) -> Path:
    """The books as on the hub: a Parquet file with one row per paragraph, book_name and paragraph, books one after
    another."""
    rows = [(title, paragraph) for title, text in _books() for paragraph in text.split("\n\n")]
    names, paragraphs = zip(*rows, strict=True)
    return _write_parquet(folder / "books.parquet", {"book_name": list(names), "paragraph": list(paragraphs)}, "snappy")


def _write_parquet(path: Path, columns: dict[str, list[str]], compression: str) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression=compression, row_group_size=16)
    return path


def make_openwebtext(folder: Path) -> Path:
    """A Parquet file with the column text; some pages are wrongly decoded, some have carriage returns or entities."""
    writer = Writer("openwebtext")
    texts = [writer.text(4) for _ in range(40)]
    texts[5] += " It doesnâ€™t matter, said the senator."
    texts[6] = texts[6].replace("\n", "\r\n")
    texts[7] += " Fish &amp; chips, as “they” say…"
    junk = "\n".join(["click here now"] * 120)
    return _write_parquet(folder / "train-00000.parquet", {"text": [*spoiled(texts), junk]}, "snappy")


def make_wikipedia(folder: Path) -> Path:
    """JSON lines in Zstandard, with title, url and maintext."""
    import zstandard

    writer = Writer("wikipedia")
    lines = []
    for i, text in enumerate(spoiled([writer.text(4, 4) for _ in range(40)])):
        text = text.replace("nobody", "nobody (Zürich, naïve – 東京)", 1)
        title = writer.title()
        url = f"https://en.wikipedia.org/wiki/{title.replace(' ', '_')}_{i}"
        lines.append(json.dumps({"title": title, "url": url, "maintext": text}, ensure_ascii=i % 2 == 0))
    path = folder / "articles.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor(level=3).compress(("\n".join(lines) + "\n").encode()))
    return path


def make_edu(folder: Path) -> Path:
    """A Parquet file in Zstandard with text, id and url."""
    writer = Writer("edu")
    texts = [f"{writer.title()}\n\n{writer.text(5, 4)}" for _ in range(40)]
    texts[8] += " The pupilâ€™s answer was right."
    texts = [*spoiled(texts), "\n".join(f"• item {i}" for i in range(80))]
    ids = [f"<urn:uuid:{i:08d}>" for i in range(len(texts))]
    urls = [f"https://example.org/lessons/{i}" for i in range(len(texts))]
    return _write_parquet(folder / "part-00000.parquet", {"text": texts, "id": ids, "url": urls}, "zstd")
