"""classiclm plan: what a training run will need, before it is started. Nothing is allocated.

Of a text only the size is looked at; the vocabulary is the preset's, or that of prepared data.
"""

import dataclasses
import glob
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from classiclm import registry
from classiclm.commands.runs import choose_preset, plain, resolve
from classiclm.commands.tables import show, table
from classiclm.commands.tasks import KINDS
from classiclm.config import Positive, Share
from classiclm.data.batches import BatchSizes
from classiclm.data.corpora import PLAYS_CHARACTERS
from classiclm.data.dataset import load_meta
from classiclm.data.splits import is_prepared
from classiclm.data.tokenizers import is_learnt
from classiclm.errors import BAD_INPUT, Error
from classiclm.files import is_path
from classiclm.nn.attention import choose_path
from classiclm.nn.init import shapes_only
from classiclm.nn.mask import Mask
from classiclm.objectives import choose_rows
from classiclm.train import hardware, machine, memory
from classiclm.train.settings import TrainConfig

_STRATEGIES: tuple[memory.Strategy, ...] = ("none", "ddp", "fsdp")
_MOST_GPUS = 1 << 16
_NAMED = {"shakespeare": 1_115_394, "plays": PLAYS_CHARACTERS, "multi30k": 4_100_000}  # bytes
_UNPACKED = 3  # times as large as a .gz file, about


@dataclass(frozen=True)
class PlanFlags(TrainConfig):
    """Say what a training run will need: memory by part, time, energy, and the settings that make it fit."""

    gpus: Positive = 1  # how many devices
    gpu: str = "auto"  # h200, h100, a100, a100-40gb, v100, 4090, 3090, t4, cpu; auto = this machine's
    utilisation: Share = 0.3  # assumed share of the peak of matrix products that training reaches
    json: bool = False  # as JSON
    config: str | None = None  # a YAML file with any of these settings


@dataclass(frozen=True)
class Run:
    """What is planned for: sizes, and the choices that a run would make on the device."""

    config: Any
    network: memory.Network
    device: hardware.Hardware
    precision: machine.Precision
    way: memory.Way
    micro_batch: int
    n_devices: int
    around: memory.Host | None  # on a CPU

    @property
    def share(self) -> int:
        """Of the batch, on each device."""
        return math.ceil(self.config.batch / self.n_devices)


def main(argv: Sequence[str], prog: str) -> int:
    """A table on stdout, or JSON. Raises Error (exit 2) for nets that need no plan, and for texts: none is read."""
    if choose_preset(PlanFlags, argv, prog)[0].recipe.task == "sweeps":
        raise Error("plan", "these nets have a few hundred weights and take seconds", "start classiclm train")
    flags, given = resolve(PlanFlags, argv, prog)
    if "tokenizer" in given and "vocab_size" not in given.get("model", {}):
        raise Error("tokenizer", "is not read by a plan", "give its size, as in --model.vocab_size 8000")
    made = describe(make_run(flags), flags.utilisation)
    if flags.json:
        print(json.dumps(made, indent=1))
    else:
        _print(made)
    return 0


def make_run(flags: Any) -> Run:
    """Settle every `auto` as `train` would on the device."""
    config, preset = _with_vocabulary(plain(flags)), registry.preset(str(flags.preset))
    device = hardware.hardware(flags.gpu, machine.look("auto" if flags.gpu == "auto" else "cpu"))
    precision, _ = machine.choose_precision(config.precision, device.machine)
    with shapes_only():
        model = preset.module.build(config.model)
    layer_mask = getattr(model, "layer_mask", None)  # banded layers
    n_layers = config.model.n_layers
    windows = [layer_mask(i, Mask(causal=True)).window for i in range(n_layers)] if layer_mask else ()
    network = memory.read(model, config.model.vocab_size, windows)
    path = config.attention
    if path == "auto":
        path = choose_path(torch.device("cpu" if device.cpu else "cuda"), config.model.n_ctx, config.model.dropout > 0)
    way = memory.Way(4 if precision == "fp32" else 2, path == "fused", device.cpu, checkpointing=config.recompute)
    micro = config.micro_batch
    if micro == "auto":
        micro = KINDS[preset.recipe.task].micro_batch(config, network.n_params, precision, device.machine)
    around = text_around(config, way) if device.cpu else None
    run = Run(config, network, device, precision, way, 1, flags.gpus, around)
    return dataclasses.replace(run, micro_batch=max(1, min(int(micro), run.share)))


def _with_vocabulary(config: Any) -> Any:
    """With the vocabulary's size of prepared data, which meta.json says."""
    if not is_prepared(config.data.name):
        return config
    size = load_meta(Path(config.data.name)).tokenizer.vocab_size
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=size))


def text_around(config: Any, way: memory.Way) -> memory.Host:
    """What text and libraries take. Raises Error (exit 3) for a path with nothing there."""
    kind: memory.Vocabulary = "published"
    if is_learnt(config.tokenizer):
        kind = "characters" if config.tokenizer == "char" else "learnt"
    prepared = is_prepared(config.data.name)
    n_bytes = 0 if prepared else _text_bytes(config.data.name)
    return memory.host(n_bytes, "published" if prepared else kind, prepared, way)


def _text_bytes(name: str) -> int:
    """The size of a named corpus, or of what a path stands for; compressed files as if unpacked."""
    if not is_path(name):
        return _NAMED.get(name, 0)
    files = [Path(found) for found in glob.glob(name)]
    files += [file for folder in files if folder.is_dir() for file in folder.rglob("*")]
    sizes = [file.stat().st_size * (_UNPACKED if file.suffix == ".gz" else 1) for file in files if file.is_file()]
    if not sizes:
        raise Error(f"--data {name}", "holds no file", "name a text, a folder with texts, or a corpus", BAD_INPUT)
    return sum(sizes)


def micro_of(run: Run) -> memory.Micro:
    """One micro-batch as numbers, with as many logits at a time as the run would make."""
    micro = _micro_of(run)
    rows = choose_rows(run.config.loss_chunk, micro.n_targets, run.network.vocab_size)
    return dataclasses.replace(micro, rows=rows)


def _micro_of(run: Run) -> memory.Micro:
    """All logits at once. Of translations, whose batch is counted in tokens, the longest sentences."""
    config = run.config
    if config.task == "pairs":
        return memory.Micro(run.micro_batch, min(config.model.n_ctx, run.micro_batch), run.micro_batch)
    n_ctx = config.model.n_ctx
    if config.task == "masked":
        first = config.first_ctx is not None and round(config.first_share * config.steps) >= config.steps
        n_ctx = config.first_ctx if first else n_ctx
        return memory.Micro(run.micro_batch * n_ctx, n_ctx, run.micro_batch * math.ceil(n_ctx * config.mask_share))
    return memory.Micro(run.micro_batch * n_ctx, n_ctx, run.micro_batch * n_ctx)


def _way(run: Run, strategy: memory.Strategy) -> memory.Way:
    return dataclasses.replace(run.way, joined=strategy != "fsdp")


def instants(run: Run, strategy: memory.Strategy) -> dict[str, int]:
    """Bytes on one device at each instant that can be the peak."""
    way = _way(run, strategy)
    held = memory.state(run.network, way, strategy, run.n_devices, run.config.optimizer)
    accumulating = run.micro_batch < run.share
    rest = (held, run.config.optimizer, accumulating, run.around)
    return memory.moments_of_a_step(run.network, micro_of(run), way, *rest)


def peak(run: Run, strategy: memory.Strategy = "none") -> int:
    """The most bytes that one device holds."""
    return max(instants(run, strategy).values())


def n_tokens(config: Any) -> int:
    """Tokens of the whole run, padding included."""
    if config.task == "pairs":
        return config.batch * config.steps
    if config.task == "masked" and config.first_ctx is not None:
        first = round(config.first_share * config.steps)
        return config.batch * (first * config.first_ctx + (config.steps - first) * config.model.n_ctx)
    return BatchSizes(config, config.model.n_ctx).before(config.steps) * config.model.n_ctx


def largest_micro_batch(run: Run, strategy: memory.Strategy) -> int:
    """The largest that fits and divides a device's share of the batch; 0 if even one does not fit."""
    sizes = [n for n in range(1, run.share + 1) if run.share % n == 0]
    fits = [n for n in sizes if peak(dataclasses.replace(run, micro_batch=n), strategy) <= run.device.usable]
    return max(fits, default=0)


def fewest_gpus(run: Run) -> int | None:
    """Devices that fsdp needs at least, a power of two; None if no number is enough."""
    counts = (1 << i for i in range(_MOST_GPUS.bit_length()))
    enough = (n for n in counts if peak(dataclasses.replace(run, n_devices=n), "fsdp") <= run.device.usable)
    return next(enough, None)


def remedies(run: Run) -> Iterator[tuple[str, int]]:
    """What makes a run smaller, each on top of those before, with the peak it then has; ends with the first that
    fits."""
    strategy: memory.Strategy = "none"
    for name, smaller in _steps_down(run):
        strategy = "fsdp" if name.startswith("fsdp") else strategy
        needed = peak(smaller, strategy)
        yield name, needed
        if needed <= run.device.usable:
            return


def _steps_down(run: Run) -> Iterator[tuple[str, Run]]:
    run = dataclasses.replace(run, micro_batch=1)
    yield "--micro_batch 1", run
    if not run.way.checkpointing:
        run = dataclasses.replace(run, way=dataclasses.replace(run.way, checkpointing=True))
        yield "--recompute", run
    if run.precision == "fp32" and run.device.machine.bf16:
        run = dataclasses.replace(run, precision="bf16", way=dataclasses.replace(run.way, width=2))
        yield "--precision bf16", run
    if not run.device.cpu:
        run = dataclasses.replace(run, n_devices=max(run.n_devices, fewest_gpus(run) or 1))
        yield f"fsdp on {run.n_devices} GPUs", run
    while run.config.model.n_ctx > 1:
        model = dataclasses.replace(run.config.model, n_ctx=run.config.model.n_ctx // 2)
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
        yield f"--model.n_ctx {model.n_ctx}", run


def describe(run: Run, utilisation: float) -> dict[str, Any]:
    """The plan as plain values: bytes, operations, seconds, joules."""
    if utilisation == 0:
        raise Error("--utilisation", "0 would take for ever", "give a share above 0, as in 0.3")
    micro, config, device = micro_of(run), run.config, run.device
    tokens = n_tokens(config)
    weights, attention = hardware.flops_per_token(run.network, micro)
    flops = (weights + attention) * tokens
    time = hardware.seconds(flops, device, run.n_devices, run.precision, utilisation)
    smallest = dataclasses.replace(run, micro_batch=1, way=dataclasses.replace(run.way, checkpointing=True))
    fits = {strategy: largest_micro_batch(run, strategy) for strategy in _STRATEGIES}
    return {
        "preset": config.preset,
        "device": {"name": device.name, "gpus": run.n_devices, "usable": device.usable, "source": device.source},
        "precision": run.precision,
        "parameters": run.network.n_params,
        "tokens": {"run": tokens, "micro_batch": micro.tokens},
        "batch": config.batch,
        "notes": list(_notes(run)),
        "micro_batch": run.micro_batch,
        "accumulation": math.ceil(run.share / run.micro_batch),
        "flops": {"weights_per_token": weights, "attention_per_token": attention, "run": flops},
        "utilisation": utilisation,
        "seconds": time,
        "joules": time * run.n_devices * device.watts if device.watts else None,
        "memory": {strategy: _parts(run, strategy) for strategy in _STRATEGIES},
        "fits": {
            s: {"micro_batch": n, "accumulation": math.ceil(run.share / n) if n else None} for s, n in fits.items()
        },
        "fewest_gpus_fsdp_checkpointing": None if device.cpu else fewest_gpus(smallest),
        "remedies": [] if peak(run) <= device.usable else [{"change": c, "peak": p} for c, p in remedies(run)],
    }


def _notes(run: Run) -> Iterator[str]:
    """A batch that the devices cannot share evenly, with the nearest that they can; how a process on a CPU differs."""
    batch, n = run.config.batch, run.n_devices
    if batch % n:
        near = " or ".join(str(size) for size in (batch - batch % n, batch - batch % n + n) if size)
        yield f"a batch of {batch} has no equal share for each of {n} devices: try --batch {near}"
    if run.device.cpu:
        yield "the C library may keep freed memory, and the process look up to twice as large: see docs/plan.md"


def _parts(run: Run, strategy: memory.Strategy) -> dict[str, Any]:
    way, micro = _way(run, strategy), micro_of(run)
    held = memory.state(run.network, way, strategy, run.n_devices, run.config.optimizer)
    parts = {name: value for name, value in dataclasses.asdict(held).items() if name != "parts"}
    parts["blocks"] = memory.blocks_bytes(run.network, micro, way)
    parts["ends"] = memory.ends_bytes(run.network, micro, way)
    parts["logits"] = memory.kept_logits_bytes(run.network, micro)
    parts["working"] = memory.working_bytes(run.network, micro, way)
    if run.around:
        parts |= {"text": run.around.text, "libraries": run.around.libraries}
    at = instants(run, strategy)
    return {"parts": parts, "instants": at, "peak": max(at.values()), "peak_at": max(at, key=lambda name: at[name])}


def _print(made: dict[str, Any]) -> None:
    flops, time, joules = made["flops"], made["seconds"], made["joules"]
    summary = table(["plan"], last=f"{made['preset']} on {made['device']['gpus']} x {made['device']['name']}")
    summary.add_row("parameters", f"{made['parameters']:,}")
    summary.add_row("tokens of the run", f"{made['tokens']['run']:,}")
    summary.add_row("batch", f"{made['batch']} = micro-batches of {made['micro_batch']} x {made['accumulation']}")
    summary.add_row("precision", made["precision"])
    summary.add_row("FLOPs a token", f"{flops['weights_per_token']:.3g} (6 N) + {flops['attention_per_token']:.3g}")
    summary.add_row("FLOPs of the run", f"{flops['run']:.3g}")
    summary.add_row("time", f"{time / 3600:,.3g} hours at {made['utilisation']:.0%} of the peak (assumed)")
    summary.add_row("energy", "unknown for a CPU" if joules is None else f"{joules / 3.6e6:,.3g} kWh, devices only")
    gpus = made["fewest_gpus_fsdp_checkpointing"]
    if gpus:
        summary.add_row("GPUs at least", f"{gpus}, with fsdp, activation checkpointing and micro-batches of 1")
    for note in made["notes"]:
        summary.add_row("note", note)
    show(summary)
    columns = made["memory"]
    parts = table(["GB on each device"], list(columns))
    for group in ("parts", "instants"):
        for name in columns["none"][group]:
            parts.add_row(name, *(_gb(columns[s][group][name]) for s in columns))
    parts.add_row("peak", *(f"{_gb(column['peak'])} ({column['peak_at']})" for column in columns.values()))
    parts.add_row("largest micro-batch", *(str(made["fits"][s]["micro_batch"] or "none fits") for s in columns))
    show(parts)
    _print_remedies(made)


def _print_remedies(made: dict[str, Any]) -> None:
    if not made["remedies"]:
        return
    rows = table([f"does not fit {_gb(made['device']['usable'])} GB; each on top of those before"], ["peak, GB"])
    for remedy in made["remedies"]:
        rows.add_row(cast(str, remedy["change"]), _gb(remedy["peak"]))
    show(rows)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3f}"
