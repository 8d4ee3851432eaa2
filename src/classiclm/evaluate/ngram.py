"""Exact n-gram losses: what counting can do, as bars that a neural model has to clear.

Shannon 1948: the more characters of context a table has, the better it predicts, until the counts run thin. "Exact"
means that nothing is fitted by steps: the probabilities are the smoothed counts of the training text.
"""

import math

import numpy as np

# The smoothing (added to each count) that suits each order on a million characters.
SMOOTHING = {1: 1.0, 2: 1.0, 3: 0.1, 4: 0.05}


def ngram_loss(train: np.ndarray, val: np.ndarray, order: int, vocab_size: int, add: float) -> float:
    """Mean nats per token of `val` under the table p(x | order - 1 tokens before) = (count + add) / (total + add V).

    Tokens of `val` without a full context are left out. Raises ValueError if vocab_size ** order does not fit 63 bits.
    """
    if vocab_size**order >= 2**63:
        raise ValueError(f"order {order} is too high for {vocab_size} tokens")
    grams, gram_counts = np.unique(_codes(train, order, vocab_size), return_counts=True)
    contexts, context_counts = np.unique(_codes(train[:-1], order - 1, vocab_size), return_counts=True)
    asked = _codes(val, order, vocab_size)
    count = _look_up(asked, grams, gram_counts)
    total = _look_up(asked // vocab_size, contexts, context_counts)
    return float(-np.log((count + add) / (total + add * vocab_size)).mean())


def baselines(train: np.ndarray, val: np.ndarray, vocab_size: int) -> dict[str, float]:
    """The uniform guess and the tables of one to four tokens, in nats per token, as far as they can be counted."""
    names = {1: "unigram table", 2: "bigram table", 3: "trigram table", 4: "4-gram table"}
    result = {"uniform guess": math.log(vocab_size)}
    for order, add in SMOOTHING.items():
        if vocab_size**order < 2**63 and min(len(train), len(val)) >= order:
            result[names[order]] = ngram_loss(train, val, order, vocab_size, add)
    return result


def _codes(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """One integer for each run of `order` tokens: its digits in base vocab_size. Order 0 has one, empty context."""
    n = len(tokens) - order + 1
    codes = np.zeros(n, dtype=np.int64)
    for i in range(order):
        codes = codes * vocab_size + tokens[i : i + n]
    return codes


def _look_up(asked: np.ndarray, keys: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The count of each asked key, 0 where it was never seen."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, counts[place], 0)
