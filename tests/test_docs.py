"""The documentation runs: Python blocks as they are, commands at small size; links lead somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import samples
from classiclm.commands.prepare import PrepareFlags
from classiclm.config import validate
from classiclm.data import plays
from classiclm.data.cleaning import STEP_NAMES
from classiclm.data.dataset import open_dataset
from classiclm.data.sources import SOURCES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
DATA = ROOT / "docs/data.md"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SMALL = {
    "train": "--steps 3 --batch 2 --eval_windows 2 --device cpu",
    "ladder": "--rungs 1-2 --budget quick --device cpu",
    "generate": "--max_new_tokens 5",
    "prepare": "--workers 1",
}
SMALL_RECIPE = "--micro_batch 2 --model.n_layers 1 --model.d_model 16 --model.n_heads 2 --model.n_ctx 32"
LEARNT = {"gpt2": "bpe-512", "bert": "wordpiece-512", "bpe-4096": "bpe-512"}  # published ones would be downloaded
HERE = {"shakespeare": "./small.txt", "plays": "./small.txt", "./my-corpus": "./my-text"}
names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
recipes = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


def blocks(page, language):
    return [body for kind, body in BLOCK.findall(page.read_text()) if kind == language]


def commands(page):
    """The words of each `classiclm` line in a page's shell blocks, or in a recipe's header, without its comment."""
    if page.suffix == ".yaml":
        lines = [line.removeprefix("#").strip() for line in page.read_text().splitlines() if line.startswith("#")]
    else:
        lines = [line for body in blocks(page, "sh") for line in body.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("classiclm ")]


def made_small(words):
    words = [HERE.get(word, word) for word in words]
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
    if "multi30k" in words:
        words = ["./pairs" if word == "multi30k" else word for word in words]
        words += ["--data.source", "de", "--data.target", "en"] if words[0] == "train" else []
    if words[0] == "train" and words[1].startswith("rumelhart1986"):  # NumPy: no batches, no device
        return [*words, "--steps", "3"]
    if words[0] == "prepare" or words[1:2] == ["--config"]:
        words = with_a_small_vocabulary(words)
    is_training = words[0] != "ladder" or words[1].startswith("-")
    return words + (SMALL.get(words[0], "").split() if is_training else [])


def with_a_small_vocabulary(words):
    """The same with a tokenizer that is learnt in a second; the model of a recipe to go with it."""
    is_prepared = any("mixture" in word for word in words) and words[0] == "train"
    words = [LEARNT.get(word, word) for word in words]
    if "--tokenizer" not in words and "--engine" not in words and not is_prepared:
        words = [*words, "--tokenizer", "bpe-512"]
    return words + (SMALL_RECIPE.split() if words[0] == "train" else [])


@pytest.fixture
def small_corpora(tmp_path, monkeypatch):
    """The working folder: a text, a folder of texts, and a corpus of sentence pairs with multi30k's file names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.txt").write_text(plays.generate(20_000, seed=0))
    for folder in ("pairs", "my-text"):
        (tmp_path / folder).mkdir()
    for i in range(6):
        (tmp_path / f"my-text/{i}.txt").write_text(plays.generate(4_000, seed=i))
    for split in ("train", "val", "test_2016_flickr"):
        (tmp_path / f"pairs/{split}.de").write_text("Ein Hund läuft.\nZwei Männer stehen im Schnee.\n" * 4)
        (tmp_path / f"pairs/{split}.en").write_text("A dog runs.\nTwo men stand in the snow.\n" * 4)


@pytest.fixture
def six_corpora(tmp_path, monkeypatch, small_corpora):
    """Samples of the six known corpora where they are looked for, and two of them as files of one's own."""
    samples.make_samples(tmp_path / "known")
    monkeypatch.setenv("CLASSICLM_DATA", str(tmp_path / "known"))
    (tmp_path / "wiki").symlink_to(tmp_path / "known/wikipedia")
    (tmp_path / "owt").symlink_to(tmp_path / "known/openwebtext")


def run_all(cli, lines):
    """Runs commands up to the first that fails; what it said, None if all went well."""
    for words in lines:
        code, _, err = cli(*made_small(words))
        if code != 0:
            return f"{' '.join(words)}: {err}"
    return None


@names
def test_python_blocks_run(page):
    for body in blocks(page, "python"):
        exec(compile(body, str(page), "exec"), {})
    assert page.is_file()


@names
def test_commands_run(page, cli, small_corpora, request):
    lines = commands(page)
    if any(words[0] == "prepare" for words in lines):
        request.getfixturevalue("six_corpora")
    if any("--engine" in words for words in lines):
        pytest.importorskip("datatrove")
    if "runs/a" in page.read_text() and not any(words[0] == "train" for words in lines):
        assert run_all(cli, [shlex.split("train gpt2-shakespeare-cpu --data plays --out runs/a")]) is None
    assert run_all(cli, lines) is None


@names
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text())
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"src=\"([^\"]+)\"", text)
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


def is_of_data(recipe):
    """Whether a recipe is for `prepare`, and not for `train`."""
    return "sources" in yaml.safe_load(recipe.read_text())


@pytest.mark.parametrize("recipe", [path for path in RECIPES if not is_of_data(path)], ids=lambda path: path.name)
def test_recipes_resolve_and_say_their_command_cost_and_what_to_expect(recipe, cli):
    code, out, err = cli("train", "--config", recipe, "--print_config")
    assert code == 0, err
    tree, given = yaml.safe_load(out), yaml.safe_load(recipe.read_text())
    sizes = given.pop("model")
    assert sizes.items() <= tree["model"].items()
    assert {key: float(tree[key]) if key == "lr" else tree[key] for key in given} == given | {"lr": float(given["lr"])}
    for word in ("classiclm train --config recipes/", "# Cost ", "# Expect ", "# Source "):
        assert word in recipe.read_text()


@pytest.mark.parametrize("recipe", [path for path in RECIPES if is_of_data(path)], ids=lambda path: path.name)
def test_recipes_of_data_name_known_sources_with_weights_that_are_shares(recipe):
    flags = validate(PrepareFlags, yaml.safe_load(recipe.read_text()), str(recipe))
    assert set(flags.sources) <= set(SOURCES)
    assert sum(flags.weights) == pytest.approx(1)
    assert len(flags.weights) == len(flags.sources)
    assert f"classiclm prepare --config recipes/{recipe.name} --out " in recipe.read_text()


@recipes
def test_the_commands_of_a_recipe_run(recipe, cli, six_corpora):
    assert commands(recipe)
    assert run_all(cli, commands(recipe)) is None


def test_the_lines_that_read_a_shard_give_its_tokens(cli, six_corpora):
    assert run_all(cli, commands(DATA)[:1]) is None
    (code,) = (body for body in blocks(DATA, "py") if "memmap" in body)
    found = {}
    exec(compile(code, str(DATA), "exec"), found)
    tokens = np.asarray(open_dataset("data/mine").split("train").tokens)
    assert len(tokens) > 100
    assert np.array_equal(found["tokens"], tokens)


def table_of_the_six():
    """The corpora of the hub, as the page has them."""
    head = "| name | what | on the hub | licence | size | GPT-2 tokens | cleaning |\n|---|---|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| `{s.name}` | {s.about} | `{s.hub.id}` | {s.licence} | {s.size / 1e9:.3g} GB | {s.tokens / 1e9:.3g} G "
        f"| {', '.join(s.steps)} |"
        for s in SOURCES.values()
        if s.hub
    )


def table_of_columns():
    """Where the text of those is, and what else there is like them."""
    head = "| name | read from | also in | note |\n|---|---|---|---|\n"
    return head + "\n".join(
        f"| `{s.name}` | column `{s.reading.text}`{f' by `{s.reading.group}`' if s.reading.group else ''} "
        f"| {', '.join(f'`{name}`' for name in s.alternatives)} | {s.note} |"
        for s in SOURCES.values()
        if s.hub
    )


def table_of_the_small():
    """The corpora that are not of the hub."""
    head = "| name | what | licence | GPT-2 tokens | note |\n|---|---|---|---|---|\n"
    return head + "\n".join(
        f"| `{s.name}` | {s.about} | {s.licence} | {f'{s.tokens:,}' if s.tokens else ''} | {s.note} |"
        for s in SOURCES.values()
        if not s.hub
    )


@pytest.mark.parametrize("table", [table_of_the_six, table_of_columns, table_of_the_small])
def test_the_page_on_data_has_the_sources_as_they_are(table):
    assert f"\n\n{table()}\n\n" in DATA.read_text()


def test_the_page_on_data_explains_every_step_of_cleaning_in_order():
    explained = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", DATA.read_text().partition("## 4.")[2], re.MULTILINE)
    assert explained == list(STEP_NAMES)


@pytest.mark.parametrize("module", ["readers", "opening"])
def test_the_page_on_data_has_the_readers_policies(module):
    """Each row of their own tables, if not word by word: `strict` of errors is a flag here."""
    text = importlib.import_module(f"classiclm.data.{module}").__doc__
    met = {row[0] for row in re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)}
    page = DATA.read_text().replace("`", "")
    covered = "a pipe, socket, device or dead link in a folder, under a known ending"  # by the row without the folder
    assert len(met) > 7
    assert [what for what in met - {covered} if f"| {what.rstrip()}" not in page] == []


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
