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
from classiclm.errors import BAD_INPUT, Error
from classiclm.generate.beam import translate
from classiclm.generate.completion import complete
from classiclm.generate.fill import MASK, encode_with_masks, fill
from classiclm.generate.sample import Sampling
from classiclm.nn.mask import IGNORE
from classiclm.objectives import CausalLM, MaskedLM, Translation, choose_rows
from classiclm.train import machine
from classiclm.train.samples import Write
from classiclm.train.trainer import Task

Corpus = TextData | SentenceData | PairData

_DRAWN, _LENGTH, _SEED = Sampling(0.8, top_k=50), 200, 0  # of samples, as `generate RUN --top_k 50` has them
_N_SOURCES, _BEAM = 3, 4  # sentences that a sample translates, and how
_N_FILLED, _BLANK_EVERY = 64, 7  # at most so many tokens of text with blanks in it, and words from one to the next


@dataclass(frozen=True)
class Kind:
    """One kind of learning."""

    prepare: Callable[[Data, str | Tokenizer], Any]  # read, split, tokenise
    task: Callable[[Any, machine.Plan, Any], dict[str, Any]]  # config, plan, data -> the parts of a Task but its files
    micro_batch: Callable[[Any, int, machine.Precision, machine.Machine], int]  # config, parameters, ... -> "auto"
    batch: Callable[[Any, Any], str]  # config, data -> a step's batch, in words
    sample: Callable[[Any, Any], Write]  # config, data -> what samples are written with


def make_task(preset: registry.Preset, config: Any, plan: machine.Plan, data: Corpus) -> Task:
    """What the trainer needs, with the files that travel with the weights.

    Raises Error: exit 2 or 3 for a sample_prompt that the model could do nothing with.
    """
    kind = KINDS[preset.recipe.task]
    if config.sample_prompt is not None and config.sample_every is None:
        raise Error("sample_prompt", "has no effect without sample_every", "give --sample_every N, or leave it out")
    sample = kind.sample(config, data) if config.sample_every else None
    info = {"family": preset.family, "preset": preset.name, "config": dataclasses.asdict(config.model)}
    files = {"model.json": json.dumps(info, indent=1), "tokenizer.json": data.tokenizer.to_json()}
    parts = kind.task(config, plan, data)
    return Task(**parts, fingerprint=data.train.fingerprint, files=files, sample=sample)


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


def _continuing(config: Any, data: TextData) -> Write:
    """From the prompt on, or else from what `generate` starts from: nothing of a sample is then copied from the text.

    A vocabulary without a line break has no beginning of a text: the first token of the validation text serves.
    """
    tokenizer, prompt = data.tokenizer, config.sample_prompt
    tokens, shown = tokenizer.beginning, ""
    if prompt is not None:
        tokens, shown = tokenizer.encode(prompt), prompt
    elif not tokens:
        tokens = data.val.tokens[:1].tolist()
        shown = tokenizer.decode(tokens)
    if not tokens:
        raise Error("sample_prompt", "is empty, or nothing but white space to this tokenizer", "give a letter or more")
    return lambda model: shown + complete(model, tokenizer, [tokens], _LENGTH, _DRAWN, _SEED)[0].text + "\n"


def _filling(config: Any, data: SentenceData) -> Write:
    """The prompt's blanks, or some in the first words of the validation text."""
    tokenizer, n_ctx = data.tokenizer, config.model.n_ctx
    text, masked = None, config.sample_prompt
    if masked is None:
        first = data.val.tokens[: min(_N_FILLED, n_ctx - 2)].tolist()
        text = tokenizer.decode([token for token in first if token != tokenizer.unk])
        words = text.split() or [MASK]
        for i in range(min(3, len(words) - 1), len(words), _BLANK_EVERY):
            words[i] = MASK
        masked = " ".join(words)
    try:
        encode_with_masks(masked, tokenizer, n_ctx)
    except Error as e:
        raise Error("sample_prompt", e.why, e.fix, e.code) from e
    return lambda model: _lines({"filled": fill(model, tokenizer, masked).text, "masked": masked, "text": text})


def _translating(config: Any, data: PairData) -> Write:
    """The prompt, or the first sentences of the validation split, beside their references."""
    tokenizer, n_ctx, prompt = data.tokenizer, config.model.n_ctx, config.sample_prompt
    texts = data.val.within(n_ctx).texts[:_N_SOURCES] if prompt is None else ((prompt, None),)
    end = cast(int, tokenizer.end_of_text)
    sources = [[*tokenizer.encode(source), end] for source, _ in texts]
    if max(map(len, sources)) > n_ctx:
        raise Error("sample_prompt", f"has more than the model's {n_ctx} tokens", "shorten it", BAD_INPUT)

    def write(model: Any) -> str:
        found = map(tokenizer.decode, translate(model, sources, end, end, _BEAM))
        pairs = zip(texts, found, strict=True)
        return "\n".join(_lines({"translation": new, "reference": ref, "source": src}) for (src, ref), new in pairs)

    return write


def _lines(named: dict[str, str | None]) -> str:
    """A line each, with the texts in a column; what is None is left out."""
    width = max(map(len, named)) + 2
    return "".join(f"{name + ':':<{width}}{text}\n" for name, text in named.items() if text is not None)


KINDS = {
    "causal": Kind(prepare_text, _causal, _micro_batch, _windows_in_words, _continuing),
    "masked": Kind(prepare_sentences, _masked, _masked_micro_batch, _sentences_in_words, _filling),
    "pairs": Kind(prepare_pairs, _pairs, _pair_micro_batch, _pairs_in_words, _translating),
}
