"""Tables on stdout, alike in all commands."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_PLAIN_WIDTH = 140  # columns where no terminal sets the width, so that tables in files are not cut


def console() -> Console:
    """stdout, without colours guessed from the text."""
    made = Console(highlight=False, markup=False, emoji=False)  # what is printed is data, not markup
    if not made.is_terminal:
        made.width = _PLAIN_WIDTH
    return made


def table(left: Sequence[str], right: Sequence[str] = (), last: str | None = None) -> Table:
    """An empty table: columns of words, columns of numbers, and perhaps a last column of words; none is wrapped."""
    made = Table(box=box.SIMPLE)
    for name in left:
        made.add_column(name, no_wrap=True)
    for name in right:
        made.add_column(name, justify="right", no_wrap=True)
    if last is not None:
        made.add_column(last, no_wrap=True)
    return made


def show(made: Table) -> None:
    """Print a table with every number whole, even where the terminal is too narrow and breaks its lines."""
    screen = console()
    needed = Measurement.get(screen, screen.options.update(width=10_000), made).maximum
    screen.width = max(screen.width, needed)
    screen.print(made)
