"""An exported folder, read back by transformers alone and compared with the model that it was made from.

Both get the same text. What is compared: the tokens of the text, the logits (the largest difference, in standard
deviations of the logits), and what each writes on its own by taking the likeliest token each time.

The bar for logits is 1e-4: two orders of fp32's arithmetic do not differ by more. Marian's layer norms add 1e-5 to the
variance where ours may add less: such a model passes at 1e-3. Greedy tokens have to be equal up to the end, or up to a
place where the two likeliest tokens are nearer to each other than the bar.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from classiclm.convert import transformer2017
from classiclm.convert.folders import maps
from classiclm.data.tokenizers import CharTokenizer, Tokenizer
from classiclm.extras import need
from classiclm.nn.base import EncoderDecoder, LanguageModel, Model

PACKAGE = "transformers"
BAR = 1e-4
BAR_OF_OTHER_EPS = 1e-3
_LEAST_SPREAD = 0.1  # the two logits of the next sentence may lie close together
N_NEW = 16  # greedy tokens
TEXT = "The cat sat on the mat. When it had slept, it went to look for the dog, and found him in the garden."

Logits = Callable[[Tensor], Tensor]  # (1, T) tokens -> (1, T, V)


@dataclass(frozen=True)
class Difference:
    """One comparison: how far apart, and how far they may be."""

    what: str
    value: float
    bar: float

    @property
    def ok(self) -> bool:
        """False above the bar, and for NaN."""
        return self.value <= self.bar


def compare(folder: Path, family: str, model: Model, tokenizer: Tokenizer) -> list[Difference]:
    """Read the folder with transformers and compare. Raises Error (exit 4) without that library."""
    transformers = need(PACKAGE, "export")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    architecture = getattr(transformers, maps()[family].ARCHITECTURE)
    theirs, report = architecture.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    theirs = theirs.float().eval()
    wrong = sum(len(report[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = TEXT if not isinstance(tokenizer, CharTokenizer) else "".join(tokenizer.characters)
    ids = tokenizer.encode(text)
    other = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    same = other(text, add_special_tokens=False, return_attention_mask=False)["input_ids"] == ids
    rows = [
        Difference("tensors that do not fit", float(wrong), 0.0),
        Difference(f"text as {len(ids)} tokens", float(not same), 0.0),
    ]
    room = model.n_ctx or model.config.n_ctx
    with torch.inference_mode():
        return rows + _compare_models(model, theirs, torch.tensor([ids[: room // 2]]), tokenizer)


def _compare_models(model: Model, theirs: Any, tokens: Tensor, tokenizer: Tokenizer) -> list[Difference]:
    """tokens (1, T): a text that leaves room for as many more."""
    if isinstance(model, EncoderDecoder):
        return _compare_translation(model, theirs, tokens, tokenizer)
    if not isinstance(model, LanguageModel):
        return _compare_heads(model, theirs, tokens, tokenizer)
    room = min(N_NEW, model.n_ctx - tokens.shape[1] if model.n_ctx else N_NEW)
    written = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=room, do_sample=False)
    return [
        _logits("logits of the text", model(tokens), theirs(tokens).logits, BAR),
        _greedy(model, written, tokens.shape[1], BAR),
    ]


def _compare_heads(model: Model, theirs: Any, tokens: Tensor, tokenizer: Any) -> list[Difference]:
    """Both of BERT's heads, for the text as one half of a pair and again as the other."""
    a, b = tokens.chunk(2, dim=1)
    ends = [torch.tensor([[id]]) for id in (tokenizer.cls, tokenizer.sep)]
    pair = torch.cat([ends[0], a, ends[1], b, ends[1]], dim=1)  # (1, T)
    segments = (torch.arange(pair.shape[1]) >= a.shape[1] + 2).long()[None]
    ours, other = model(pair, segments), theirs(input_ids=pair, token_type_ids=segments)
    return [
        _logits("logits of all tokens", ours.mlm, other.prediction_logits, BAR),
        _logits("logits of the next sentence", ours.nsp, other.seq_relationship_logits, BAR),
    ]


def _compare_translation(model: EncoderDecoder, theirs: Any, tokens: Tensor, tokenizer: Tokenizer) -> list[Difference]:
    bar = BAR if model.config.ln_eps == transformer2017.LN_EPS else BAR_OF_OTHER_EPS
    end = torch.tensor([[tokenizer.end_of_text]])
    source, target = torch.cat([tokens, end], dim=1), torch.cat([end, tokens], dim=1)
    mask = torch.ones_like(source)
    other = theirs(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    written = theirs.generate(source, attention_mask=mask, max_new_tokens=N_NEW, do_sample=False, num_beams=1)
    memory = model.encode(source)
    return [
        _logits("logits of a target", model(source, target), other, bar),
        _greedy(lambda target: model.decode(target, memory), written, 1, bar),
    ]


def _logits(what: str, ours: Tensor, theirs: Tensor, bar: float) -> Difference:
    spread = theirs.std().clamp(min=_LEAST_SPREAD)
    return Difference(f"{what}, {ours.shape[-1]} classes", float((ours - theirs).abs().max() / spread), bar)


def _greedy(logits: Logits, written: Tensor, start: int, bar: float) -> Difference:
    """How far the tokens that they wrote (1, T), from `start` on, are from our likeliest, in our logits.

    0 where they are the likeliest; after a tie both would go on differently, so each is judged given those before it.
    """
    ours = logits(written)[0, start - 1 : -1]  # (N, V): what we think of each place, given what they wrote before it
    chosen = ours.gather(1, written[0, start:, None])[:, 0]  # (N,)
    gap = (ours.max(dim=1).values - chosen).max() / ours.std()
    return Difference(f"greedy text of {len(chosen)} tokens", float(gap), bar)
