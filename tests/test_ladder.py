"""The ladder: twelve rungs, each one declared change from the one before, ending in GPT-2."""

import dataclasses
import inspect
import json

import pytest
import torch

from classiclm.commands.ladder import diff, parse_rungs, source_of
from classiclm.errors import Error
from classiclm.models import gpt2, ladder
from classiclm.models.ladder import LADDER, PRESETS, RECIPES, Config, build, config_of
from classiclm.nn.mask import Mask

# What the design asks of each rung: (name, what changes against the rung before).
DECLARED = [
    ("bigram table", {"model"}),
    ("one attention head", {"model"}),
    ("multi-head", {"n_heads"}),
    ("+ MLP", {"model"}),
    ("three blocks", {"n_layers"}),
    ("+ residual", {"model"}),
    ("+ wide MLP", {"d_ff"}),
    ("post-LN", {"model"}),
    ("pre-LN", {"model"}),
    ("+ dropout", {"dropout"}),
    ("deeper", {"n_layers"}),
    ("scaled up", {"d_model", "d_ff", "n_ctx"}),
]


def test_there_are_exactly_twelve_rungs_in_the_order_of_the_design():
    assert [rung.name for rung in LADDER] == [name for name, _ in DECLARED]


@pytest.mark.parametrize("rung", range(2, 13))
def test_neighbours_differ_by_one_declared_group(rung):
    before, after = dataclasses.asdict(config_of(rung - 1)), dataclasses.asdict(config_of(rung))
    changed = {name for name in after if name != "rung" and after[name] != before[name]}
    if LADDER[rung - 1].model is not LADDER[rung - 2].model:
        changed.add("model")
    assert changed == DECLARED[rung - 1][1]


def test_rungs_with_another_class_but_equal_sizes_differ_in_topology_only():
    parameters = {n: {name: p.shape for name, p in build(config_of(n)).named_parameters()} for n in range(1, 13)}
    assert parameters[2] == parameters[3]  # heads share the same weights
    assert parameters[5] == parameters[6]  # a residual has none
    norms = set(parameters[8]) - set(parameters[7])
    assert norms == {f"blocks.{i}.ln{n}.{p}" for i in range(3) for n in (1, 2) for p in ("weight", "bias")}
    assert set(parameters[9]) - set(parameters[8]) == {"ln_f.weight", "ln_f.bias"}
    assert parameters[9] == parameters[10]


def test_all_rungs_train_alike_but_for_the_tables_rate_and_the_last_ones_longer_windows():
    common = RECIPES["ladder-5"]
    for rung in range(2, 12):
        assert RECIPES[f"ladder-{rung}"] == common
    assert dataclasses.replace(RECIPES["ladder-1"], lr=common.lr) == common
    assert dataclasses.replace(RECIPES["ladder-12"], batch=common.batch) == common
    tokens = {RECIPES[f"ladder-{rung}"].batch * config_of(rung).n_ctx for rung in range(1, 13)}
    assert tokens == {2048}


def test_sizes_are_about_300_thousand_and_1_2_million_and_10_8_million():
    counts = {name: build(PRESETS[name]).count_parameters() for name in ("ladder-1", "ladder-11", "ladder-12")}
    assert counts["ladder-1"] == 65 * 65
    assert 280_000 < counts["ladder-11"] < 320_000
    assert 1_150_000 < counts["ladder-12"] < 1_250_000
    with torch.device("meta"):
        assert 10.7e6 < build(PRESETS["ladder-12-gpu"]).count_parameters() < 10.9e6


def test_rung_12_with_gpt2s_settings_is_gpt2():
    """The same weights by the same names, the same logits."""
    theirs = gpt2.GPT2(gpt2.Config(n_layers=3, d_model=40, n_heads=5, n_ctx=24, vocab_size=97)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    ours = build(Config(rung=12, n_layers=3, d_model=40, n_heads=5, d_ff=160, n_ctx=24, vocab_size=97)).eval()
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randint(97, (3, 24))
    assert theirs(tokens).std() >= 1
    assert torch.equal(ours(tokens), theirs(tokens))


@pytest.mark.parametrize("rung", range(1, 13))
def test_no_rung_sees_the_future_and_each_but_the_table_sees_the_past(rung):
    torch.manual_seed(rung)
    model = build(config_of(rung)).eval()
    tokens = torch.randint(65, (1, 12))
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 65
    a, b = model(tokens)[0], model(changed)[0]
    assert torch.equal(a[:5], b[:5])
    assert not torch.allclose(a[5], b[5])
    assert torch.equal(a[11], b[11]) == (rung == 1)


@pytest.mark.parametrize("rung", [1, 2, 5, 8, 12])
def test_cached_reading_equals_reading_at_once(rung):
    model = build(config_of(rung)).eval()
    tokens, cache = torch.randint(65, (2, 10)), model.new_cache()
    parts = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 6), (6, 7), (7, 10))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


def test_a_mask_can_be_given():
    model = build(config_of(9)).eval()
    tokens = torch.randint(65, (1, 6))
    assert not torch.allclose(model(tokens), model(tokens, mask=Mask()))


def test_show_prints_the_code_that_runs(cli):
    code, out, _ = cli("ladder", "show", 8)
    assert code == 0
    assert inspect.getsource(ladder.PostLNStack).strip() in out
    assert "self.ln1(x + self.drop(self.attn(" in out
    assert "# n_layers = 3" in out
    assert "class Embedded" not in cli("ladder", "show", 1)[1]


def test_diff_shows_what_changes_and_nothing_else():
    lines = [line for line in diff(2, 3).splitlines() if line[:1] in "+-" and not line.startswith(("+++", "---"))]
    assert [line for line in lines if "rung" not in line] == ["-# n_heads = 1", "+# n_heads = 4"]
    assert diff(7, 7) == ""
    assert "+        x = x + self.drop(self.attn(x, mask=mask, cache=cache))" in diff(5, 6)
    assert all(source_of(rung) for rung in range(1, 13))


def test_lists_of_rungs():
    assert parse_rungs("1-12") == list(range(1, 13))
    assert parse_rungs("12,3-5,4") == [3, 4, 5, 12]
    for bad in ("0-3", "13", "", "a", "3-", "5-4"):
        with pytest.raises(Error):
            parse_rungs(bad)


@pytest.fixture
def short_recipes(monkeypatch):
    """The ladder's recipes, cut to a few steps."""
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(ladder.RECIPES, name, dataclasses.replace(recipe, steps=20, batch=2))


def test_the_ladder_command_writes_table_json_and_report_and_does_not_train_twice(cli, tmp_path, short_recipes):
    arguments = ("ladder", "--data", "plays", "--out", tmp_path, "--rungs", "1,2,9", "--device", "cpu")
    code, out, err = cli(*arguments)
    assert code == 0, err
    rows = json.loads((tmp_path / "ladder.json").read_text())
    assert [row["rung"] for row in rows] == [1, 2, 9]
    for row in rows:
        assert {"rung", "name", "params", "val_loss", "seconds", "sample", "curve"} <= set(row)
        assert row["curve"][-1][0] == 20
        assert row["curve"][-1][2] == row["val_loss"]
        assert len(row["sample"]) > 100
    assert "bigram table" in out
    assert "entropy of the grammar 0.487" in out
    assert str(tmp_path / "report.html") in out.replace("\n", "")
    assert "<svg" in (tmp_path / "report.html").read_text()
    before = [(row["val_loss"], row["sample"], row["seconds"]) for row in rows]
    code, _, err = cli(*arguments)
    assert code == 0
    assert err.count("is finished") == 3
    after = json.loads((tmp_path / "ladder.json").read_text())
    assert [(row["val_loss"], row["sample"], row["seconds"]) for row in after] == before
