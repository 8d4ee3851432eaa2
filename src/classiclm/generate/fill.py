"""Filling the blanks of a text with a masked model: what BERT can write."""

from dataclasses import dataclass

import torch

from classiclm.data.wordpiece import WordPiece
from classiclm.errors import BAD_INPUT, Error
from classiclm.models.bert import BERT

MASK, SEPARATOR = "[MASK]", "[SEP]"


@dataclass(frozen=True)
class Filled:
    """A text with its blanks filled by the likeliest tokens; its tokens; each blank's likeliest with probabilities."""

    text: str
    tokens: list[int]
    candidates: list[list[tuple[str, float]]]


def encode_with_masks(text: str, tokenizer: WordPiece, n_ctx: int) -> tuple[list[int], list[int]]:
    """The tokens of "[CLS] text [SEP]" and their segments; [MASK] in the text is a blank, [SEP] begins segment 1.

    Raises Error: exit 2 without a blank, exit 3 past n_ctx.
    """
    if MASK not in text:
        raise Error(
            "--prompt", f"has no {MASK}", f"write {MASK} where a token is to be found, as in 'to {MASK} or not'"
        )
    if text.count(SEPARATOR) > 1:
        raise Error("--prompt", f"has more than one {SEPARATOR}", "write at most two segments, with one between them")
    tokens, segments = [tokenizer.cls], [0]
    for segment, part in enumerate(text.split(SEPARATOR, 1)):
        for i, between in enumerate(part.split(MASK)):
            new = ([tokenizer.mask] if i else []) + tokenizer.encode(between)
            tokens += new
        tokens.append(tokenizer.sep)
        segments += [segment] * (len(tokens) - len(segments))
    if len(tokens) > n_ctx:
        raise Error("--prompt", f"has {len(tokens)} tokens, the model reads {n_ctx}", "shorten it", BAD_INPUT)
    return tokens, segments


@torch.inference_mode()
def fill(model: BERT, tokenizer: WordPiece, text: str, top: int = 5) -> Filled:
    """The likeliest tokens for each [MASK] of a text, each blank by itself. Raises Error as `encode_with_masks`.

    No blank is filled with a special token, [UNK] among them: none of these is a text. The probabilities are the
    model's own, over all tokens.
    """
    model.eval()
    tokens, segments = encode_with_masks(text, tokenizer, model.config.n_ctx)
    read = torch.tensor([tokens, segments], device=model.device)[:, None]  # (2, 1, T)
    places = (read[0] == tokenizer.mask).nonzero()[:, 1][None]  # (1, P)
    probabilities = model(read[0], read[1], places=places).mlm[0].float().softmax(dim=-1)  # (P, V)
    special = [tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask]
    probabilities[:, special] = -1.0  # below every other
    best = probabilities.topk(min(top, probabilities.shape[1] - len(special)), dim=-1)  # (P, top)
    rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    candidates = [[(tokenizer.decode([i]), p) for i, p in zip(ids, values, strict=True)] for ids, values in rows]
    likeliest = iter(best.indices[:, 0].tolist())
    frame = (tokenizer.cls, tokenizer.sep)
    filled = [next(likeliest) if token == tokenizer.mask else token for token in tokens if token not in frame]
    return Filled(tokenizer.decode(filled), filled, candidates)
