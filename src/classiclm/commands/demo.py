"""classiclm demo: the main job in minutes."""

from collections.abc import Sequence
from dataclasses import dataclass

from classiclm.commands.ladder import LadderFlags, climb
from classiclm.config import parse_flags, validate
from classiclm.data.corpora import Data, default_corpus
from classiclm.train.progress import say


@dataclass(frozen=True)
class DemoFlags:
    """Train the twelve rungs of the ladder in minutes, print the table and a sample, write the report.

    The text is Shakespeare if it is on this machine, else scenes that the package writes itself. No network is needed.
    """

    out: str | None = None  # the folder; default: runs/demo-CORPUS


def main(argv: Sequence[str], prog: str) -> int:
    """`ladder --budget quick` on the text that is at hand."""
    flags = validate(DemoFlags, parse_flags(DemoFlags, argv, prog), "the command line")
    corpus = default_corpus()
    if corpus == "plays":
        say("no Shakespeare on this machine (set CLASSICLM_DATA to offer it): taking plays, which the package writes")
    return climb(LadderFlags(data=Data(corpus), out=flags.out or f"runs/demo-{corpus}", budget="quick"))
