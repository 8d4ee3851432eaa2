"""Documents in one window do not see each other: every path, every causal model. Oracles: each alone, and torch.nn."""

import numpy as np
import pytest
import torch
from torch import nn

from classiclm.data.packing import PackedStream
from classiclm.models import gpt1, gpt2, gpt3, ladder
from classiclm.nn.attention import MultiHeadAttention, attend, set_attention_path
from classiclm.nn.dropout import Dropout
from classiclm.nn.mask import IGNORE, Mask
from classiclm.objectives import CausalLM
from parity import randomise

CPU = torch.device("cpu")
ROWS = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, -1]])  # the last place is padding
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 0, 1, 2, 3, 4, 5, 0]])
KEEP = torch.tensor([[1] * 8, [1] * 5 + [0] * 3], dtype=torch.bool)
MASKS = {
    "documents": Mask(documents=ROWS),
    "causal": Mask(causal=True, documents=ROWS),
    "banded": Mask(causal=True, window=2, documents=ROWS),
    "padded": Mask(causal=True, keep=KEEP, documents=ROWS),
}
SIZES = {"n_ctx": 8, "vocab_size": 23}
MODELS = {
    "gpt1": lambda: gpt1.GPT1(gpt1.Config(n_layers=2, d_model=24, n_heads=3, **SIZES)),
    "gpt2": lambda: gpt2.GPT2(gpt2.Config(n_layers=2, d_model=24, n_heads=3, **SIZES)),
    "gpt3 dense": lambda: gpt3.GPT3(gpt3.Config(n_layers=3, d_model=24, n_heads=3, band=None, **SIZES)),
    "gpt3 banded": lambda: gpt3.GPT3(gpt3.Config(n_layers=3, d_model=24, n_heads=3, band=2, **SIZES)),
} | {
    f"ladder {rung}": lambda rung=rung: ladder.build(ladder.Config(**vars(ladder.config_of(rung)) | SIZES))
    for rung in range(1, 13)
}


def model_of(name):
    torch.manual_seed(1)
    return randomise(MODELS[name]())


@pytest.mark.parametrize("name", MASKS)
def test_a_query_sees_the_keys_of_its_own_document_only(name):
    mask = MASKS[name]
    allowed = mask.matrix(8, 8, CPU).expand(2, 1, 8, 8)[:, 0]
    for b in range(2):
        for t in range(8):
            expected = {
                s
                for s in range(8)
                if ROWS[b, s] == ROWS[b, t]
                and (not mask.causal or s <= t)
                and (mask.window is None or s > t - mask.window)
                and (mask.keep is None or mask.keep[b, s])
            }
            # A query that would see nothing is padding; nobody reads it, but it must not become NaN.
            assert {s for s in range(8) if allowed[b, t, s]} == (expected or set(range(8)))


@pytest.mark.parametrize("name", MASKS)
def test_the_paths_agree_in_values_and_gradients(name):
    torch.manual_seed(2)
    q, k, v = (torch.randn(2, 3, 8, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    written, fused = (attend(q, k, v, MASKS[name], Dropout(0.0).eval(), path) for path in ("written", "fused"))
    torch.testing.assert_close(written, fused)
    upstream = torch.randn_like(written)
    a, b = (torch.autograd.grad(out, (q, k, v), upstream) for out in (written, fused))
    torch.testing.assert_close(a, b)


def test_one_document_is_no_mask_at_all():
    torch.manual_seed(3)
    q = k = v = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    one = torch.zeros(2, 8, dtype=torch.int64)
    for window in (None, 2):  # 2: the plain mask takes the path in blocks
        for path in ("written", "fused"):
            plain = attend(q, k, v, Mask(causal=True, window=window), Dropout(0.0).eval(), path)
            masked = attend(q, k, v, Mask(causal=True, window=window, documents=one), Dropout(0.0).eval(), path)
            torch.testing.assert_close(masked, plain)


@pytest.mark.parametrize("path", ["written", "fused"])
def test_attention_equals_torch_nn_with_a_matrix_of_blocks(path):
    torch.manual_seed(4)
    lengths = [3, 1, 4]
    ours, theirs = MultiHeadAttention(24, 4), nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        for i, layer in enumerate((ours.q, ours.k, ours.v)):
            layer.weight.copy_(theirs.in_proj_weight[24 * i : 24 * (i + 1)])
            layer.bias.copy_(theirs.in_proj_bias[24 * i : 24 * (i + 1)])
        ours.o.load_state_dict(theirs.out_proj.state_dict())
    set_attention_path(ours, path)
    x = torch.randn(2, 8, 24)
    documents = torch.arange(3).repeat_interleave(torch.tensor(lengths)).expand(2, 8)
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()
    expected, _ = theirs(x, x, x, attn_mask=~blocks)
    actual = ours(x, mask=Mask(causal=True, documents=documents))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_each_document_alone_has_the_logits_it_has_among_others(name, path):
    model = model_of(name)
    set_attention_path(model, path)
    tokens = torch.randint(23, ROWS.shape)
    with torch.no_grad():
        together = model(tokens, mask=Mask(causal=True, documents=ROWS), positions=POSITIONS)
        for b, row in enumerate(ROWS):
            for number in row.unique():
                here = row == number
                alone = model(tokens[b : b + 1, here])
                assert ((together[b, here] - alone[0]).abs().max() / together.std()).item() < 1e-5
    assert together.std() > 0.2  # or small errors hide; a table of N(0, 0.2) has the smallest


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_token_of_one_document_changes_no_logit_of_another(name, path):
    model = model_of(name)
    set_attention_path(model, path)
    tokens = torch.randint(23, ROWS.shape)
    mask = Mask(causal=True, documents=ROWS)
    with torch.no_grad():
        before = model(tokens, mask=mask, positions=POSITIONS)
        for place in range(8):
            other = tokens.clone()
            other[:, place] = (other[:, place] + 1) % 23
            changed = model(other, mask=mask, positions=POSITIONS) != before  # to the last bit
            elsewhere = ROWS[:, place : place + 1] != ROWS
            assert not changed[elsewhere].any()
            assert changed[:, place].any()


def test_documents_keep_a_mask_from_the_shortcuts_and_do_not_fit_a_cache():
    assert not Mask(causal=True, documents=ROWS).only_causal(8, 8)
    assert not Mask(causal=True, window=2, documents=ROWS).only_banded(8, 8)
    assert Mask(causal=True, window=2).only_banded(8, 8)
    with pytest.raises(ValueError, match="3 and 8"):
        Mask(causal=True, documents=ROWS).matrix(3, 8, CPU)


def test_the_loss_of_packed_documents_is_that_of_the_documents_one_by_one():
    model = model_of("gpt2").double()
    lengths = [5, 3, 9, 2, 7, 1, 4, 3]
    tokens = np.random.default_rng(0).integers(0, 23, sum(lengths))
    stream = PackedStream(tokens, 0, len(tokens), 8, ("f", 0), np.cumsum(lengths))
    batch = stream(np.arange(stream.n_windows))
    assert (batch["targets"] == IGNORE).any()  # there is padding to be ignored
    together = CausalLM()(model, batch).terms["loss"]
    total, count = 0.0, 0
    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
        if len(document) > 1:
            row = torch.from_numpy(document)[None]
            log_p = model(row[:, :-1]).log_softmax(-1).gather(-1, row[:, 1:, None])
            total, count = total - log_p.sum().item(), count + log_p.numel()
    assert together.count.item() == count
    assert together.sum.item() == pytest.approx(total, rel=1e-6)
    together.sum.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
