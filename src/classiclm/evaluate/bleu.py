"""BLEU (Papineni et al. 2002) through sacrebleu: on plain text, with a signature that says how it was counted.

The 2017 paper's 27.3 and 28.4 are of another kind, tokenised and with compounds split: not to be compared with these.
"""

from collections.abc import Sequence
from typing import NamedTuple

from classiclm.extras import need


class Bleu(NamedTuple):
    """The score, 0 to 100, and sacrebleu's signature of how it was counted."""

    score: float
    signature: str


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Bleu:
    """Corpus BLEU of translations against one reference each: 13a tokenisation, case counts.

    Raises ValueError if there are none or not equally many; Error (exit 4) if sacrebleu is not installed.
    """
    if not hypotheses or len(hypotheses) != len(references):
        counts = f"{len(hypotheses)} and {len(references)}"
        raise ValueError(f"there should be as many translations as references, and at least one; got {counts}")
    metric = need("sacrebleu", "eval").BLEU(tokenize="13a", lowercase=False)
    score = metric.corpus_score(list(hypotheses), [list(references)]).score
    return Bleu(float(score), str(metric.get_signature()))
