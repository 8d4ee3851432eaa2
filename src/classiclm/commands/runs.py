"""From a config to a trainer: the wiring that `train`, `ladder` and `demo` share."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from classiclm import registry
from classiclm.config import load_yaml, merge, parse_flags, validate, with_model
from classiclm.data.batches import Windows, evaluation_batches
from classiclm.data.splits import TextData, prepare_text
from classiclm.errors import Error
from classiclm.nn.attention import choose_path, set_attention_path
from classiclm.objectives import CausalLM
from classiclm.train import machine
from classiclm.train.progress import say
from classiclm.train.settings import TrainConfig
from classiclm.train.trainer import Task, Trainer

DEFAULT_PRESET = "gpt2-shakespeare-cpu"


def resolve(schema: type, argv: Sequence[str], prog: str) -> tuple[Any, dict[str, Any]]:
    """Preset < YAML file < flags -> a checked config of the schema, its `model` typed by the preset's family; and what
    file and flags gave."""
    looked = [argument for argument in argv if argument not in ("-h", "--help")]
    first = parse_flags(with_model(schema, registry.any_config()), looked, prog)
    path = first.get("config")
    from_file = load_yaml(Path(path)) if path else {}
    name = first.get("preset") or from_file.get("preset") or DEFAULT_PRESET
    preset = registry.preset(str(name))
    full = with_model(schema, preset.module.Config)
    base = {
        "preset": preset.name,
        **dataclasses.asdict(preset.recipe),
        "model": dataclasses.asdict(preset.config),
    }
    flags = parse_flags(full, argv, prog, shown=base)
    given = merge(_expand(from_file), flags)
    config = validate(full, merge(base, given), path or "the command line")
    return dataclasses.replace(config, preset=preset.name), given


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    """`data: shakespeare` in a file means `data: {name: shakespeare}`."""
    if isinstance(tree.get("data"), str):
        return {**tree, "data": {"name": tree["data"]}}
    return tree


def make_trainer(run: Path, config: TrainConfig, label: str = "train", data: TextData | None = None) -> Trainer:
    """Read the text, settle every `auto`, build the model, say what will happen on one line of stderr."""
    preset = registry.preset(str(config.preset))
    data = data or prepare_text(config.data, config.tokenizer)
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
    task = _task(preset, config, plan, data)  # before the model: a text that is too short is found out at once
    torch.manual_seed(config.seed)
    model = preset.module.build(config.model)
    set_attention_path(model, config.attention)
    say(describe(plan, config, model.count_parameters(), data))
    return Trainer(run, config, plan, model, task, label)


def _with_vocabulary(config: TrainConfig, data: TextData) -> TrainConfig:
    model = dataclasses.replace(config.model, vocab_size=data.tokenizer.vocab_size)
    return dataclasses.replace(config, model=model)


def check_vocabulary(given: dict[str, Any], data: TextData) -> None:
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
        micro_batch = machine.choose_micro_batch(config.batch, _sizes(config.model, n_params), precision, here)
    compiled, why_compiled = machine.choose_compile(config.compile, here)
    reasons = (here.name, why, why_compiled)
    return machine.Plan(here.device, precision, min(int(micro_batch), config.batch), compiled, reasons)


def _attention(config: TrainConfig, plan: machine.Plan) -> Any:
    if config.attention != "auto":
        return config.attention
    return choose_path(torch.device(plan.device), config.model.n_ctx, config.model.dropout > 0)


def _sizes(model: Any, n_params: int) -> machine.Sizes:
    d_ff = getattr(model, "d_ff", None) or 4 * model.d_model
    return machine.Sizes(model.n_ctx, d_ff, model.n_layers, model.vocab_size, n_params)


def describe(plan: machine.Plan, config: TrainConfig, n_params: int, data: TextData) -> str:
    """The one line about device, precision and batch."""
    name, why, why_compiled = plan.reasons
    tokens = config.batch * config.model.n_ctx
    return (
        f"{config.preset}: {n_params:,} parameters on {data.name} ({len(data.train.tokens):,} tokens); {name}; "
        f"{plan.precision} ({why}); {config.batch} x {config.model.n_ctx} = {tokens:,} tokens a step "
        f"in micro-batches of {plan.micro_batch}; {config.attention} attention; {why_compiled}"
    )


def _task(preset: registry.Preset, config: TrainConfig, plan: machine.Plan, data: TextData) -> Task:
    n_ctx = config.model.n_ctx
    info = {"family": preset.family, "preset": preset.name, "config": dataclasses.asdict(config.model)}
    return Task(
        objective=CausalLM(),
        batches=Windows(data.train, n_ctx, config, config.seed),
        validation=lambda n_windows: evaluation_batches(data.val, n_ctx, plan.micro_batch, n_windows),
        tokens_per_byte=(len(data.val.tokens) - 1) / data.val.n_bytes,
        fingerprint=data.train.fingerprint,
        files={"model.json": json.dumps(info, indent=1), "tokenizer.json": data.tokenizer.to_json()},
    )
