"""Mail: from a raw message to what its sender wrote. Four steps, in the order in which they are meant to run.

    mail        a raw message -> its body as text, headers and attachments gone
    forwards    what somebody else wrote and the sender passed on
    replies     what the sender answers to
    signatures  the sender's card and the company's lawyers

Each takes away only what is marked as such in a form that mail programs write; the rest stays.
"""

import codecs
import email
import html
import itertools
import re
from collections.abc import Iterable
from email.message import Message

_HEADER_BLOCK = re.compile(r"\A\s*(?:From .*\n)?((?:[!-9;-~]++:.*\n(?:[ \t]+\S.*\n)*+)++)(?:[ \t\r]*\n|\Z)")
_KNOWN_HEADERS = re.compile(
    r"^(From|To|Cc|Date|Subject|Message-ID|Received|Return-Path|Delivered-To|MIME-Version|Content-Type):",
    re.IGNORECASE | re.MULTILINE,
)
_NO_CHARSETS = {"idna", "punycode", "raw-unicode-escape", "unicode-escape", "undefined"}  # codecs of another kind


def mail(text: str) -> str:
    """The body of a raw message; a text that does not begin with the headers of one stays as it is.

    text: as read, bytes that are not UTF-8 as surrogate escapes. Of alternatives the plain one is taken; HTML loses its
    tags; attachments, attached messages too, go. Transfer encodings and charsets are decoded. A charset that is unknown
    or wrong is taken for UTF-8, then for Windows-1252. The result holds no surrogates, and is empty for a message
    without text.
    """
    head = _HEADER_BLOCK.match(text)
    if head is None or len({name.lower() for name in _KNOWN_HEADERS.findall(head[1])}) < 2:
        return text if text.isascii() else _decode(_to_bytes(text), "utf-8")
    try:
        # The default, older policy: it keeps headers as strings, so odd ones cannot raise, and is eight times as fast.
        body = _text_of(email.message_from_bytes(_to_bytes(text[head.start(1) :])))
    except RecursionError:  # parts in parts a thousand deep; nobody wrote that
        return ""
    return body.replace("\r\n", "\n")


def _to_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # other surrogates: the text was no bytes before
        return text.encode("utf-8", "replace")


def _text_of(message: Message) -> str:
    """The text of a message or part, those within joined by blank lines."""
    kind = message.get_content_type()
    if message.get_content_disposition() == "attachment" or kind.startswith("message/"):
        return ""
    if message.is_multipart():
        parts = [part for part in message.get_payload() if isinstance(part, Message)]
        if kind == "multipart/alternative":
            return next(filter(str.strip, map(_text_of, sorted(parts, key=_is_html))), "")
        return "\n\n".join(filter(str.strip, map(_text_of, parts)))
    if kind not in ("text/plain", "text/html") and not kind.startswith("multipart/"):  # the last: its border is missing
        return ""
    payload = message.get_payload(decode=True)
    text = _decode(payload if isinstance(payload, bytes) else b"", _charset(message))
    return strip_html(text) if kind == "text/html" else text


def _is_html(message: Message) -> bool:
    return message.get_content_type() != "text/plain"


def _charset(message: Message) -> str:
    try:
        return codecs.lookup(message.get_content_charset("utf-8")).name
    except (LookupError, ValueError):  # ValueError: a NUL in the name
        return "utf-8"


def _decode(data: bytes, charset: str) -> str:
    for name in (charset, "utf-8"):
        try:
            text = "" if name in _NO_CHARSETS else data.decode(name)
        except (LookupError, ValueError):  # LookupError: a codec from bytes to bytes
            continue
        if text or not data:
            return text.encode("utf-8", "replace").decode()  # UTF-7 can hold surrogates
    return data.decode("cp1252", "replace")


# Each alternative ends at the next mark or at the end of the text, so that time is linear in broken HTML, too.
_HTML = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style|head|title)\b.*?(?:</\1\s*>|\Z)|<(/?)([a-z][a-z0-9]*+)[^<>]*+>|<[!?][^<>]*+>",
    re.IGNORECASE | re.DOTALL,
)
_BREAKS = dict.fromkeys(("br", "div", "tr", "li", "dt", "dd", "hr", "pre"), "\n")
_BREAKS |= dict.fromkeys(("p", "h1", "h2", "h3", "h4", "h5", "h6", "table", "ul", "ol", "dl", "blockquote"), "\n\n")


def strip_html(text: str) -> str:
    """The text of an HTML page: tags, comments, scripts and styles gone, entities decoded, blocks on their lines."""
    text = " ".join(text.split())  # line breaks in the source mean no more than a blank
    text = html.unescape(_HTML.sub(_break_for, text))
    lines = "\n".join(line.strip(" ") for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip()


def _break_for(tag: re.Match[str]) -> str:
    return _BREAKS.get((tag[3] or "").lower(), "")


_FORWARD = re.compile(
    r"""^[ \t]*(?:
        -{3,}[ ]?Forwarded[ ]by[ ]\S                                       # Lotus Notes
      | -{3,}[ ]?Original[ ](?:Message|Appointment)[ ]?-{3,}[ \t]*$        # Outlook
      | -{3,}[ ]?Forwarded[ ]message(?:[ ]from[ ][^\n]{1,100})?[ ]?-{3,}[ \t]*$
      | Begin[ ]forwarded[ ]message:[ \t]*$                                # Apple Mail
    )""",
    re.MULTILINE | re.VERBOSE | re.IGNORECASE,
)


def forwards(text: str) -> str:
    """The text above the first line that says that a forwarded or an original message follows."""
    mark = _FORWARD.search(text)
    return text[: mark.start()].rstrip() if mark else text


_FIELD = re.compile(r"[ \t]*\*?(From|Sent|Date|To|[Cc]c|[Bb]cc|Subject|Importance):")
_WHEN = re.compile(r"\d{1,2}/\d{1,2}/\d{2,4} +\d{1,2}:\d\d(?::\d\d)? ?[AP]M\s*$")
_WINDOW = 30  # lines that the headers of a quoted message may take

_QUOTED = re.compile(r"^(?:>(?!From ).*(?:\n|\Z)){2,}+|^>(?:[ \t>].*)?(?:\n|\Z)", re.MULTILINE)
_LEAD_IN = re.compile(
    r"""^(?:
        (?:On|At|In)[ ][^\n]{4,150}(?:\n[^\n>][^\n]{0,100})?   # On Mon, 14 May 2001, A Person
      | [^\n>]{1,80}[ ][<(\[]\S{1,80}@\S{1,80}[>)\]][^\n]{0,60}  # A Person <person@example.com>
    )\b(?:wrote|writes|said):[ \t]*\n\s*(?=^>)""",
    re.MULTILINE | re.VERBOSE,
)


def replies(text: str) -> str:
    """The text without lines quoted by ">", without the line that introduces them ("On DATE, X wrote:"), and up to the
    first header block of a quoted message (Outlook: From, Sent, To, Subject; Lotus Notes: a name, a date, To, Subject).
    """
    lines = text.split("\n")
    starts = (_quoted_message_at(lines, i) for i in range(len(lines)))
    start = next((start for start in starts if start is not None), None)
    if start is not None:
        text = "\n".join(lines[:start]).rstrip()
    if ">" not in text:
        return text
    return _QUOTED.sub("", _LEAD_IN.sub("", text))


def _quoted_message_at(lines: list[str], i: int) -> int | None:
    """The line at which a quoted message begins if its header fields begin at line i.

    A memo, with To in front of From or without a time, is the sender's own and no quotation.
    """
    first = _FIELD.match(lines[i])
    if first is None or first[1] not in ("From", "To") or (i and _FIELD.match(lines[i - 1])):
        return None
    names = _field_names(lines[i : i + _WINDOW])
    if "Subject" not in names:
        return None
    if first[1] == "To":
        return _lotus_start(lines, i)
    timed = names & {"Sent", "Date"} or _WHEN.search(lines[i])
    return i if timed and "To" in names else None


def _field_names(lines: Iterable[str]) -> set[str]:
    """The names of the fields in a header block; a blank line ends it."""
    names: set[str] = set()
    for line in lines:
        if not line.strip():
            break
        names |= {field[1] for field in [_FIELD.match(line)] if field}
    return names


def _lotus_start(lines: list[str], i: int) -> int | None:
    """The line with the name (and, there or on the next line, the time) above a To at line i; None if there is none."""
    above = [j for j in range(max(0, i - 6), i) if lines[j].strip()]
    times = [j for j in above[-3:] if _WHEN.search(lines[j])]
    if not times:
        return None
    if _WHEN.match(lines[times[0]].strip()) and times[0] and lines[times[0] - 1].strip():
        return times[0] - 1
    return times[0]


_SIGNATURE = re.compile(r"^-- ?\n", re.MULTILINE)
_SIGNATURE_LINES = 12  # a longer text behind the mark is no signature
_RULE = re.compile(r"[ \t\r]*+(?:[*_=-]{5,}+[ \t\r]*+)?$")
_DISCLAIMER = re.compile(
    r"(?:this|the information(?: contained| transmitted)? in this|the contents of this)"
    r" (?:e-?mail|(?:electronic )?(?:message|mail|communication|transmission))\b|confidentiality (?:notice|note)\b",
    re.IGNORECASE,
)
_LEGAL = re.compile(
    r"is the property of|intended (?:only |solely )?(?:for|recipient)|privileged|strictly prohibited|confidential",
    re.IGNORECASE,
)


def signatures(text: str) -> str:
    """The text without legal disclaimers at its end and without what follows the last signature mark, a line "-- "."""
    text = _without_disclaimers(text)
    *_, mark = [None, *_SIGNATURE.finditer(text)]
    if mark is None or text.count("\n", mark.end()) > _SIGNATURE_LINES:
        return text
    return text[: mark.start()].rstrip()


def _without_disclaimers(text: str) -> str:
    lines = text.split("\n")
    found = False
    while True:
        while lines and _RULE.match(lines[-1]):
            lines.pop()
        paragraph = list(itertools.takewhile(lambda line: not _RULE.match(line), reversed(lines)))[::-1]
        words = " ".join(" ".join(paragraph).split())
        if not _DISCLAIMER.match(words) or len(set(map(str.lower, _LEGAL.findall(words)))) < 2:
            return "\n".join(lines) if found else text
        del lines[-len(paragraph) :]
        found = True
