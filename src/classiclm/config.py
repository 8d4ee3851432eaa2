"""Typed configuration <-> YAML <-> command-line flags: the only parser, and it imports no torch.

A schema is a frozen dataclass. Values come from three places, the later winning: the preset, a YAML file, flags. Every
key is checked against the schema and every value against its type, so a misspelling is an error that suggests the
nearest name. The comment behind a field is its help text:

    @dataclass(frozen=True)
    class Config:
        n_layers: Positive = 12  # blocks
"""

import argparse
import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import yaml
from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from classiclm.errors import BAD_INPUT, Error, did_you_mean


def _no_truth_value(value: Any) -> Any:
    if isinstance(value, bool):  # to Python, and so to pydantic, true is the number 1
        raise ValueError("input should be a number")
    return value


_Number = BeforeValidator(_no_truth_value)
Positive = Annotated[int, _Number, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, _Number, Field(ge=0, lt=2**63)]
Rate = Annotated[float, _Number, Field(ge=0, lt=1, allow_inf_nan=False)]  # a share that is never the whole
Share = Annotated[float, _Number, Field(ge=0, le=1, allow_inf_nan=False)]
PositiveFloat = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]


class Positional:
    """Marks a field that is given by its place on the command line: `run: Annotated[str, Positional]`."""


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises Error (exit 3) if it cannot be read or is not YAML, (exit 2) if no mapping."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise Error(path, e.strerror or "cannot be read", "give the path of a YAML file", BAD_INPUT) from e
    except UnicodeDecodeError as e:
        raise Error(path, "is not UTF-8 text", "give the path of a YAML file", BAD_INPUT) from e
    except (yaml.YAMLError, ValueError, RecursionError) as e:  # ValueError: a date like 2001-99-99
        why = "is not valid YAML: " + " ".join(str(e).split())
        raise Error(path, why, "correct the line it names", BAD_INPUT) from e
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise Error(path, f"holds a {type(tree).__name__}", "write a mapping of keys to values")
    return tree


def to_yaml(config: Any, leave_out: Sequence[str] = ()) -> str:
    """The YAML text that reproduces a config."""
    tree = {k: v for k, v in dataclasses.asdict(config).items() if k not in leave_out}
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    if re.search("[\x85\u2028\u2029\ud800-\udfff]", text):  # YAML's other line breaks, and bytes of odd file names
        text = yaml.safe_dump(tree, sort_keys=False)  # escaped
    return text


def merge(*trees: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another, later ones on top."""
    result: dict[str, Any] = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def validate(schema: type, tree: Mapping[str, Any], source: object = "configuration") -> Any:
    """An instance of the schema. Raises Error (exit 2) naming the first key that is unknown or has a wrong value."""
    tree = _check_keys(schema, tree, source, ())
    try:
        return TypeAdapter(schema).validate_python(tree)
    except ValidationError as e:
        raise _first_error(schema, e, source) from e


def _first_error(schema: type, e: ValidationError, source: object) -> Error:
    errors = e.errors()
    key = _key_of(schema, errors[0]["loc"])
    if errors[0]["type"] in ("missing", "missing_argument"):
        return Error(key, f"is missing from {source}", f"give it a value, as in --{key} VALUE")
    alike = [error["msg"].removeprefix("Value error, ") for error in errors if _key_of(schema, error["loc"]) == key]
    why = " or ".join(message[0].lower() + message[1:] for message in alike)
    value = errors[0]["input"]
    got = f", got {value!r}" if isinstance(value, (str, int, float, list)) else ""
    return Error(key or source, why + got, "give a value that fits")


def _key_of(schema: Any, location: tuple[int | str, ...]) -> str:
    """The dotted key; pydantic also puts the tried members of a union into the location."""
    key = []
    for part in location:
        if not dataclasses.is_dataclass(schema) or part not in fields_of(typing.cast(type, schema)):
            break
        key.append(str(part))
        schema = fields_of(typing.cast(type, schema))[part]
    return ".".join(key)


def fields_of(schema: type) -> dict[str, Any]:
    """Field name -> type, with its annotations."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(schema)}


def _check_keys(schema: type, tree: Any, source: object, path: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        shorthand = getattr(schema, "SHORTHAND", None)
        if shorthand and isinstance(tree, str):
            return {shorthand: tree}
        raise Error(".".join(path) or source, f"should be a mapping, got {tree!r}", "write it as key: value lines")
    known = fields_of(schema)
    checked = {}
    for key, value in tree.items():
        name = ".".join((*path, str(key)))
        if key not in known:
            raise Error(name, f"unknown key in {source}", did_you_mean(str(key), known))
        nested = dataclasses.is_dataclass(known[key]) and not dataclasses.is_dataclass(value)
        checked[key] = _check_keys(known[key], value, source, (*path, str(key))) if nested else value
    return checked


def with_model(schema: type, model_schema: type, recipe_schema: type) -> type:
    """The schema with its field `model` typed as one model's own Config, and the settings of that model's recipe.

    Equal arguments give the same class.
    """
    return _with_model(schema, model_schema, recipe_schema)


@functools.cache
def _with_model(schema: Any, model_schema: Any, recipe_schema: Any) -> type:
    field = ("model", model_schema, dataclasses.field(default_factory=model_schema))
    doc = {"__doc__": schema.__doc__}
    bases = (schema,) if issubclass(schema, recipe_schema) else (schema, recipe_schema)
    return dataclasses.make_dataclass(schema.__name__, [field], bases=bases, namespace=doc, frozen=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Error(self.prog, message, f"see `{self.prog} --help`")


def parse_flags(schema: type, argv: Sequence[str], prog: str, shown: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The nested mapping of those values that argv gives; `--help` prints the schema and exits.

    shown: nested values that --help names as defaults in place of the schema's own.
    Raises Error (exit 2) for an unknown flag, with the nearest known one.
    """
    description = (inspect.getdoc(schema) or "").split("\n\n")[0]
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    _add_flags(parser, schema, "", shown or {})
    known, rest = parser.parse_known_args(list(argv))
    if rest:
        _complain(rest[0], parser, prog)
    tree: dict[str, Any] = {}
    for dotted, value in vars(known).items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _complain(argument: str, parser: argparse.ArgumentParser, prog: str) -> NoReturn:
    if not argument.startswith("-"):
        raise Error(argument, f"{prog} does not expect this argument", f"see `{prog} --help`")
    flag = argument.split("=")[0]
    flags = [option for option in parser._option_string_actions if option.startswith("--")]
    raise Error(flag, "unknown flag", f"{did_you_mean(flag, flags)}; see `{prog} --help`")


def _add_flags(parser: argparse.ArgumentParser, schema: type, prefix: str, shown: Mapping[str, Any]) -> None:
    comments = field_comments(schema)
    for field in dataclasses.fields(schema):
        hint = fields_of(schema)[field.name]
        name = prefix + field.name
        if dataclasses.is_dataclass(hint):
            shorthand = getattr(hint, "SHORTHAND", None)
            if shorthand:
                help_text = f"{comments.get(field.name, '')} (= --{name}.{shorthand})"
                parser.add_argument(f"--{name}", dest=f"{name}.{shorthand}", help=help_text, **_value_of(field))
            _add_flags(parser, typing.cast(type, hint), name + ".", shown.get(field.name, {}))
        elif hint is not Any:
            default = shown.get(field.name, field.default)
            _add_flag(parser, field, hint, name, _with_default(comments.get(field.name, ""), default))


def _value_of(field: Any) -> dict[str, Any]:
    return {"default": argparse.SUPPRESS, "metavar": field.name.split(".")[-1].upper()}


def _with_default(comment: str, default: Any) -> str:
    known = default is not dataclasses.MISSING and default not in (None, False, "", ())
    return (f"{comment} [{default}]" if known else comment).strip().replace("%", "%%")


def _add_flag(parser: argparse.ArgumentParser, field: Any, hint: Any, name: str, shown: str) -> None:
    has_default = field.default is not dataclasses.MISSING
    metadata = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
    many = any(typing.get_origin(part) in (tuple, list) for part in (hint, *typing.get_args(hint)))
    if Positional in metadata:
        nargs = ("*" if has_default else "+") if many else "?" if has_default else None
        parser.add_argument(name, nargs=nargs, default=argparse.SUPPRESS, help=shown, metavar=field.name.upper())
    elif hint is bool and field.default is False:  # a switch; one that is on by default takes true or false
        parser.add_argument(f"--{name}", dest=name, action="store_true", default=argparse.SUPPRESS, help=shown)
    else:
        allowed = typing.get_args(hint)
        convert = _null_or_text if type(None) in allowed and str not in allowed else str
        nargs = "+" if many else None
        parser.add_argument(f"--{name}", dest=name, help=shown, type=convert, nargs=nargs, **_value_of(field))


def _null_or_text(text: str) -> str | None:
    return None if text == "null" else text


def field_comments(schema: type) -> dict[str, str]:
    """Field name -> the comment behind it in the source, base classes included."""
    comments: dict[str, str] = {}
    for cls in reversed(schema.__mro__[:-1]):
        try:
            source = inspect.getsource(cls)
        except (OSError, TypeError):  # made at run time: it has no source of its own
            continue
        comments |= dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", source, flags=re.MULTILINE))
    return comments


def difference(old: Mapping[str, Any], new: Mapping[str, Any], may_change: Sequence[str] = ()) -> list[str]:
    """Lines "key: old -> new" for all that differs, keys in `may_change` left out; empty if nothing does."""
    a, b = _flatten(old), _flatten(new)
    return [
        f"{key}: {a.get(key)} -> {b.get(key)}"
        for key in sorted(a.keys() | b.keys())
        if not _same(a.get(key), b.get(key)) and key not in may_change
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) and isinstance(b, (int, float)):
        return math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flatten(value, name + ".") if isinstance(value, Mapping) else {name: value}
    return flat
