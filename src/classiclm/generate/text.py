"""From tokens to text as they come: nothing is shown before it is certain."""

from collections.abc import Callable, Iterable, Iterator, Sequence

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to
_CONTEXT = 8  # tokens: what comes before decides how the next one is joined on


def pieces(
    tokens: Iterable[int],
    decode: Callable[[Sequence[int]], str],
    stop: str | None = None,
    end_of_text: int | None = None,
    before: Sequence[int] = (),
) -> Iterator[str]:
    """The text of the tokens, piece by piece, up to the stop text or the end-of-text token, which are left out.

    A character whose last byte is still to come is held back, and so is what may turn out to begin the stop text.
    `before` are the tokens of what stands in front: a tokenizer of words joins the first new word on with a space.
    """
    context, waiting = list(before[-_CONTEXT:]), list[int]()
    held = ""
    for token in tokens:
        if token == end_of_text:
            break
        waiting.append(token)
        text = _behind(context, waiting, decode)
        if text.endswith(_UNFINISHED):
            continue
        held, context, waiting = held + text, [*context, *waiting][-_CONTEXT:], []
        if stop and stop in held:
            break
        certain = len(held) - _overlap(held, stop)
        yield held[:certain]
        held = held[certain:]
    rest = held + _behind(context, waiting, decode)
    yield rest.partition(stop)[0] if stop else rest


def in_front(prompt: Sequence[int], beginning: Sequence[int]) -> Sequence[int]:
    """The tokens of what is shown in front of a continuation: nothing, if it goes on from the beginning of a text."""
    return [] if list(prompt) == list(beginning) else prompt


def _behind(context: Sequence[int], tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> str:
    """The text that the tokens add to that of the context."""
    if not tokens:
        return ""
    return decode([*context, *tokens])[len(decode(context)) :] if context else decode(tokens)


def _overlap(text: str, stop: str | None) -> int:
    """The length of the longest end of `text` that could begin the stop text."""
    if not stop:
        return 0
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
