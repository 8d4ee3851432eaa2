"""The documentation runs: Python blocks as they are, commands at small size; links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from classiclm.data import plays

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {
    "train": "--steps 3 --batch 2 --eval_windows 2 --device cpu",
    "ladder": "--rungs 1-2 --budget quick --device cpu",
    "generate": "--max_new_tokens 5",
}
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


def commands(page):
    """The words of each `classiclm` line in a page's shell blocks, without its comment."""
    lines = [line for body in blocks(page, "sh") for line in body.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("classiclm ")]


def made_small(words):
    words = ["./small.txt" if word in ("shakespeare", "plays", "./my-text") else word for word in words]
    if "multi30k" in words:
        words = ["./pairs" if word == "multi30k" else word for word in words]
        words += ["--data.source", "de", "--data.target", "en"] if words[0] == "train" else []
    if words[0] == "train" and words[1].startswith("rumelhart1986"):  # NumPy: no batches, no device
        return [*words, "--steps", "3"]
    is_training = words[0] != "ladder" or words[1].startswith("-")
    return words + (SMALL.get(words[0], "").split() if is_training else [])


@pytest.fixture
def small_corpora(tmp_path):
    """A text, and a corpus of sentence pairs with the file names of multi30k."""
    (tmp_path / "small.txt").write_text(plays.generate(20_000, seed=0))
    (tmp_path / "pairs").mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        (tmp_path / f"pairs/{split}.de").write_text("Ein Hund läuft.\nZwei Männer stehen im Schnee.\n" * 4)
        (tmp_path / f"pairs/{split}.en").write_text("A dog runs.\nTwo men stand in the snow.\n" * 4)


@names
def test_python_blocks_run(page):
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), {})
    assert page.is_file()


@names
def test_commands_run(page, cli, tmp_path, monkeypatch, small_corpora):
    monkeypatch.chdir(tmp_path)
    if "runs/a" in page.read_text() and not any(words[0] == "train" for words in commands(page)):
        cli(*made_small(shlex.split("train gpt2-shakespeare-cpu --data plays --out runs/a")))
    for words in commands(page):
        code, _, err = cli(*made_small(words))
        assert code == 0, f"{' '.join(words)}: {err}"


@names
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_resolve_and_say_their_command_cost_and_what_to_expect(recipe, cli):
    code, out, err = cli("train", "--config", recipe, "--print_config")
    assert code == 0, err
    tree, given = yaml.safe_load(out), yaml.safe_load(recipe.read_text())
    sizes = given.pop("model")
    assert sizes.items() <= tree["model"].items()
    assert {key: float(tree[key]) if key == "lr" else tree[key] for key in given} == given | {"lr": float(given["lr"])}
    for word in ("classiclm train --config recipes/", "# Cost ", "# Expect ", "# Source "):
        assert word in recipe.read_text()


def test_the_readme_names_every_command(cli):
    _, usage, _ = cli("--help")
    listed = re.findall(r"^  (\w+)  ", usage, re.MULTILINE)
    text = (ROOT / "README.md").read_text()
    assert len(listed) >= 7
    assert all(f"classiclm {name}" in text for name in listed)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "papers"], ids=lambda page: page.name)
def test_every_deviation_stands_on_the_papers_page(page):
    deviations = importlib.import_module(f"classiclm.models.{page.stem}").DEVIATIONS
    rows = [f"| {d.what} | {d.why} | {d.effect} | {d.follows} |" for d in deviations]
    assert "| what | why | effect | follows |\n|---|---|---|---|\n" + "\n".join(rows) in page.read_text()


def test_every_model_has_its_page():
    models = {path.stem for path in (ROOT / "src/classiclm/models").glob("[a-z]*.py")}
    assert models <= {page.stem for page in PAGES}


def test_the_readme_counts_the_lines_of_each_model_file():
    rows = re.findall(r"\]\((src/classiclm/models/\w+\.py)\) \| (\d+) \|", (ROOT / "README.md").read_text())
    assert len(rows) >= 3
    assert rows == [(path, str(len((ROOT / path).read_text().splitlines()))) for path, _ in rows]
