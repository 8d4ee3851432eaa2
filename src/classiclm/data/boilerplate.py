"""Boilerplate: what a publisher put around its texts. Two steps: books of Project Gutenberg, articles of CNN."""

import re

# -- Project Gutenberg ---------------------------------------------------------------------------------------------

_OF_BOOK = r"OF[ ](?:THE[ ]|THIS[ ])?PROJECT[ ]GUTENBERG(?:['’]S)?[ ]E-?(?:BOOK|TEXT)"
_START = re.compile(
    rf"""^[ \t]*(?:
        \*{{2,}}[ ]*START[ ]{_OF_BOOK}(?:[^*\n]*(?:\n[^*\n]+){{0,3}}\*+)?[^\n]*  # a long title is broken into lines
      | \*[ ]?END[ ]?\*?[ ]?THE[ ]SMALL[ ]PRINT!?[^\n]*                         # texts before 2001
    )$""",
    re.MULTILINE | re.VERBOSE | re.IGNORECASE,
)
_END = re.compile(
    rf"""^[ \t]*(?:
        \*{{2,}}[ ]*END[ ]{_OF_BOOK}
      | End[ ]of[ ](?:the[ ]|this[ ])?Project[ ]Gutenberg(?:['’]s)?[ ]
    )""",
    re.MULTILINE | re.VERBOSE | re.IGNORECASE,
)
_SMALL_PRINT = re.compile(r"^\*{2,}[ ]?START\*{0,2}[ ]?THE SMALL PRINT", re.MULTILINE | re.IGNORECASE)
_HEADER = 40_000  # characters: the longest header there is has some 20,000
_APART = 500  # characters between end marks that belong together

_BLANK = re.compile(r"\n\s*\n")
_CREDITS = re.compile(
    r"""(?:this[ ](?:e-?text|e-?book|file)[ ]was[ ])?
        (?:(?:e-?text|e-?book|html[ ]version)[ ])?(?:produced|prepared|transcribed|scanned|digiti[sz]ed)[ ]by[ ]\S
      | \(?this[ ]file[ ]was[ ]produced[ ]from
      | note:[ ]project[ ]gutenberg[ ]also[ ]has[ ]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CREDITS_LENGTH = 600  # characters of a paragraph of credits
_NOTE = re.compile(r"\W{0,3}transcriber(?:['’]s|s['’]?)?[ ]notes?\b(\W*)", re.IGNORECASE)
_NOTE_LENGTH = 3000  # characters of a paragraph of such notes
_LAST_NOTE = re.compile(r"^[ \t]*\W{0,3}transcriber(?:['’]s|s['’]?)[ ]notes?\b:?\W*$", re.IGNORECASE | re.MULTILINE)


def gutenberg(text: str) -> str:
    """A book without Project Gutenberg's header, licence, credits and transcriber's notes.

    Known are the marks "*** START OF THE PROJECT GUTENBERG EBOOK", "*** END OF ...", "End of Project Gutenberg's" and,
    in texts before 2001, the end of "THE SMALL PRINT!". A text without any of them stays as it is.
    """
    book = text.replace("\r\n", "\n")
    start = _start_of_book(book)
    end = _end_of_book(book, start)  # behind the start: old headers have a mark of this kind, too
    if not start and end == len(book):
        return text
    body = book[start:end].strip()
    if start:
        body = _without_credits(body)
    return _without_last_note(body) if end < len(book) else body


def _start_of_book(book: str) -> int:
    """Where the text behind the last start mark in the header begins; 0 if there is none.

    In some files the small print is at the end: behind an end mark there is no start.
    """
    end = _END.search(book)
    marks = _START.finditer(book, 0, min(_HEADER, end.start() if end else _HEADER))
    return max((mark.end() for mark in marks), default=0)


def _end_of_book(book: str, start: int) -> int:
    """Where the last end mark begins, or the first of several close together; the whole length if there is none."""
    small_print = _SMALL_PRINT.search(book, start) if start else None  # in front of a start it belongs to the header
    end = stop = small_print.start() if small_print else len(book)
    for mark in reversed(list(_END.finditer(book, start, stop))):
        if end < stop and end - mark.start() > _APART:
            break
        end = mark.start()
    return end


def _without_credits(body: str) -> str:
    """The text without the paragraphs of credits and transcriber's notes that it begins with."""
    while True:
        blank = _BLANK.search(body)
        first, rest = (body[: blank.start()], body[blank.end() :]) if blank else (body, "")
        note = _NOTE.match(first)
        if note and note.end() == len(first):  # a heading: the note itself is the next paragraph
            blank = _BLANK.search(rest, 0, _NOTE_LENGTH)
            rest = rest[blank.end() :] if blank else rest
        credit = _CREDITS.match(first) and len(first) <= _CREDITS_LENGTH
        if not rest or not (credit or (note and len(first) <= _NOTE_LENGTH)):
            return body
        body = rest.lstrip("\n")


def _without_last_note(body: str) -> str:
    """The text up to a heading "Transcriber's Notes" that stands near its end."""
    note = _LAST_NOTE.search(body, max(len(body) - _NOTE_LENGTH, len(body) // 2))
    return body[: note.start()].rstrip() if note else body


# -- CNN -----------------------------------------------------------------------------------------------------------

_NAME = r"[A-Z][\w.'’-]*"
_DATELINE = re.compile(
    rf"\A(?:{_NAME}(?:,?[ ](?:{_NAME}|of|de|and|the)){{0,6}},?[ ])?"
    r"\(CNN(?:[ ]?(?:Business|Money|Travel|Sport|Student News|en Español))?\)[ ]*(?:--|[—–:-])?[ ]*"
)
_BYLINE = re.compile(r"\A(?:By|From) [^\n]{3,80}, (?:for )?CNN[ \t]*\n\s*")
_LINES = re.compile(
    r"""^[ \t]*(?:
        (?i:Story[ ]highlights)
      | READ(?:[ ]MORE)?:[^\n]{0,200} | Read[ ]More:?
      | Follow[ ][^\n]{1,80}[ ]on[ ](?:Twitter|Facebook|Instagram)[^\n]{0,80}
      | (?:CNN|The[ ]CNN[ ]Wire)(?:['’]s)?[ ][^\n]{1,300}[ ]contributed[ ]to[ ]this[ ](?:report|story|article)\.?
      | Click[ ]here[ ](?:to|for)[ ][^\n]{1,150}
      | E-mail[ ]to[ ]a[ ]friend[^\n]{0,20}
    )[ \t\r]*(?:\n|\Z)""",
    re.MULTILINE | re.VERBOSE,
)
_COPYRIGHT = re.compile(
    r"""(?:Copyright|©)[ ](?:©[ ])?(?:\d{4}[ ])?(?:CNN|Cable[ ]News[ ]Network|The[ ]Associated[ ]Press|Reuters)
        [^\n]{0,80}?All[ ]rights[ ]reserved\.
        (?:[ ]*This[ ]material[ ]may[ ]not[ ]be[ ]published,[ ]broadcast,[ ]rewritten,?[ ]or[ ]redistributed\.)?""",
    re.VERBOSE | re.IGNORECASE,
)
_LAST_SENTENCE = re.compile(r"[ ]CNN['’]s [^.\n]{1,200} contributed to this (?:report|story|article)\.?\s*\Z")


def news(text: str) -> str:
    """An article without its dateline ("LONDON (CNN) -- "), by-line, links to others, credits and copyright notice.

    Links and credits go where they have a line of their own, the last sentence also where it ends the text.
    """
    text = _COPYRIGHT.sub("", text)
    text = _LAST_SENTENCE.sub("", _LINES.sub("", text))
    start = len(text) - len(text.lstrip())
    rest = _BYLINE.sub("", text[start:])
    article = _DATELINE.sub("", rest)
    return article if article != text[start:] else text
