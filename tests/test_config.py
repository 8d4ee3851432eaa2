"""Configuration: where values come from, what is refused and how, and that what is written can be read back."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from classiclm import registry
from classiclm.commands.runs import plain, resolve
from classiclm.commands.train import TrainFlags
from classiclm.config import (
    NonNegative,
    NonNegativeFloat,
    Positional,
    Positive,
    PositiveFloat,
    Rate,
    difference,
    field_comments,
    load_yaml,
    merge,
    parse_flags,
    to_yaml,
    validate,
    with_model,
)
from classiclm.errors import BAD_INPUT, USAGE, Error, did_you_mean
from classiclm.recipe import Recipe


@dataclass(frozen=True)
class Inner:
    """A nested part."""

    depth: Positive = 3  # how deep
    label: str = "a"  # any text


@dataclass(frozen=True)
class Example:
    """An example schema."""

    runs: Annotated[tuple[str, ...], Positional] = ()  # what to look at
    count: Positive = 4  # at least one
    start: NonNegative = 0  # from zero up
    lr: PositiveFloat = 1e-3  # above zero
    decay: NonNegativeFloat = 0.1  # from zero up
    rate: Rate = 0.5  # a share, 100% excluded
    mode: Literal["fast", "slow"] = "fast"  # one of two
    size: Literal["auto"] | Positive = "auto"  # a number or auto
    note: str | None = None  # some text
    clip: PositiveFloat | None = 1.0  # null = none
    quiet: bool = False  # say nothing
    bias: bool = True  # on unless false
    inner: Inner = field(default_factory=Inner)


def failure(call, *arguments):
    """The Error that a call raises."""
    with pytest.raises(Error) as caught:
        call(*arguments)
    return caught.value


def train(*argv):
    """The settings that `classiclm train ARGV` runs with."""
    return plain(resolve(TrainFlags, argv, "classiclm train")[0])


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


# Precedence


def test_flags_win_over_the_file_and_the_file_over_the_preset(yaml_file):
    preset = registry.preset("gpt2-shakespeare-cpu")
    path = yaml_file("preset: gpt2-shakespeare-cpu\nsteps: 7\nlr: 0.5\nmodel: {n_layers: 2, n_ctx: 16}\n")
    config = train("--config", str(path), "--lr", "0.25", "--model.n_ctx", "8")
    assert config.lr == 0.25
    assert config.steps == 7
    assert config.batch == preset.recipe.batch != Recipe().batch
    assert (config.model.n_layers, config.model.n_ctx, config.model.d_model) == (2, 8, preset.config.d_model)


def test_a_preset_on_the_command_line_wins_over_the_one_in_the_file(yaml_file):
    path = yaml_file("preset: ladder-3\nsteps: 7\n")
    config = train("gpt2-shakespeare", "--config", str(path))
    assert (config.preset, config.steps, config.model.n_layers) == ("gpt2-shakespeare", 7, 6)


@pytest.mark.parametrize(
    "argv",
    [
        ["gpt2-124m", "--model.n_layers", "4", "--seed", "5"],
        ["--model.n_layers", "4", "gpt2-124m", "--seed", "5"],
        ["--model.n_layers", "4", "--seed", "5", "gpt2-124m"],
        ["--seed=5", "--model.n_layers=4", "gpt2-124m"],
    ],
)
def test_the_order_of_preset_and_flags_does_not_matter(argv):
    config = train(*argv)
    assert (config.preset, config.model.n_layers, config.seed, config.model.d_model) == ("gpt2-124m", 4, 5, 768)


def test_the_sizes_of_the_default_preset_can_be_set_without_naming_it():
    assert train("--model.n_layers", "9").model.n_layers == 9


def test_data_as_a_name_and_as_a_mapping_mean_the_same(yaml_file):
    short = train("--config", str(yaml_file("data: plays\n")))
    long = train("--config", str(yaml_file("data: {name: plays}\n")))
    assert short == long == train("--data", "plays") == train("--data.name", "plays")


def test_merge_lays_nested_mappings_over_one_another_and_changes_neither():
    low, high = {"a": {"x": 1, "y": 2}, "b": 3}, {"a": {"y": 5}, "c": {"z": 6}}
    assert merge(low, high) == {"a": {"x": 1, "y": 5}, "b": 3, "c": {"z": 6}}
    assert low == {"a": {"x": 1, "y": 2}, "b": 3}
    assert merge({"a": {"x": 1}}, {"a": None}) == {"a": None}


# Unknown names


@pytest.mark.parametrize(
    ("tree", "wrong", "near"),
    [
        ({"cuont": 1}, "cuont", "count"),
        ({"inner": {"dept": 1}}, "inner.dept", "depth"),
        ({"Count": 1}, "Count", "count"),
        ({7: 1}, "7", "count"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it_and_the_nearest(tree, wrong, near):
    error = failure(validate, Example, tree)
    assert error.code == USAGE
    assert str(error).startswith(wrong + ":")
    assert near in str(error)


@pytest.mark.parametrize(
    ("argv", "wrong", "near"),
    [
        (["--cuont", "3"], "--cuont", "'--count'"),
        (["--inner.dept=3"], "--inner.dept", "'--inner.depth'"),
        (["--coun", "3"], "--coun", "'--count'"),  # no abbreviations
        (["a", "--quite"], "--quite", "'--quiet'"),
    ],
)
def test_an_unknown_flag_is_an_error_that_names_it_and_the_nearest(argv, wrong, near):
    error = failure(parse_flags, Example, ["run", *argv], "prog")
    assert error.code == USAGE
    assert str(error).startswith(wrong + ":")
    assert near in str(error)


@pytest.mark.parametrize(
    ("argv", "wrong", "near"),
    [
        (["--stepz", "3"], "--stepz", "'--steps'"),
        (["--model.n_layerz", "3"], "--model.n_layerz", "'--model.n_layers'"),
        (["--n_layers", "3"], "--n_layers", "'--model.n_layers'"),
        (["--wibble", "3", "gpt2-124m"], "--wibble", ""),
        (["gpt2-124"], "gpt2-124", "'gpt2-124m'"),
    ],
)
def test_train_names_the_unknown_flag_and_not_its_value(argv, wrong, near):
    error = failure(train, *argv)
    assert error.code == USAGE
    assert str(error).startswith(wrong + ":")
    assert near in str(error)


@pytest.mark.parametrize(
    ("name", "hint"), [("gpt2-355", "did you mean 'gpt2-355m'"), ("zzz", "choose from bert-base, gpt2-355m")]
)
def test_the_hint_is_the_nearest_name_or_all_of_them(name, hint):
    assert did_you_mean(name, {"gpt2-355m", "bert-base"}) == hint


# Bad values

NAN, INF = float("nan"), float("inf")
BAD = {
    "count": [0, -1, 1.5, NAN, INF, "x", "", True, None, [1], {"a": 1}, 10**30],
    "start": [-1, 0.5, NAN, "x", True, None, [], 2**64],
    "lr": [0, -1e-3, NAN, INF, "x", True, None, [1.0]],
    "decay": [-0.1, NAN, INF, "x", False, None, {}],
    "rate": [-0.1, 1, 1.0, 2, NAN, "x", True, None],
    "mode": ["quick", 1, True, None, ["fast"]],
    "size": [0, -3, "all", 1.5, True, None, [1]],
    "note": [5, 1.5, True, ["a"], {"a": 1}],
    "clip": [0, -1.0, NAN, INF, "x", True, [1.0]],
    "quiet": ["perhaps", 2, 0.5, None, []],
    "inner": [5, "a", None, ["depth"], True],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_bad_value_is_a_usage_error_that_names_its_key(key, value):
    error = failure(validate, Example, {key: value})
    assert error.code == USAGE
    assert str(error).startswith(f"{key}: ")
    assert str(error).endswith(".")
    assert "Fix: " in str(error)
    assert "\n" not in str(error)


def test_a_bad_value_inside_a_mapping_is_named_with_its_path():
    assert str(failure(validate, Example, {"inner": {"depth": -1}})).startswith("inner.depth: ")


@pytest.mark.parametrize("tree", [[1, 2], "text", 5, None])
def test_a_configuration_that_is_no_mapping_names_its_source(tree):
    error = failure(validate, Example, tree, "settings.yaml")
    assert error.code == USAGE
    assert str(error).startswith("settings.yaml: ")


def test_a_missing_value_is_asked_for_by_its_flag():
    @dataclass(frozen=True)
    class Needs:
        name: str

    error = failure(validate, Needs, {}, "the command line")
    assert error.code == USAGE
    assert str(error).startswith("name: is missing")
    assert "--name" in str(error)


def test_a_check_of_the_model_itself_is_told_with_its_own_words():
    error = failure(train, "gpt2-124m", "--model.d_model", "100")
    assert error.code == USAGE
    assert "n_heads = 12 does not divide d_model = 100" in str(error)


# YAML files


@pytest.mark.parametrize(
    "content",
    ["a: [1, 2", "a: b: c", "\t- x", "a: 2001-99-99", "%YAML 9", "!!python/object:os.system {}", "\x00", "[" * 5000],
)
def test_broken_yaml_is_bad_input_that_names_the_file(yaml_file, content):
    path = yaml_file(content)
    error = failure(load_yaml, path)
    assert error.code == BAD_INPUT
    assert str(error).startswith(f"{path}: ")
    assert "\n" not in str(error)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"lr: \xe9\n"])
def test_yaml_that_is_not_utf_8_is_bad_input(yaml_file, content):
    assert failure(load_yaml, yaml_file(content)).code == BAD_INPUT


def test_a_yaml_file_that_is_missing_or_a_folder_is_bad_input(tmp_path):
    assert failure(load_yaml, tmp_path / "none.yaml").code == BAD_INPUT
    assert failure(load_yaml, tmp_path).code == BAD_INPUT


@pytest.mark.parametrize("content", ["- a\n- b\n", "just text\n", "42\n"])
def test_yaml_that_holds_no_mapping_is_a_usage_error(yaml_file, content):
    assert failure(load_yaml, yaml_file(content)).code == USAGE


@pytest.mark.parametrize("content", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_yaml_file_is_an_empty_mapping(yaml_file, content):
    assert load_yaml(yaml_file(content)) == {}


@pytest.mark.parametrize("text", ["6e-4", "6E-4", "0.0006", "6.0e-4", "'6e-4'"])
def test_scientific_notation_in_yaml_is_a_number(yaml_file, text):
    config = train("--config", str(yaml_file(f"lr: {text}\n")))
    assert isinstance(config.lr, float)
    assert config.lr == 6e-4


def test_unknown_and_bad_keys_of_a_file_are_errors(yaml_file):
    assert str(failure(train, "--config", str(yaml_file("stepz: 3\n")))).startswith("stepz: ")
    assert str(failure(train, "--config", str(yaml_file("model: {n_layer: 3}\n")))).startswith("model.n_layer: ")
    assert str(failure(train, "--config", str(yaml_file("model: [1]\n")))).startswith("model: ")
    assert str(failure(train, "--config", str(yaml_file("lr: [1]\n")))).startswith("lr: ")


# Round trips

POSITIVE = st.integers(1, 2**31 - 1)
REAL = st.floats(0, 1e300, allow_nan=False, exclude_min=True)
TEXT = st.text(st.characters(exclude_categories=[]), max_size=30)  # surrogates too: bytes of odd file names
EXAMPLES = st.fixed_dictionaries(
    {},
    optional={
        "count": POSITIVE,
        "start": st.integers(0, 2**63 - 1),
        "lr": REAL,
        "decay": st.floats(0, 1e300),
        "rate": st.floats(0, 1, exclude_max=True),
        "mode": st.sampled_from(["fast", "slow"]),
        "size": st.just("auto") | POSITIVE,
        "note": st.none() | TEXT,
        "clip": st.none() | REAL,
        "quiet": st.booleans(),
        "bias": st.booleans(),
        "inner": st.fixed_dictionaries({}, optional={"depth": POSITIVE, "label": TEXT}),
    },
)


@settings(deadline=None, max_examples=200)
@given(EXAMPLES)
@example({"note": "\x85"})
@example({"note": "a\u2028\u2029b", "inner": {"label": "\udcff"}})
def test_a_written_configuration_reloads_equal(tree):
    config = validate(Example, tree)
    text = to_yaml(config, leave_out=["runs"])
    text.encode()
    again = validate(Example, yaml.safe_load(text))
    assert again == config
    assert to_yaml(again, leave_out=["runs"]) == text


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt2-shakespeare", "ladder-1", "ladder-12"])
def test_the_settings_of_a_preset_start_the_same_run_again(yaml_file, name):
    config = train(name, "--lr", "6e-4", "--data", "./a folder/ü: #1.txt", "--clip", "null")
    text = to_yaml(config)
    again = train("--config", str(yaml_file(text)))
    assert again == config
    assert to_yaml(again) == text


def test_leave_out_leaves_out():
    tree = yaml.safe_load(to_yaml(Example(), leave_out=["lr", "runs"]))
    assert set(tree) == {f.name for f in dataclasses.fields(Example)} - {"lr", "runs"}


# Difference


def test_difference_lists_what_changed_by_dotted_key():
    old = {"a": 1, "m": {"x": 1, "y": 2}, "gone": 3}
    new = {"a": 1, "m": {"x": 1, "y": 5}, "new": 4}
    assert difference(old, new) == ["gone: 3 -> None", "m.y: 2 -> 5", "new: None -> 4"]
    assert difference(old, new, may_change=["m.y", "gone", "new"]) == []
    assert difference(old, old) == []


def test_difference_forgives_the_last_bit_of_a_float_and_nothing_else():
    assert difference({"lr": 0.1}, {"lr": math.nextafter(0.1, 1)}) == []
    assert difference({"lr": 0.1}, {"lr": 0.1 + 1e-9}) == ["lr: 0.1 -> 0.100000001"]
    assert difference({"clip": 1.0}, {"clip": None}) == ["clip: 1.0 -> None"]
    assert difference({"clip": 1.0}, {"clip": 1}) == []


# Flags and help


def test_flags_give_only_what_was_asked_for():
    assert parse_flags(Example, ["a", "b", "--inner.depth", "2", "--quiet"], "prog") == {
        "runs": ["a", "b"],
        "inner": {"depth": "2"},
        "quiet": True,
    }


def test_a_switch_that_is_on_by_default_can_be_put_out():
    assert validate(Example, parse_flags(Example, ["run", "--bias", "false"], "prog")).bias is False
    assert train("gpt2-124m", "--model.bias", "false").model.bias is False


def test_null_means_none_for_numbers_and_stays_a_word_for_texts():
    config = validate(Example, parse_flags(Example, ["null", "--clip", "null", "--note", "null"], "prog"))
    assert config.clip is None
    assert config.note == "null"
    assert config.runs == ("null",)


@pytest.mark.parametrize("argv", [["--count"], ["a", "--quiet=yes"]])
def test_incomplete_flags_are_usage_errors(argv):
    assert failure(parse_flags, Example, argv, "prog").code == USAGE


def test_negative_numbers_reach_the_check_of_their_own_field():
    error = failure(validate, Example, parse_flags(Example, ["a", "--count", "-3"], "prog"))
    assert str(error).startswith("count: ")


def leaves(schema, prefix=""):
    """Every field of a schema by its dotted name."""
    for f in dataclasses.fields(schema):
        if dataclasses.is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        elif f.type is not Any:
            yield prefix + f.name


def printed_help(schema, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_flags(schema, ["--help"], "prog")
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_prints_every_field_with_its_comment_and_its_default(capsys):
    text = " ".join(printed_help(Example, capsys).split())
    for name in leaves(Example):
        assert name.upper() in text if name == "runs" else f"--{name}" in text
    for comment in field_comments(Example).values():
        assert comment in text
    assert "An example schema." in text
    assert "at least one [4]" in text


def test_help_of_train_prints_every_setting_of_the_run_and_of_the_model(capsys):
    full = with_model(TrainFlags, registry.preset("gpt2-124m").module.Config, Recipe)
    text = printed_help(full, capsys)
    names = [f.name for f in dataclasses.fields(TrainFlags) if f.name not in ("preset", "model")]
    sizes = [f"model.{f.name}" for f in dataclasses.fields(registry.preset("gpt2-124m").config)]
    assert [name for name in [*names, *sizes, "data.name", "data.errors"] if f"--{name} " not in text] == []


@pytest.mark.parametrize("schema", [Recipe, TrainFlags, Example])
def test_every_field_has_a_comment(schema):
    assert {f.name for f in dataclasses.fields(schema)} - set(field_comments(schema)) <= {"inner"}
    assert "decoupled, on matrices only" in field_comments(Recipe)["weight_decay"]
