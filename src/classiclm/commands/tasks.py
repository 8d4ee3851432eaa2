"""The kinds of learning, each wired from its parts: which data, which batches, which objective.

A recipe names its kind (`task`); the commands look it up here, and so know no paper by name.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from classiclm import registry
from classiclm.data import masked, pairs
from classiclm.data.batches import Batch, Windows, evaluation_batches
from classiclm.data.corpora import Data
from classiclm.data.pairs import PairData, prepare_pairs
from classiclm.data.sentences import SentenceData, prepare_sentences
from classiclm.data.splits import TextData, n_targets, prepare_text
from classiclm.data.tokenizers import Tokenizer
from classiclm.nn.mask import IGNORE
from classiclm.objectives import CausalLM, MaskedLM, Translation, choose_rows
from classiclm.train import machine
from classiclm.train.trainer import Task

Corpus = TextData | SentenceData | PairData


@dataclass(frozen=True)
class Kind:
    """One kind of learning."""

    prepare: Callable[[Data, str | Tokenizer], Any]  # read, split, tokenise
    task: Callable[[Any, machine.Plan, Any], dict[str, Any]]  # config, plan, data -> the parts of a Task but its files
    micro_batch: Callable[[Any, int, machine.Precision, machine.Machine], int]  # config, parameters, ... -> "auto"
    batch: Callable[[Any, Any], str]  # config, data -> a step's batch, in words


def make_task(preset: registry.Preset, config: Any, plan: machine.Plan, data: Corpus) -> Task:
    """What the trainer needs, with the files that travel with the weights."""
    info = {"family": preset.family, "preset": preset.name, "config": dataclasses.asdict(config.model)}
    files = {"model.json": json.dumps(info, indent=1), "tokenizer.json": data.tokenizer.to_json()}
    return Task(**KINDS[preset.recipe.task].task(config, plan, data), fingerprint=data.train.fingerprint, files=files)


def _causal(config: Any, plan: machine.Plan, data: TextData) -> dict[str, Any]:
    n_ctx, documents = config.model.n_ctx, config.data.documents
    rows = choose_rows(config.loss_chunk, plan.micro_batch * n_ctx, data.tokenizer.vocab_size)
    return {
        "objective": CausalLM(rows),
        "batches": Windows(data.train, n_ctx, config, config.seed, documents),
        "n_tokens": _n_inputs if documents == "joined" else _n_targets,
        "validation": lambda n: evaluation_batches(data.val, n_ctx, plan.micro_batch, n, documents),
        "validated": CausalLM(rows),
        "tokens_per_byte": n_targets(data.val, documents) / data.val.n_bytes,
    }


def _masked(config: Any, plan: machine.Plan, data: SentenceData) -> dict[str, Any]:
    n_ctx, tokenizer = config.model.n_ctx, data.tokenizer
    n_places = math.ceil(n_ctx * config.mask_share)
    rows = choose_rows(config.loss_chunk, plan.micro_batch * n_places, tokenizer.vocab_size)
    return {
        "objective": MaskedLM(rows),
        "batches": masked.MaskedBatches(data.train, tokenizer, n_ctx, config, config.seed),
        "n_tokens": lambda batch: int(batch["keep"].sum()),
        "validation": lambda n: masked.masked_evaluation_batches(
            data.val, tokenizer, n_ctx, config, plan.micro_batch, n
        ),
        "validated": MaskedLM(rows),
        "tokens_per_byte": None,
    }


def _pairs(config: Any, plan: machine.Plan, data: PairData) -> dict[str, Any]:
    n_ctx, end, val = config.model.n_ctx, cast(int, data.tokenizer.end_of_text), data.val.within(config.model.n_ctx)
    rows = choose_rows(config.loss_chunk, plan.micro_batch, data.tokenizer.vocab_size)
    return {
        "objective": Translation(config.label_smoothing, rows),
        "batches": pairs.PairBatches(data.train, end, n_ctx, config, config.seed),
        "n_tokens": _n_targets,
        "validation": lambda n: pairs.pair_evaluation_batches(val, end, plan.micro_batch, n),
        "validated": Translation(rows=rows),
        "tokens_per_byte": val.n_target_tokens / val.n_bytes,
        "parts": pairs.micro_batches,
    }


def _n_targets(batch: Batch) -> int:
    return int((batch["targets"] != IGNORE).sum())


def _n_inputs(batch: Batch) -> int:
    return batch["inputs"].numel()


def _d_ff(model: Any) -> int:
    return getattr(model, "d_ff", None) or 4 * model.d_model


def _sizes(config: Any, n_params: int) -> machine.Sizes:
    model = config.model
    return machine.Sizes(model.n_ctx, _d_ff(model), model.n_layers, model.vocab_size, n_params)


def _micro_batch(config: Any, n_params: int, precision: machine.Precision, here: machine.Machine) -> int:
    return machine.choose_micro_batch(config.batch, _sizes(config, n_params), precision, here)


def _masked_micro_batch(config: Any, n_params: int, precision: machine.Precision, here: machine.Machine) -> int:
    """Only the masked places have logits."""
    sizes = _sizes(config, n_params)
    sizes = dataclasses.replace(sizes, vocab_size=max(1, int(config.mask_share * sizes.vocab_size)))
    return machine.choose_micro_batch(config.batch, sizes, precision, here)


def _pair_micro_batch(config: Any, n_params: int, precision: machine.Precision, here: machine.Machine) -> int:
    """In tokens, as the batch; each passes through as many layers again in the other half of the model."""
    sizes = _sizes(config, n_params)
    sizes = dataclasses.replace(sizes, n_ctx=1, n_layers=2 * sizes.n_layers)
    return min(config.batch, machine.fitting(sizes, precision, here))


def _windows_in_words(config: Any, data: TextData) -> str:
    n_ctx = config.model.n_ctx
    n_tokens = f"{config.batch} x {n_ctx} = {config.batch * n_ctx:,} tokens a step"
    return f"{data.name} ({len(data.train.tokens):,} tokens); {n_tokens}"


def _sentences_in_words(config: Any, data: SentenceData) -> str:
    n_ctx = config.first_ctx or config.model.n_ctx
    return f"{data.name} ({len(data.train.tokens):,} tokens); {config.batch} sequences of up to {n_ctx} tokens a step"


def _pairs_in_words(config: Any, data: PairData) -> str:
    n_long = len(data.train) - len(data.train.within(config.model.n_ctx))
    left_out = ((data.train.n_empty, "with an empty side"), (n_long, f"of more than {config.model.n_ctx} tokens"))
    notes = "".join(f", {n:,} {why} left out" for n, why in left_out if n)
    return f"{data.name} ({len(data.train):,} pairs{notes}); up to {config.batch:,} tokens a side in a step"


KINDS = {
    "causal": Kind(prepare_text, _causal, _micro_batch, _windows_in_words),
    "masked": Kind(prepare_sentences, _masked, _masked_micro_batch, _sentences_in_words),
    "pairs": Kind(prepare_pairs, _pairs, _pair_micro_batch, _pairs_in_words),
}
