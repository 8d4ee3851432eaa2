"""From names to models: presets of all families, and runs on disk.

The registry is the folder models/: each module with PRESETS is a family. Adding a paper is adding a file.
"""

import dataclasses
import importlib
import pkgutil
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import classiclm.models
from classiclm.config import fields_of, validate
from classiclm.data.tokenizers import Tokenizer, from_json
from classiclm.errors import BAD_INPUT, Error, did_you_mean
from classiclm.nn.base import Model
from classiclm.nn.init import shapes_only
from classiclm.recipe import Recipe
from classiclm.train import checkpoint

_MEAN = re.compile("mean-([1-9][0-9]*)")  # the mean of so many checkpoints


@dataclass(frozen=True)
class Preset:
    """A name such as "gpt2-355m", resolved."""

    name: str
    module: ModuleType
    config: Any
    recipe: Recipe
    paper_params: str | None

    @property
    def family(self) -> str:
        """The module's name, as in models/gpt2.py."""
        return self.module.__name__.rpartition(".")[2]

    def build(self) -> Model:
        """The model with fresh weights."""
        return self.module.build(self.config)


@cache
def families() -> dict[str, ModuleType]:
    """Name -> module, for every file in models/ that has presets."""
    names = sorted(info.name for info in pkgutil.iter_modules(classiclm.models.__path__))
    modules = {name: importlib.import_module(f"classiclm.models.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "PRESETS")}


def presets() -> dict[str, Preset]:
    """All presets by name."""
    return {
        name: Preset(name, module, config, module.RECIPES[name], module.PAPER_PARAMS.get(name))
        for module in families().values()
        for name, config in module.PRESETS.items()
    }


def any_config() -> type:
    """A schema with the sizes of every family: which flags there are, before it is known which family is meant."""
    return _union("Config", [module.Config for module in families().values()])


def any_recipe() -> type:
    """A schema with the settings of every kind of recipe, for the same purpose."""
    return _union("Recipe", list(dict.fromkeys(type(preset.recipe) for preset in presets().values())))


def _union(name: str, schemas: list[type]) -> type:
    known = {
        field.name: (field.name, fields_of(schema)[field.name], dataclasses.field(default=None))
        for schema in schemas
        for field in dataclasses.fields(schema)
    }
    return dataclasses.make_dataclass(name, known.values(), frozen=True, kw_only=True)


def preset(name: str) -> Preset:
    """The preset of a name. Raises Error (exit 2) with the nearest name."""
    known = presets()
    if name not in known:
        raise Error(name, "is no preset", f"{did_you_mean(name, known)}; `classiclm models` lists them")
    return known[name]


def count_parameters(preset: Preset) -> int:
    """How many numbers a model has, without allocating them."""
    with shapes_only():
        return preset.build().count_parameters()


@dataclass(frozen=True)
class Loaded:
    """A trained model with its tokenizer, which checkpoint they came from, and what kind of learning it was."""

    model: Model
    tokenizer: Tokenizer
    folder: Path
    info: dict[str, Any]
    task: str  # as in its recipe


def open_run(run: str | Path, which: str = "last", device: str = "cpu") -> Loaded:
    """The model and tokenizer of a checkpoint: "last", "best", a step, or "mean-5": the mean of the last five.

    Raises Error (exit 3) if there is none, or if weights, sizes and vocabulary do not fit one another.
    """
    mean = _MEAN.fullmatch(which)
    folder = checkpoint.require(Path(run), "last" if mean else which)
    info = checkpoint.read_model_info(folder)
    module = families().get(info["family"])
    if module is None:
        why = f"is of the family {info['family']!r}, which this version does not have"
        raise Error(folder, why, "load it with the version that wrote it", BAD_INPUT)
    if task_of(module) == "sweeps":
        fix = f"look at {Path(run) / 'results.json'} and hinton.svg beside it"
        raise Error(run, f"holds nets of {info['family']}, which know no text", fix)
    with shapes_only():  # nobody needs random weights first
        model = module.build(validate(module.Config, info["config"], folder / "model.json"))
    if mean:
        checkpoint.load_mean(Path(run), int(mean[1]), model)
    else:
        checkpoint.load_weights(folder, model)
    tokenizer = from_json((folder / "tokenizer.json").read_text(encoding="utf-8"), folder / "tokenizer.json")
    if tokenizer.vocab_size != model.config.vocab_size:
        why = f"has {tokenizer.vocab_size} tokens, and the model {model.config.vocab_size}"
        raise Error(folder / "tokenizer.json", why, "restore the folder from a copy", BAD_INPUT)
    return Loaded(model.to(device).eval(), tokenizer, folder, info, task_of(module))


def task_of(family: ModuleType) -> str:
    """What kind of learning a family is for: causal, masked, pairs ..."""
    return next(iter(family.RECIPES.values())).task


def load(run: str | Path, which: str = "last") -> tuple[Model, Tokenizer]:
    """`model, tokenizer = load("runs/a")`: the newest checkpoint of a run, in evaluation mode, on the CPU."""
    loaded = open_run(run, which)
    return loaded.model, loaded.tokenizer
