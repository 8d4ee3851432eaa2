"""classiclm evaluate: how well trained models predict or translate, in units that can be compared."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from classiclm import registry
from classiclm.commands.tables import show, table
from classiclm.commands.tasks import KINDS
from classiclm.config import (
    NonNegativeFloat,
    Positional,
    Positive,
    fields_of,
    load_yaml,
    merge,
    parse_flags,
    validate,
)
from classiclm.data.batches import evaluation_batches
from classiclm.data.corpora import Data
from classiclm.data.masked import masked_evaluation_batches, unigram_entropy
from classiclm.data.pairs import PairData, Pairs, pair_evaluation_batches
from classiclm.data.sentences import SentenceData, Sentences
from classiclm.data.splits import Split, TextData, n_targets
from classiclm.errors import BAD_INPUT, Error
from classiclm.evaluate.bleu import bleu
from classiclm.generate.beam import translate
from classiclm.generate.packed import Packing, pack
from classiclm.objectives import CausalLM, MaskedLM, Translation, mean_loss, measure
from classiclm.recipe import MaskedRecipe
from classiclm.train import machine
from classiclm.train.progress import say

_LOGITS = 1 << 26  # numbers at once: 256 MB in fp32
_COLUMNS = {  # of the table for each kind of model: key -> heading
    "causal": {"loss": "loss", "perplexity": "perplexity", "bits_per_char": "bits/char", "bits_per_byte": "bits/byte"},
    "masked": {
        "mlm": "masked LM",
        "unigram_entropy": "unigrams",
        "nsp": "next sentence",
        "nsp_accuracy": "right",
        "nsp_random": "random",
    },
    "pairs": {"loss": "loss", "perplexity": "perplexity", "bits_per_byte": "bits/byte", "bleu": "BLEU"},
}


@dataclass(frozen=True)
class EvaluateFlags:
    """Loss, perplexity, bits per character and byte of next-token models; the two losses of masked models; BLEU.

    In fp32, unless --precision says otherwise. For a next-token model every token of the split but the first is
    predicted once, in adjoining windows of its n_ctx. A masked model is given the same exercises whatever it was
    trained on: 15 % masked, 80/10/10.
    """

    runs: Annotated[tuple[str, ...], Positional] = ()  # folders of runs
    data: Data = Data()  # named corpus, text file or folder; default: what the run was trained on, and how
    split: str = "val"  # which part: train, val; or a test set of a pair corpus, as in test_2016_flickr
    checkpoint: str = "last"  # last, best, a saved step, or mean-5 for the mean of the last five
    beam: Positive = 4  # of translations; 1 = greedy
    alpha: NonNegativeFloat = 0.6  # of the beam's length penalty
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    precision: Packing = "fp32"  # of the matrices, as of `generate`: what packing them costs in quality
    json: bool = False  # as JSON


def main(argv: Sequence[str], prog: str) -> int:
    """One row per run, one table per kind of model."""
    given = parse_flags(EvaluateFlags, argv, prog, shown={"data": dict.fromkeys(fields_of(Data), "")})
    flags = validate(EvaluateFlags, given, "the command line")
    if not flags.runs:
        raise Error("RUN", "is missing", f"name the folders of one or more runs, as in {prog} runs/a runs/b")
    rows = [measure_run(run, flags, given.get("data", {})) for run in flags.runs]
    if flags.json:
        print(json.dumps(rows, indent=1))
        return 0
    for task in dict.fromkeys(row["task"] for row in rows):
        _print_table(task, [row for row in rows if row["task"] == task])
    return 0


def _print_table(task: str, rows: list[dict[str, Any]]) -> None:
    made = table(["run", "model", "data"], ["step", *_COLUMNS[task].values()])
    for row in rows:
        numbers = [f"{row[key]:.4f}" for key in _COLUMNS[task]]
        made.add_row(row["run"], row["model"], f"{row['data']}, {row['split']}", str(row["step"]), *numbers)
    show(made)
    for row in rows:
        if "bleu_signature" in row:
            print(f"{row['run']}: BLEU of beam {row['beam']}, alpha {row['alpha']}: {row['bleu_signature']}")


def measure_run(run: str, flags: EvaluateFlags, given: dict[str, Any]) -> dict[str, Any]:
    """The measures of one run, and what they are of; `given` is what the flags say of the data."""
    loaded = registry.open_run(run, flags.checkpoint, machine.look(flags.device).device)
    pack(loaded.model, flags.precision)
    data = KINDS[loaded.task].prepare(_data_of(Path(run), given), loaded.tokenizer)
    split = data.split(flags.split)
    measures = _MEASURES[loaded.task](loaded, data, split, flags)
    return {
        "run": run,
        "model": loaded.info["preset"],
        "task": loaded.task,
        "checkpoint": flags.checkpoint,
        "step": int(loaded.folder.name.rpartition("-")[2]),
        "data": data.name,
        "split": flags.split,
        "precision": flags.precision,
        **measures,
    }


def _causal(loaded: registry.Loaded, data: TextData, split: Split, flags: EvaluateFlags) -> dict[str, Any]:
    """loss (nats per token), perplexity (per token), bits_per_char, bits_per_byte."""
    n_ctx = loaded.model.config.n_ctx
    batch = max(1, _LOGITS // (n_ctx * data.tokenizer.vocab_size))
    loss = mean_loss(loaded.model, CausalLM(), evaluation_batches(split, n_ctx, batch, documents=data.documents))
    n_tokens = n_targets(split, data.documents)
    bits = loss * n_tokens / math.log(2)
    sizes = {"n_tokens": n_tokens, "n_ctx": n_ctx, "loss": loss, "perplexity": math.exp(loss)}
    return sizes | {"bits_per_char": bits / split.n_chars, "bits_per_byte": bits / split.n_bytes}


def _masked(loaded: registry.Loaded, data: SentenceData, split: Sentences, flags: EvaluateFlags) -> dict[str, Any]:
    """loss (their sum), mlm and nsp (nats), perplexity (per masked token), nsp_accuracy; and what they have to beat:
    the entropy of the split's tokens without any context, in nats, and the share of random pairs."""
    n_ctx, tokenizer = loaded.model.config.n_ctx, data.tokenizer
    batch = max(1, _LOGITS // (n_ctx * tokenizer.vocab_size))
    batches = masked_evaluation_batches(split, tokenizer, n_ctx, MaskedRecipe(), batch)
    measured = measure(loaded.model, MaskedLM(), batches)
    perplexity, entropy = math.exp(measured.terms["mlm"]), unigram_entropy(split)
    return {"loss": measured.total, **measured.terms, "perplexity": perplexity, "unigram_entropy": entropy}


def _pairs(loaded: registry.Loaded, data: PairData, split: Pairs, flags: EvaluateFlags) -> dict[str, Any]:
    """loss (nats per target token, without smoothing), perplexity, bits_per_byte of the target text, and BLEU."""
    end, whole = cast(int, data.tokenizer.end_of_text), len(split)
    split = split.within(loaded.model.n_ctx)
    if len(split) < whole:
        say(f"warning: {whole - len(split)} of {whole} pairs have more tokens than the model has places: left out")
    tokens = max(1, _LOGITS // data.tokenizer.vocab_size)
    batches = pair_evaluation_batches(split, end, tokens)
    loss = mean_loss(loaded.model, Translation(), batches)
    bits_per_byte = loss * split.n_target_tokens / math.log(2) / split.n_bytes
    translated = translate(cast(Any, loaded.model), split.sources(), end, end, flags.beam, flags.alpha)
    score = bleu([data.tokenizer.decode(ids) for ids in translated], [target for _, target in split.texts])
    numbers = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits_per_byte, "bleu": score.score}
    return numbers | {"beam": flags.beam, "alpha": flags.alpha, "bleu_signature": score.signature}


_MEASURES: dict[str, Callable[..., dict[str, Any]]] = {"causal": _causal, "masked": _masked, "pairs": _pairs}


def _data_of(run: Path, given: dict[str, Any]) -> Data:
    """What the run was trained on, but for what the flags say: another text is read and split in the same way, and
    translated in the same direction. Raises Error (exit 3) if neither names a text."""
    path = run / "config.yaml"
    own = load_yaml(path).get("data") if path.is_file() else None  # an imported model was trained elsewhere
    if own is None and "name" not in given:
        raise Error(run, "does not say which text it was trained on", "name one with --data", BAD_INPUT)
    own = {"name": own} if isinstance(own, str) else own or {}
    return validate(Data, merge(own, given), path)
