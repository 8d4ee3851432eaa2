"""From tokens to text as they come: nothing is shown before it is certain."""

from collections.abc import Callable, Iterable, Iterator, Sequence

_UNFINISHED = "\ufffd"  # what the bytes of half a character decode to


def pieces(
    tokens: Iterable[int],
    decode: Callable[[Sequence[int]], str],
    stop: str | None = None,
    end_of_text: int | None = None,
) -> Iterator[str]:
    """The text of the tokens, piece by piece, up to the stop text or the end-of-text token, which are left out.

    A character whose last byte is still to come is held back, and so is what may turn out to begin the stop text.
    """
    waiting: list[int] = []
    held = ""
    for token in tokens:
        if token == end_of_text:
            break
        waiting.append(token)
        text = decode(waiting)
        if text.endswith(_UNFINISHED):
            continue
        held, waiting = held + text, []
        if stop and stop in held:
            break
        certain = len(held) - _overlap(held, stop)
        yield held[:certain]
        held = held[certain:]
    rest = held + decode(waiting)
    yield rest.partition(stop)[0] if stop else rest


def _overlap(text: str, stop: str | None) -> int:
    """The length of the longest end of `text` that could begin the stop text."""
    if not stop:
        return 0
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
