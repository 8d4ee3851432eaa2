"""CTranslate2, converted from the same weights."""

from typing import Any

from benchmarks import fixtures
from benchmarks.turns import Missing, Turns, decoding
from benchmarks.work import Work, prompt


def decode(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Greedy, all threads inside one batch; the prompt is not handed back."""
    try:
        import ctranslate2
    except ImportError as e:
        raise Missing("ctranslate2 is not installed") from e

    turns.imported()
    kind = options["precision"]
    if kind not in ctranslate2.get_supported_compute_types("cpu"):
        raise Missing(f"CTranslate2 has no {kind} on this CPU")
    folder = fixtures.need(f"ct2-{kind}", work, turns.folder)
    generator = ctranslate2.Generator(
        str(folder), "cpu", compute_type=kind, inter_threads=1, intra_threads=turns.threads
    )
    words = [[f"t{i}" for i in row] for row in prompt(work).tolist()]

    def write(n: int) -> list[list[int]]:
        length = {"max_length": n, "min_length": n, "end_token": []}
        greedy = {"sampling_topk": 1, "beam_size": 1, "include_prompt_in_result": False}
        results = generator.generate_batch(words, **length, **greedy)
        return [result.sequences_ids[0] for result in results]

    written = write(work.new_tokens)
    assert {len(row) for row in written} == {work.new_tokens}
    turns.serve(decoding(write, work.new_tokens), None, kind, written=written)
