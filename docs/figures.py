"""Draw the README's figure and print its table from a trained ladder.

python docs/figures.py runs/ladder shakespeare
"""

import json
import sys
from pathlib import Path

from classiclm.commands import svg
from classiclm.commands.ladder import references
from classiclm.data.corpora import Data
from classiclm.data.splits import prepare_text

FOLDER = Path(__file__).parent / "img"


def main() -> None:
    """Write docs/img/ladder.svg, print the rows of the table in docs/papers/ladder.md."""
    run, corpus = Path(sys.argv[1]), Data(sys.argv[2])
    rows = json.loads((run / "ladder.json").read_text())
    bars = [svg.Bar(f"{row['rung']} {row['name']}", row["val_loss"], f"hue-{row['rung']}") for row in rows]
    marks = [svg.Mark(name, value) for name, value in references(corpus, prepare_text(corpus, "char")).items()]
    title = "Validation loss of the twelve rungs, with exact n-gram tables as bars to clear"
    drawing = svg.bar_chart(bars, marks, title=title, axis="nats per character")
    style = f"<style>{svg.STYLE}</style>"
    opened = drawing.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "ladder.svg").write_text(opened.replace("</title>", f"</title>{style}", 1))
    for row in rows:
        numbers = f"{row['params']:,} | {row['val_loss']:.4f} | {row['bits_per_char']:.3f} | {row['seconds']:.0f}"
        print(f"| {row['rung']} | {row['name']} | {numbers} |")


if __name__ == "__main__":
    main()
