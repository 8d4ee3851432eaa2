"""classiclm evaluate: how well trained models predict a text, in units that can be compared."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from classiclm import registry
from classiclm.commands.tables import show, table
from classiclm.config import Positional, load_yaml, parse_flags, validate
from classiclm.data.batches import evaluation_batches
from classiclm.data.corpora import Data
from classiclm.data.splits import prepare_text
from classiclm.errors import BAD_INPUT, Error
from classiclm.objectives import CausalLM, mean_loss
from classiclm.train import machine

_LOGITS = 1 << 26  # numbers at once: 256 MB in fp32


@dataclass(frozen=True)
class EvaluateFlags:
    """Loss, perplexity and bits per character and byte of trained models on a text.

    Every token of the split but the first is predicted once, in adjoining windows of the model's n_ctx, in fp32.
    """

    runs: Annotated[tuple[str, ...], Positional] = ()  # folders of runs
    data: str | None = None  # named corpus, text file or folder; default: what the run was trained on
    split: Literal["train", "val"] = "val"  # which part of the text
    checkpoint: str = "last"  # last, best or a saved step
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    json: bool = False  # as JSON


def main(argv: Sequence[str], prog: str) -> int:
    """One row per run."""
    flags = validate(EvaluateFlags, parse_flags(EvaluateFlags, argv, prog), "the command line")
    if not flags.runs:
        raise Error("RUN", "is missing", f"name the folders of one or more runs, as in {prog} runs/a runs/b")
    rows = [measure(run, flags) for run in flags.runs]
    if flags.json:
        print(json.dumps(rows, indent=1))
        return 0
    made = table(["run", "model", "data"], ["step", "loss", "perplexity", "bits/char", "bits/byte"])
    for row in rows:
        numbers = [f"{row[key]:.4f}" for key in ("loss", "perplexity", "bits_per_char", "bits_per_byte")]
        made.add_row(row["run"], row["model"], f"{row['data']}, {row['split']}", str(row["step"]), *numbers)
    show(made)
    return 0


def measure(run: str, flags: EvaluateFlags) -> dict[str, Any]:
    """loss (nats per token), perplexity (per token), bits_per_char, bits_per_byte of one run, and what they are of."""
    loaded = registry.open_run(run, flags.checkpoint, machine.look(flags.device).device)
    data_config = Data(flags.data) if flags.data else _data_of(Path(run))
    data = prepare_text(data_config, loaded.tokenizer)
    split = data.split(flags.split)
    n_ctx = loaded.model.n_ctx or loaded.model.config.n_ctx
    batch = max(1, _LOGITS // (n_ctx * data.tokenizer.vocab_size))
    loss = mean_loss(loaded.model, CausalLM(), evaluation_batches(split, n_ctx, batch))
    bits = loss * (len(split.tokens) - 1) / math.log(2)
    return {
        "run": run,
        "model": loaded.info["preset"],
        "step": int(loaded.folder.name.rpartition("-")[2]),
        "data": data.name,
        "split": flags.split,
        "n_tokens": len(split.tokens) - 1,
        "n_ctx": n_ctx,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_char": bits / split.n_chars,
        "bits_per_byte": bits / split.n_bytes,
    }


def _data_of(run: Path) -> Data:
    path = run / "config.yaml"
    tree = load_yaml(path).get("data")
    if tree is None:
        raise Error(path, "does not say which text the run was trained on", "name it with --data", BAD_INPUT)
    return validate(Data, tree, path)
