"""The paper of 1986: its calculus against finite differences and torch, its data by hand, its two experiments as run.

Nothing here needs data or a network. The oracles are the paper's figures, torch's autograd, and facts written by hand.
"""

import ast
import collections
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from classiclm import config as typed
from classiclm.commands import hinton, sweeps
from classiclm.errors import Error
from classiclm.models import rumelhart1986 as paper
from classiclm.models.rumelhart1986 import DEVIATIONS, PAPER_PARAMS, PRESETS, RECIPES, Config, Recipe

LAYERED = Config({"a": 4, "b": 3, "c": 3, "d": 2}, {"b": ["a"], "c": ["b"], "d": ["c"]})
SKIPPING = Config({"a": 4, "b": 3, "c": 3, "d": 2}, {"b": ["a"], "c": ["b", "a"], "d": ["a", "c", "b"]})
TWO_INPUTS = Config({"a": 3, "b": 2, "c": 3, "d": 2}, {"c": ["b", "a"], "d": ["c", "b"]})
NETS = pytest.mark.parametrize("config", [LAYERED, SKIPPING, TWO_INPUTS], ids=["layered", "skipping", "two inputs"])


def a_problem(config, seeds=3, cases=5):
    """A net with large weights, so that no error hides, and cases of any numbers."""
    rng = np.random.default_rng(1)
    net = paper.build(config)
    n_in = sum(config.units[name] for name in config.inputs)
    flat = rng.normal(0, 1.5, (seeds, net.count_parameters()))
    return net, flat, rng.normal(size=(seeds, cases, n_in)), rng.uniform(size=(seeds, cases, config.units["d"]))


def energy(net, flat, inputs, targets):
    return paper.loss(net.forward(flat, inputs)["d"] - targets)


def gradient(net, flat, inputs, targets):
    y = net.forward(flat, inputs)
    return net.backward(flat, y, y["d"] - targets)


def train(*words):
    """The command, as `classiclm train` calls it."""
    return sweeps.main([str(word) for word in words], "classiclm train")


def error_code(*words):
    with pytest.raises(Error) as caught:
        train(*words)
    return caught.value.code


def files_of(run):
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*")) if p.is_file()}


# The file itself


def test_the_paper_needs_numpy_and_no_torch():
    allowed = {"numpy", "classiclm.config", "classiclm.recipe"} | set(sys.stdlib_module_names)
    for node in ast.walk(ast.parse(Path(paper.__file__).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert all(name in allowed or name.split(".")[0] in allowed - {"classiclm"} for name in names), names
    code = "import sys, classiclm.models.rumelhart1986; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_every_preset_has_a_recipe_and_the_deviations_are_whole():
    assert set(RECIPES) == set(PRESETS) >= set(PAPER_PARAMS)
    assert {recipe.task for recipe in RECIPES.values()} == {"sweeps"}
    for deviation in DEVIATIONS:
        assert all((deviation.what, deviation.why, deviation.effect))
        assert deviation.follows in ("paper", "official code", "neither")


def test_the_recipes_are_what_the_captions_of_figures_1_and_4_print():
    one = RECIPES["rumelhart1986-symmetry"]
    assert (one.lr, one.momentum, one.init, one.decay, one.tolerance) == (0.1, 0.9, 0.3, 0, None)
    four = RECIPES["rumelhart1986-family-trees-printed"]
    assert (four.first_steps, four.first_lr, four.first_momentum) == (20, 0.005, 0.5)
    assert (four.steps, four.lr, four.momentum, four.decay, four.tolerance) == (1500, 0.01, 0.9, 0.002, 0.2)
    repaired = RECIPES["rumelhart1986-family-trees"]
    assert (repaired.decay, repaired.steps, repaired.lr, repaired.held_out) == (0, 30_000, 0.01, 4)


@pytest.mark.parametrize(("name", "count"), [("symmetry", 17), ("family-trees", 630), ("family-trees-printed", 630)])
def test_the_nets_have_as_many_weights_as_their_figures_show(name, count):
    assert paper.build(PRESETS[f"rumelhart1986-{name}"]).count_parameters() == count


@pytest.mark.parametrize(
    ("units", "feeds"),
    [
        ({"a": 2, "b": 2, "c": 1}, {"b": ["a"], "c": ["c", "b"]}),  # within a group
        ({"a": 2, "b": 2, "c": 1}, {"b": ["a", "c"], "c": ["b"]}),  # downwards
        ({"a": 2, "b": 2, "c": 1}, {"b": ["a"], "c": ["b", "b"]}),  # twice
        ({"a": 2, "b": 2, "c": 1}, {"b": ["a"], "c": []}),
        ({"a": 2, "b": 2, "c": 1}, {"b": ["a"], "c": ["a"]}),  # b leads nowhere
        ({"a": 2, "b": 2, "c": 1}, {"b": ["a"]}),  # the output is not fed
        ({"a": 2, "b": 2}, {"b": ["a"], "z": ["a"]}),
        ({}, {}),
    ],
)
def test_a_net_that_is_not_layered_is_refused(units, feeds):
    with pytest.raises(ValueError):
        Config(units, feeds)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_comes_back_from_yaml(name):
    tree = yaml.safe_load(typed.to_yaml(PRESETS[name]))
    assert typed.validate(Config, tree) == PRESETS[name]
    assert list(tree["units"]) == list(PRESETS[name].units)  # their order is what makes groups earlier and later


# Equations 1 to 9


def test_a_unit_puts_out_the_logistic_function_of_its_input():
    net = paper.build(Config({"a": 2, "d": 1}, {"d": ["a"]}))
    flat = np.array([[2.0, -1.0, 0.5]])  # w1, w2, bias
    y = net.forward(flat, np.array([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]]))["d"]
    assert y.ravel().tolist() == pytest.approx([0.924141820, 0.817574476, 0.377540669])  # at 2.5, 1.5 and -0.5
    assert paper.logistic(np.array([-1e9, 1e9])).tolist() == [0, 1]


def test_the_error_is_half_the_sum_of_squares_and_no_mean():
    assert paper.loss(np.array([[[1.0, 2.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 4.0]]])).tolist() == [4.5, 8.0]


@NETS
def test_the_gradient_agrees_with_central_differences(config):
    net, flat, inputs, targets = a_problem(config)
    exact, step = gradient(net, flat, inputs, targets), 1e-5
    for p in range(flat.shape[1]):
        nudge = np.zeros_like(flat)
        nudge[:, p] = step
        up, down = (energy(net, flat + sign * nudge, inputs, targets) for sign in (1, -1))
        np.testing.assert_allclose(exact[:, p], (up - down) / (2 * step), atol=1e-6)
    assert np.abs(exact).max() > 0.1


@NETS
def test_the_gradient_agrees_with_torch(config):
    net, flat, inputs, targets = a_problem(config)
    weights = {name: torch.tensor(view, requires_grad=True) for name, view in net.views(flat).items()}
    y = dict(zip(config.inputs, torch.tensor(inputs).split([config.units[n] for n in config.inputs], -1), strict=True))
    for name, weight in weights.items():
        feeding = [y[source] for source in config.feeds[name]]
        y[name] = torch.sigmoid(torch.cat([*feeding, torch.ones(*feeding[0].shape[:2], 1)], -1) @ weight)
    (0.5 * (y["d"] - torch.tensor(targets)) ** 2).sum().backward()
    for name, slope in net.views(gradient(net, flat, inputs, targets)).items():
        np.testing.assert_allclose(slope, weights[name].grad.numpy(), atol=1e-12)


def test_weights_move_by_the_slope_and_a_share_of_the_last_change():
    recipe = Recipe(lr=0.1, momentum=0.9, first_steps=1, first_lr=0.5, first_momentum=0.25)
    weights, velocity, slope = np.array([[1.0]]), np.array([[2.0]]), np.array([[3.0]])
    paper.change_weights(weights, velocity, slope, recipe, sweep=0)
    assert (weights.item(), velocity.item()) == pytest.approx((0.0, -1.0))  # -0.5 * 3 + 0.25 * 2
    paper.change_weights(weights, velocity, slope, recipe, sweep=1)
    assert (weights.item(), velocity.item()) == pytest.approx((-1.2, -1.2))  # -0.1 * 3 + 0.9 * -1


def test_decay_takes_from_the_weights_and_not_from_their_change():
    weights, velocity = np.array([[10.0]]), np.array([[0.0]])
    paper.change_weights(weights, velocity, np.array([[-10.0]]), Recipe(lr=0.1, decay=0.002), sweep=5)
    assert (weights.item(), velocity.item()) == pytest.approx((11 * 0.998, 1.0))


def test_an_output_that_is_near_its_target_teaches_nothing():
    error = np.array([0.19, -0.19, 0.21, -0.21, 0.9])
    assert paper.tolerated(error, 0.2).tolist() == [0, 0, 0.21, -0.21, 0.9]
    assert paper.tolerated(error, None) is error


def test_first_weights_depend_on_the_seed_alone_and_fill_their_range():
    net = paper.build(PRESETS["rumelhart1986-family-trees"])
    first, again, other = (paper.first_weights(net, seed, 0.3) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.15
    assert (first.min(), first.max()) == pytest.approx((-0.3, 0.3), abs=0.01)


# The cases


def test_eight_of_the_64_patterns_are_symmetric():
    cases = paper.symmetry()
    assert (cases.inputs.shape, cases.targets.sum()) == ((64, 6), 8)
    symmetric = {name for name, on in zip(cases.names, cases.targets[:, 0], strict=True) if on}
    assert symmetric == {"000000", "001100", "010010", "011110", "100001", "101101", "110011", "111111"}
    assert cases.inputs[cases.names.index("001101")].tolist() == [0, 0, 1, 1, 0, 1]


# Read off the English tree of Fig. 2 by hand.
ENGLISH = """
Christopher: wife Penelope, son Arthur, daughter Victoria
Penelope: husband Christopher, son Arthur, daughter Victoria
Andrew: wife Christine, son James, daughter Jennifer
Christine: husband Andrew, son James, daughter Jennifer
Arthur: father Christopher, mother Penelope, wife Margaret, sister Victoria, nephew Colin, niece Charlotte
Margaret: husband Arthur, nephew Colin, niece Charlotte
Victoria: father Christopher, mother Penelope, husband James, son Colin, daughter Charlotte, brother Arthur
James: father Andrew, mother Christine, wife Victoria, son Colin, daughter Charlotte, sister Jennifer
Jennifer: father Andrew, mother Christine, husband Charles, brother James, nephew Colin, niece Charlotte
Charles: wife Jennifer, nephew Colin, niece Charlotte
Colin: father James, mother Victoria, uncle Arthur Charles, aunt Margaret Jennifer, sister Charlotte
Charlotte: father James, mother Victoria, uncle Arthur Charles, aunt Margaret Jennifer, brother Colin
"""
TWINS = {  # who stands at the same place of the other tree
    "Christopher": "Roberto", "Penelope": "Maria", "Andrew": "Pierro", "Christine": "Francesca",
    "Arthur": "Emilio", "Margaret": "Gina", "Victoria": "Lucia", "James": "Marco",
    "Jennifer": "Angela", "Charles": "Tomaso", "Colin": "Alfonso", "Charlotte": "Sophia",
}  # fmt: skip


def by_hand():
    lines = [line.split(": ") for line in ENGLISH.strip().splitlines()]
    facts = [(person, *fact.split()) for person, rest in lines for fact in rest.split(", ")]
    return {(person, relation): frozenset(who) for person, relation, *who in facts}


def test_the_english_family_is_as_in_figure_2():
    derived = {question: who for question, who in paper.answers().items() if question[0] in TWINS}
    assert derived == by_hand()


def test_the_italian_family_is_the_english_one_with_other_names():
    renamed = {(TWINS[p], r): frozenset(TWINS[name] for name in who) for (p, r), who in by_hand().items()}
    assert {question: who for question, who in paper.answers().items() if question[0] not in TWINS} == renamed


def test_112_triples_are_104_questions_and_colin_has_two_aunts():
    cases, facts = paper.family_trees(), paper.answers()
    assert (len(facts), sum(map(len, facts.values()))) == (104, 112)
    assert (cases.inputs.shape, cases.targets.shape, cases.targets.sum()) == ((104, 36), (104, 24), 112)
    assert (cases.inputs.sum(axis=1) == 2).all()
    colin = cases.names.index("Colin aunt")
    asked, answered = cases.inputs[colin], cases.targets[colin]
    assert {cases.input_names[i] for i in np.flatnonzero(asked)} == {"Colin", "aunt"}
    assert {cases.output_names[i] for i in np.flatnonzero(answered)} == {"Margaret", "Jennifer"}
    assert len(set(cases.output_names)) == 24


# What the nets learn


def detectors(*sizes):
    """Weights (6, 2) of two units of opposite sign, antisymmetric about the middle."""
    half = np.array(sizes)
    row = np.concatenate([half, -half[::-1]])
    return np.stack([row, -row], axis=1)


def test_the_pattern_of_figure_1_is_told_from_others():
    found = paper.pattern(detectors(4.0, -1.0, 2.0))
    assert (found["ratio"], found["antisymmetry"], found["textbook"]) == ([1, 2, 4], 0, True)
    assert paper.pattern(detectors(4.3, 1.0, 2.1))["textbook"]
    assert not paper.pattern(detectors(4.5, 1.0, 2.0))["textbook"]  # 4 and more than a tenth
    assert not paper.pattern(detectors(2.0, 1.5, 1.0))["textbook"]
    assert not paper.pattern(np.abs(detectors(4.0, 1.0, 2.0)))["textbook"]  # the same sign on both sides
    one_off = detectors(4.0, 1.0, 2.0) + np.eye(6, 2)
    assert paper.pattern(one_off)["antisymmetry"] == pytest.approx(1 / 5)


def test_the_solution_that_figure_1_describes_answers_all_64():
    net = paper.build(PRESETS["rumelhart1986-symmetry"])
    hidden = np.vstack([detectors(14.0, 7.0, 3.5), [-1.5, -1.5]])  # biases negative
    flat = np.concatenate([hidden.ravel(), [-14.0, -14.0, 6.0]])[None]  # the output's is positive
    cases = paper.symmetry()
    error = net.forward(flat, cases.inputs[None])["output"] - cases.targets
    assert np.abs(error).max() < 0.5


@pytest.fixture(scope="module")
def symmetry_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("symmetry") / "run"
    assert train("rumelhart1986-symmetry", "--out", run) == 0
    return run


def test_the_printed_recipe_finds_symmetry_and_the_pattern_of_figure_1(symmetry_run):
    results = json.loads((symmetry_run / "results.json").read_text())
    summary, solved = results["summary"], [row for row in results["seeds"] if row["solved"]]
    assert (results["parameters"], summary["seeds"]) == (17, 20)
    assert len(solved) == summary["solved"] >= 12
    assert summary["textbook"] >= len(solved) / 2
    assert 1425 / 3 <= summary["median_sweeps"] <= 1425 * 3
    for row in solved:
        hidden = np.array(row["weights"]["hidden"])
        output = np.array(row["weights"]["output"])
        x = np.array([[int(bit) for bit in f"{n:06b}"] for n in range(64)])
        h = 1 / (1 + np.exp(-(x @ hidden[:6] + hidden[6])))
        y = 1 / (1 + np.exp(-(h @ output[:2] + output[2])))[:, 0]
        d = (x == x[:, ::-1]).all(axis=1)
        assert ((y > 0.5) == d).all()
        assert row["loss"] < 0.05
        assert 0.5 * ((y - d) ** 2).sum() == pytest.approx(row["loss"], abs=1e-4)
        assert np.corrcoef(hidden[:6].T)[0, 1] < -0.95  # the same pattern with opposite sign
        assert row["antisymmetry"] < 0.05
    failed = [row for row in results["seeds"] if not row["solved"]]
    assert all(row["ratio"] is None and row["cases_right"] < 64 for row in failed)


def test_the_printed_recipe_of_the_family_trees_learns_nothing(tmp_path):
    """Erratum: with decay every output goes to its base rate, whatever is asked."""
    assert train("rumelhart1986-family-trees-printed", "--out", tmp_path / "run", "--seeds", 3) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [row["cases_right"] for row in results["seeds"]] == [0, 0, 0]
    assert results["step"] == 1500


def test_a_net_learns_some_of_the_family_trees_without_decay(tmp_path):
    train("rumelhart1986-family-trees", "--out", tmp_path / "run", "--seeds", 2, "--steps", 9000)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["cases_right"] > 0.1
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]


@pytest.mark.slow
def test_the_repaired_recipe_learns_the_family_trees(tmp_path):
    assert train("rumelhart1986-family-trees", "--out", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["summary"]["seeds_95_percent_right"] >= 5
    assert results["summary"]["held_out_right"] >= 1.6


# Many nets at once


@pytest.mark.parametrize("name", ["symmetry", "family-trees"])
def test_a_net_learns_the_same_alone_and_among_others(name, tmp_path):
    settings = ("--steps", 700 if name == "symmetry" else 60)
    train(f"rumelhart1986-{name}", *settings, "--seeds", 5, "--seed", 1345, "--out", tmp_path / "five")
    train(f"rumelhart1986-{name}", *settings, "--seeds", 1, "--seed", 1346, "--out", tmp_path / "one")
    five, one = (json.loads((tmp_path / run / "results.json").read_text())["seeds"] for run in ("five", "one"))
    assert five[1] == one[0]  # seed 1346 solves symmetry at 424, and rests: the others do not
    if name == "symmetry":
        assert one[0]["solved_at"] < 600
        assert not five[3]["solved"]


def test_held_out_cases_are_drawn_by_the_seed_and_never_trained_on(tmp_path):
    config = sweeps.resolve(
        sweeps.SweepsFlags, ["rumelhart1986-family-trees", "--seeds", "30", "--steps", "1"], "train"
    )[0]
    nets = sweeps.Sweeps(tmp_path, config)
    for held_out, trained, inputs in zip(nets.held_out, nets.trained, nets.inputs, strict=True):
        assert sorted([*held_out, *trained]) == list(range(104))
        questions = {row.tobytes() for row in inputs}
        assert len(questions) == 100
        assert not any(nets.cases.inputs[case].tobytes() in questions for case in held_out)
    drawn = collections.Counter(nets.held_out.ravel().tolist())
    assert len(drawn) > 50  # of 120 draws from 104


# The command


def test_a_run_leaves_its_files_and_prints_a_table(symmetry_run, capsys):
    assert train("rumelhart1986-symmetry", "--out", symmetry_run) == 0
    captured = capsys.readouterr()
    assert "is finished" in captured.err
    results = json.loads((symmetry_run / "results.json").read_text())
    assert f"{results['summary']['solved']} of 20 nets have all cases right" in captured.out
    assert "the paper's net: 1,425" in captured.out
    firsts = [line.split()[0] for line in captured.out.splitlines() if line.strip()]
    assert [int(word) for word in firsts if word in map(str, range(1337, 1357))] == list(range(1337, 1357))
    rows = [json.loads(line) for line in (symmetry_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows[:3]] == [0, 50, 100]
    assert rows[-1]["step"] == results["step"]
    assert rows[-1]["solved"] == results["summary"]["solved"] / 20
    assert {"MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json", "model.json"} == {
        path.name for path in (symmetry_run / f"checkpoints/step-{results['step']:08d}").iterdir()
    }


def test_config_yaml_starts_the_same_run_again(tmp_path):
    train("rumelhart1986-family-trees", "--steps", 5, "--seeds", 2, "--lr", 0.02, "--out", tmp_path / "a")
    train("--config", tmp_path / "a/config.yaml", "--out", tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_a_file_changes_the_net_and_a_flag_beats_the_file(tmp_path):
    file = tmp_path / "more.yaml"
    file.write_text("model: {units: {hidden: 4}, feeds: {output: [input, hidden]}}\nlr: 0.05\nseeds: 3\n")
    words = ["rumelhart1986-symmetry", "--config", str(file), "--seeds", "2"]
    flags = sweeps.resolve(sweeps.SweepsFlags, words, "train")[0]
    assert flags.model == Config(
        {"input": 6, "hidden": 4, "output": 1}, {"hidden": ["input"], "output": ["input", "hidden"]}
    )
    assert (flags.lr, flags.seeds, flags.momentum) == (0.05, 2, 0.9)


def test_impossible_settings_are_one_line_and_exit_2(tmp_path):
    out = ("--out", tmp_path / "run")
    assert error_code("rumelhart1986-symetry", *out) == 2
    assert error_code("rumelhart1986-symmetry") == 2  # no --out
    assert error_code("rumelhart1986-symmetry", "--hidden", 3, *out) == 2
    assert error_code("rumelhart1986-symmetry", "--momentum", 1, *out) == 2
    assert error_code("rumelhart1986-symmetry", "--held_out", 64, *out) == 2
    for text in ("{units: {input: 5}}", "{feeds: {hidden: [output]}}", "{units: {hidden: 0}}"):
        (tmp_path / "bad.yaml").write_text(f"preset: rumelhart1986-symmetry\nmodel: {text}")
        assert error_code("--config", tmp_path / "bad.yaml", *out) == 2
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_not_touched(tmp_path):
    train("rumelhart1986-symmetry", "--steps", 5, "--out", tmp_path)
    before = files_of(tmp_path)
    assert error_code("rumelhart1986-symmetry", "--steps", 5, "--seed", 3, "--out", tmp_path) == 2
    assert files_of(tmp_path) == before


def test_a_rate_that_is_far_too_high_is_an_error_and_nothing_bad_is_saved(tmp_path):
    assert error_code("rumelhart1986-symmetry", "--lr", 1e308, "--out", tmp_path) == 5
    assert list((tmp_path / "checkpoints").glob("step-*")) == []


def test_a_signal_saves_and_the_same_command_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    words = ("rumelhart1986-symmetry", "--steps", 700, "--log_every", 30, "--save_every", 300, "--out")
    assert train(*words, tmp_path / "whole") == 0
    real = sweeps.Metrics.append

    def interrupted(self, row):
        real(self, row)
        if row["step"] == 510:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(sweeps.Metrics, "append", interrupted)
    assert train(*words, tmp_path / "twice") == 128 + signal.SIGTERM
    assert (tmp_path / "twice/checkpoints/step-00000510/MANIFEST.json").is_file()
    assert not (tmp_path / "twice/results.json").exists()
    monkeypatch.undo()
    assert train(*words, tmp_path / "twice") == 0
    whole, twice = files_of(tmp_path / "whole"), files_of(tmp_path / "twice")
    same = [name for name in whole if "step-00000600" not in name and "step-00000510" not in name]
    assert {name: twice[name] for name in same} == {name: whole[name] for name in same}
    assert any("step-00000700" in name for name in same)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bytes(tmp_path):
    words = ["rumelhart1986-family-trees", "--steps", "1200", "--seeds", "2", "--save_every", "40", "--out"]
    code = "import sys; from classiclm.commands import sweeps; sys.exit(sweeps.main(sys.argv[1:], 'train'))"
    child = subprocess.Popen([sys.executable, "-c", code, *words, str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("checkpoints/step-000002*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed/results.json").exists()
    assert train(*words, tmp_path / "killed") == 0
    assert train(*words, tmp_path / "whole") == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


# The drawing


def squares_of(drawing):
    root = ET.fromstring(drawing)
    return [node for node in root.iter() if node.tag.endswith("rect") and "data-weight" in node.attrib]


def test_a_hinton_diagram_has_a_square_per_weight_and_its_area_is_the_weight():
    net = paper.build(PRESETS["rumelhart1986-family-trees"])
    weights = {name: view[0] for name, view in net.views(paper.first_weights(net, 3, 0.3)[None]).items()}
    cases = paper.family_trees()
    names = hinton.unit_names(net, cases.input_names, cases.output_names)
    squares = squares_of(hinton.draw(net, weights, names, "a net"))
    assert len(squares) == 630
    values = np.array([float(square.get("data-weight")) for square in squares])
    areas = np.array([float(square.get("width")) * float(square.get("height")) for square in squares])
    assert [square.get("class") for square in squares] == ["plus" if value > 0 else "minus" for value in values]
    first = slice(0, 150)  # the group person_code
    assert np.corrcoef(areas[first], np.abs(values[first]))[0, 1] > 0.999
    assert areas[first].max() == pytest.approx((0.94 * hinton.CELL) ** 2, rel=0.01)
    corner = weights["person_code"][cases.output_names.index("Sophia"), 1]
    words = [square[0].text for square in squares]
    assert f"Sophia → person_code 2: {corner:+.2f}" in words
    assert sum(word.startswith("bias of ") for word in words) == 54


def test_the_two_families_stand_in_two_rows_as_in_figure_4():
    net = paper.build(PRESETS["rumelhart1986-family-trees"])
    weights = {name: view[0] for name, view in net.views(np.ones((1, 630))).items()}
    names = hinton.unit_names(net, paper.people() + paper.RELATIONS, paper.people())
    places = {
        square[0].text.split(" → ")[0]: (float(square.get("x")), float(square.get("y")))
        for square in squares_of(hinton.draw(net, weights, names, ""))
        if "person_code 1:" in square[0].text and "bias" not in square[0].text
    }
    assert all(places[english][1] < places[italian][1] for english, italian in TWINS.items())
    assert all(places[english][0] == places[italian][0] for english, italian in TWINS.items())


def test_the_file_of_a_run_shows_its_best_net_and_stands_by_itself(symmetry_run):
    text = (symmetry_run / "hinton.svg").read_text()
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "prefers-color-scheme: dark" in text
    drawn = sorted(abs(float(square.get("data-weight"))) for square in squares_of(text))
    rows = json.loads((symmetry_run / "results.json").read_text())["seeds"]
    textbook = [row for row in rows if row["textbook"]]
    flat = [sorted(abs(w) for matrix in row["weights"].values() for line in matrix for w in line) for row in textbook]
    assert any(drawn == pytest.approx(weights, abs=1e-4) for weights in flat)
