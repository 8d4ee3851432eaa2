"""How many parameters each paper's models have, against the papers, their official code and their tables.

Models are built on the meta device: names and shapes, no numbers.
"""

import pytest
import torch

from classiclm.models import bert, gpt1, transformer2017

# Table 3 of "Attention Is All You Need", in millions.
TABLE_3 = {
    "base": 65,
    "b-dk16": 58,
    "b-dk32": 60,
    "c-n2": 36,
    "c-n4": 50,
    "c-n8": 80,
    "c-d256": 28,
    "c-d1024": 168,
    "c-ff1024": 53,
    "c-ff4096": 90,
    "big": 213,
}

# The encoder with its pooler, and with both heads of pre-training as well; sizes from the official repository.
BERTS = {
    "bert-base": (109_482_240, 110_106_428),
    "bert-large": (335_141_888, 336_226_108),
    "bert-tiny": (4_385_920, None),
    "bert-mini": (11_170_560, None),
    "bert-small": (28_763_648, None),
    "bert-medium": (41_373_184, None),
}


def on_meta(module, name):
    with torch.device("meta"):
        return module.build(module.PRESETS[name])


def test_gpt1_has_the_sum_of_the_released_shapes():
    assert on_meta(gpt1, "gpt1-117m").count_parameters() == 116_534_784


@pytest.mark.parametrize("name", BERTS)
def test_berts_have_the_counts_of_the_published_checkpoints(name):
    model = on_meta(bert, name)
    encoder, whole = BERTS[name]
    heads = sum(parameter.numel() for head in (model.mlm, model.nsp) for parameter in head.parameters())
    assert model.count_parameters() - heads == encoder
    assert whole in (None, model.count_parameters())
    assert model.count_parameters() == sum(tensor.numel() for tensor in model.state_dict().values())


def test_the_transformer_has_the_counts_of_the_first_public_code():
    assert on_meta(transformer2017, "transformer2017-base").count_parameters() == 65_110_016
    assert on_meta(transformer2017, "transformer2017-big").count_parameters() == 218_300_416


def test_all_counts_of_table_3_but_the_big_models_are_met_at_the_printed_rounding():
    counts = {row: on_meta(transformer2017, f"transformer2017-{row}").count_parameters() for row in TABLE_3}
    missed = {row: count for row, count in counts.items() if round(count / 1e6) != TABLE_3[row]}
    for row, count in missed.items():
        print(f"Table 3, {row}: printed {TABLE_3[row]} M, ours {count:,}")
    assert len(counts) == 11
    assert list(missed) == ["big"]  # 213 M would need a vocabulary of about 35,800


def test_models_shows_the_papers_own_numbers():
    printed = {f"transformer2017-{row}": f"{millions}M" for row, millions in TABLE_3.items()}
    assert printed == transformer2017.PAPER_PARAMS
    assert bert.PAPER_PARAMS == {"bert-base": "110M", "bert-large": "340M"}
    assert gpt1.PAPER_PARAMS == {"gpt1-117m": "117M"}


@pytest.mark.parametrize("row", ["a-h1", "a-h4", "a-h16", "a-h32"])
def test_heads_are_traded_at_equal_cost(row):
    """Table 3, (A): 'keeping the amount of computation constant'; only the smaller biases would differ, and do not."""
    config = transformer2017.PRESETS[f"transformer2017-{row}"]
    assert config.n_heads == int(row[3:])
    assert config.n_heads * config.d_head == 512
    assert on_meta(transformer2017, f"transformer2017-{row}").count_parameters() == 65_110_016
