"""Whole completions of several prompts at once: text, tokens and log-probabilities, up to what ends each."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from classiclm.data.tokenizers import Tokenizer
from classiclm.generate.sample import Sampling, check_tokens, stream
from classiclm.generate.text import in_front, pieces
from classiclm.nn.base import LanguageModel


@dataclass
class Completion:
    """What was written after one prompt. `log_probabilities` are the model's own, in nats, before any filter."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    ended: bool = False  # by a stop text, a stop id or the end of a document, not by the length


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: str | None = None,
    stop_ids: Collection[int] = (),
) -> list[Completion]:
    """Continue each prompt (token ids, any lengths). The token that ends a completion is left out, and so is the stop
    text; `tokens` keep those that it came from.

    Raises ValueError for an empty prompt or an id that is no token.
    """
    check_tokens(prompts, tokenizer.vocab_size)
    ends = {*stop_ids, tokenizer.end_of_text}
    completions = [Completion() for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, sampling, seed):
        found = zip(completions, step.tokens, step.log_probabilities, strict=True)
        for completion, token, log_probability in found:
            if completion.ended or token in ends:
                completion.ended = True
                continue
            completion.tokens.append(token)
            completion.log_probabilities.append(log_probability)
            # No token is shorter than a byte, so the stop text is within as many tokens as it has bytes.
            if stop:
                completion.ended = stop in tokenizer.decode(completion.tokens[-4 * len(stop) - 4 :])
        if all(completion.ended for completion in completions):
            break
    for completion, prompt in zip(completions, prompts, strict=True):
        before = in_front(prompt, tokenizer.beginning)
        completion.text = "".join(pieces(completion.tokens, tokenizer.decode, stop, before=before))
    return completions
