"""From a config to a trainer: the wiring that `train`, `ladder` and `demo` share."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from classiclm import registry
from classiclm.commands.tasks import KINDS, Corpus, Kind, make_task
from classiclm.config import load_yaml, merge, parse_flags, validate, with_model
from classiclm.data.splits import is_prepared
from classiclm.data.tokenizers import is_learnt, load_tokenizer
from classiclm.errors import Error
from classiclm.nn.attention import choose_path, set_attention_path
from classiclm.train import machine
from classiclm.train.distributed import World
from classiclm.train.progress import say
from classiclm.train.settings import TrainConfig
from classiclm.train.trainer import Trainer

DEFAULT_PRESET = "gpt2-shakespeare-cpu"


def resolve(schema: type, argv: Sequence[str], prog: str) -> tuple[Any, dict[str, Any]]:
    """Preset < YAML file < flags -> a checked config of the schema, its `model` and its recipe typed by the preset; and
    what file and flags gave."""
    preset, from_file, path = choose_preset(schema, argv, prog)
    full = with_model(schema, preset.module.Config, type(preset.recipe))
    recipe = dataclasses.asdict(preset.recipe)
    base = _expand({"preset": preset.name, **recipe, "model": dataclasses.asdict(preset.config)})
    flags = parse_flags(full, argv, prog, shown=base)
    given = merge(_expand(from_file), flags)
    config = validate(full, merge(base, given), path or "the command line")
    return dataclasses.replace(config, preset=preset.name), given


def choose_preset(schema: type, argv: Sequence[str], prog: str) -> tuple[registry.Preset, dict[str, Any], str | None]:
    """The preset that flags or --config name, the content of that file, and its path."""
    looked = [argument for argument in argv if argument not in ("-h", "--help")]
    first = parse_flags(with_model(schema, registry.any_config(), registry.any_recipe()), looked, prog)
    path = first.get("config")
    from_file = load_yaml(Path(path)) if path else {}
    name = first.get("preset") or from_file.get("preset") or DEFAULT_PRESET
    return registry.preset(str(name)), from_file, path


def plain(flags: Any) -> Any:
    """The settings of the run itself, without `out`, `config` and other flags of a command: what config.yaml holds."""
    recipe = registry.preset(str(flags.preset)).recipe
    schema = with_model(TrainConfig, type(flags.model), type(recipe))
    return schema(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(schema)})


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    """`data: shakespeare` in a file means `data: {name: shakespeare}`."""
    if isinstance(tree.get("data"), str):
        return {**tree, "data": {"name": tree["data"]}}
    return tree


def prepare(config: TrainConfig) -> Corpus:
    """Read, split and tokenise what the preset's kind of learning needs."""
    return _kind(config).prepare(config.data, config.tokenizer)


def make_trainer(
    run: Path, config: TrainConfig, label: str = "train", data: Corpus | None = None, world: World | None = None
) -> Trainer:
    """Read the data, settle every `auto`, build the model, say what will happen on one line of stderr.

    world: the processes that train together; None = this one alone.
    """
    preset = registry.preset(str(config.preset))
    data = data or prepare(config)
    config = _with_vocabulary(config, data)
    plan = _plan(config, registry.count_parameters(dataclasses.replace(preset, config=config.model)))
    config = dataclasses.replace(
        config,
        device=plan.device,
        precision=plan.precision,
        micro_batch=plan.micro_batch,
        compile=plan.compile,
        attention=_attention(config, plan),
    )
    if plan.device == "cpu":
        machine.keep_freed_memory()
    task = make_task(preset, config, plan, data)  # before the model: too little text is found out at once
    torch.manual_seed(config.seed)
    model = preset.module.build(config.model)
    set_attention_path(model, config.attention)
    say(describe(plan, config, model.count_parameters(), data))
    return Trainer(run, config, plan, model, task, label, world)


def _kind(config: TrainConfig) -> Kind:
    return KINDS[registry.preset(str(config.preset)).recipe.task]


def _with_vocabulary(config: TrainConfig, data: Corpus) -> TrainConfig:
    """The config with the vocabulary's size, and with the tokenizer of prepared data, which has its own."""
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    tokenizer = data.name if is_prepared(data.name) else config.tokenizer
    return dataclasses.replace(config, model=model, tokenizer=tokenizer)


def check_tokenizer(given: dict[str, Any], data: Corpus) -> None:
    """A tokenizer that was asked for has to be that of prepared data. Raises Error (exit 2)."""
    asked = given.get("tokenizer")
    if asked is None or not is_prepared(data.name):
        return
    if is_learnt(asked) or load_tokenizer(asked).fingerprint != data.tokenizer.fingerprint:
        why = f"{asked} was asked for, and {data.name} holds the tokens of its own"
        raise Error("--tokenizer", why, "leave it out, or prepare the text with it")


def check_vocabulary(given: dict[str, Any], data: Corpus) -> None:
    """A vocabulary size that was asked for has to be the tokenizer's. Raises Error (exit 2)."""
    asked, true = given.get("model", {}).get("vocab_size"), data.tokenizer.vocab_size
    if asked is not None and int(float(asked)) != true:
        why = f"{asked} was asked for, and the tokenizer has {true} tokens"
        raise Error("model.vocab_size", why, "leave it out; it always comes from the tokenizer")


def _plan(config: TrainConfig, n_params: int) -> machine.Plan:
    here = machine.look(config.device)
    precision, why = machine.choose_precision(config.precision, here)
    micro_batch = config.micro_batch
    if micro_batch == "auto":
        micro_batch = _kind(config).micro_batch(config, n_params, precision, here)
    compiled, why_compiled = machine.choose_compile(config.compile, here)
    reasons = (here.name, why, why_compiled)
    return machine.Plan(here.device, precision, min(int(micro_batch), config.batch), compiled, reasons)


def _attention(config: TrainConfig, plan: machine.Plan) -> Any:
    if config.attention != "auto":
        return config.attention
    return choose_path(torch.device(plan.device), config.model.n_ctx, config.model.dropout > 0)


def describe(plan: machine.Plan, config: TrainConfig, n_params: int, data: Corpus) -> str:
    """The one line about device, precision and batch."""
    name, why, why_compiled = plan.reasons
    return (
        f"{config.preset}: {n_params:,} parameters on {_kind(config).batch(config, data)} "
        f"in micro-batches of {plan.micro_batch}; {name}; {plan.precision} ({why}); "
        f"{config.attention} attention; {why_compiled}"
    )
