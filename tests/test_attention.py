"""The two attention paths are one function; masks and caches do what they say. Oracles: torch.nn, and loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from classiclm.nn.attention import (
    MultiHeadAttention,
    attend,
    attend_banded,
    attend_written,
    choose_path,
    set_attention_path,
)
from classiclm.nn.cache import KVCache, LayerCache
from classiclm.nn.dropout import Dropout
from classiclm.nn.mask import Mask

NO_DROPOUT = Dropout(0.0).eval()


def keep(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


MASKS = {
    "none": Mask(),
    "causal": Mask(causal=True),
    "padding": Mask(keep=keep([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]])),
    "causal and padding": Mask(causal=True, keep=keep([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0]])),
    "banded": Mask(causal=True, window=3),
    "banded and padding": Mask(causal=True, window=3, keep=keep([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])),
}


def attend_with_loops(q, k, v, mask):
    """Equation 1, one query at a time."""
    B, H, T, K = q.shape
    S = k.shape[2]
    out = torch.zeros(B, H, T, K, dtype=q.dtype)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                position = S - T + t
                keys = [
                    s
                    for s in range(S)
                    if (not mask.causal or s <= position)
                    and (mask.window is None or s > position - mask.window)
                    and (mask.keep is None or bool(mask.keep[b, s]))
                ]
                scores = torch.stack([q[b, h, t] @ k[b, h, s] / math.sqrt(K) for s in keys])
                for weight, s in zip(scores.softmax(0), keys, strict=True):
                    out[b, h, t] += weight * v[b, h, s]
    return out


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("n_queries", [7, 3, 1])
def test_both_paths_equal_the_loops_and_each_other_in_values_and_gradients(name, n_queries):
    """Fewer queries than keys is what a cache leads to."""
    torch.manual_seed(1)
    q = torch.randn(2, 2, n_queries, 5, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    written = attend(q, k, v, MASKS[name], NO_DROPOUT, "written")
    fused = attend(q, k, v, MASKS[name], NO_DROPOUT, "fused")
    torch.testing.assert_close(written, attend_with_loops(q, k, v, MASKS[name]))
    torch.testing.assert_close(written, fused)
    upstream = torch.randn_like(written)
    for a, b in zip(
        torch.autograd.grad(written, (q, k, v), upstream), torch.autograd.grad(fused, (q, k, v), upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_equals_torch_nn(path, causal):
    torch.manual_seed(2)
    ours, theirs = MultiHeadAttention(24, 4), nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        for i, layer in enumerate((ours.q, ours.k, ours.v)):
            layer.weight.copy_(theirs.in_proj_weight[24 * i : 24 * (i + 1)])
            layer.bias.copy_(theirs.in_proj_bias[24 * i : 24 * (i + 1)])
        ours.o.load_state_dict(theirs.out_proj.state_dict())
    set_attention_path(ours, path)
    x, memory = torch.randn(3, 6, 24), torch.randn(3, 6, 24)
    forbidden = torch.ones(6, 6, dtype=torch.bool).triu(1) if causal else None
    for source in (None, memory):
        other = x if source is None else source
        expected, _ = theirs(x, other, other, attn_mask=forbidden)
        torch.testing.assert_close(ours(x, memory=source, mask=Mask(causal=causal)), expected, rtol=1e-4, atol=1e-5)


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_no_position_sees_ahead_or_beyond_the_band(data):
    n_queries = data.draw(st.integers(1, 12))
    n_keys = n_queries + data.draw(st.integers(0, 8))
    window = data.draw(st.integers(1, 24))
    allowed = Mask(causal=True, window=window).matrix(n_queries, n_keys, torch.device("cpu"))
    for t in range(n_queries):
        position = n_keys - n_queries + t
        seen = {s for s in range(n_keys) if allowed[t, s]}
        assert seen == {s for s in range(n_keys) if position - window < s <= position}


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from(["written", "fused"]))
@settings(max_examples=60, deadline=None)
def test_the_band_in_blocks_equals_the_band_as_a_matrix(length, window, path):
    torch.manual_seed(length)
    q, k, v = (torch.randn(2, 2, length, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    blocks = attend_banded(q, k, v, window, NO_DROPOUT, path)
    matrix = Mask(causal=True, window=window).matrix(length, length, q.device)
    expected = attend_written(q, k, v, matrix, NO_DROPOUT)
    torch.testing.assert_close(blocks, expected)
    upstream = torch.randn_like(expected)
    a, b = (torch.autograd.grad(out, (q, k, v), upstream) for out in (blocks, expected))
    torch.testing.assert_close(a, b)


def test_a_band_never_makes_a_t_by_t_matrix(monkeypatch):
    sizes = []
    real = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, dim: sizes.append(x.numel()) or real(x, dim))
    q = k = v = torch.randn(1, 1, 1000, 2)
    attend(q, k, v, Mask(causal=True, window=10), NO_DROPOUT, "written")
    assert sizes == [1000 * 20]


def test_a_plain_causal_mask_stays_symbolic():
    assert Mask(causal=True).only_causal(5, 5)
    assert not Mask(causal=True).only_causal(2, 5)  # queries at the end of a cache
    assert not Mask(causal=True, window=2).only_causal(5, 5)
    assert Mask(causal=True).matrix(1, 9, torch.device("cpu")) is None
    assert Mask().matrix(4, 9, torch.device("cpu")) is None


@pytest.mark.parametrize("path", ["written", "fused"])
@pytest.mark.parametrize("window", [None, 3])
def test_reading_through_a_cache_in_pieces_equals_reading_at_once(path, window):
    torch.manual_seed(3)
    attention = MultiHeadAttention(16, 2).double()
    set_attention_path(attention, path)
    x, mask, cache = torch.randn(2, 9, 16, dtype=torch.float64), Mask(causal=True, window=window), LayerCache(9)
    parts = [attention(x[:, a:b], mask=mask, cache=cache) for a, b in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), attention(x, mask=mask))


def test_a_cache_refuses_more_than_it_holds_and_forgets_when_cleared():
    cache = KVCache(n_layers=1, n_ctx=4)
    kv = torch.randn(1, 1, 3, 2)
    cache.layers[0].append(kv, kv)
    with pytest.raises(ValueError, match="holds 4"):
        cache.layers[0].append(kv, kv)
    assert cache.length == 3
    cache.clear()
    assert cache.length == 0
    assert cache.layers[0].append(kv, kv)[0].shape == (1, 1, 3, 2)


def test_the_rule_of_auto_and_its_switch():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_path(cpu, 128, dropping=False) == "written"
    assert choose_path(cpu, 2048, dropping=False) == "fused"
    assert choose_path(cpu, 2048, dropping=True) == "written"
    assert choose_path(gpu, 128, dropping=True) == "fused"
    with pytest.raises(ValueError, match="fast"):
        set_attention_path(MultiHeadAttention(8, 2), "fast")


def test_weights_are_dropped_and_the_mean_is_kept():
    torch.manual_seed(4)
    v = torch.ones(1, 1, 200, 1)
    q = k = torch.zeros(1, 1, 200, 1)
    out = attend_written(q, k, v, None, Dropout(0.5).train())
    assert out.std() > 0.02
    assert abs(out.mean() - 1) < 0.02


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("d_value", [None, 3])
def test_training_projects_at_once_what_three_products_give(bias, d_value, monkeypatch):
    monkeypatch.setattr("classiclm.nn.attention.will_copy", lambda linear: True)
    torch.manual_seed(0)
    attn = MultiHeadAttention(8, 2, bias=bias, d_value=d_value).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for training in (True, False):
        attn.train(training).zero_grad()
        heads = attn.project(x, x)
        sum((part * part.cos()).sum() for part in heads).backward()
        results.append(
            [*heads, x.grad, *(parameter.grad for parameter in attn.parameters() if parameter.grad is not None)]
        )
        x.grad = None
    assert len(results[0]) == 4 + 3 * (1 + bias)
    for at_once, apart in zip(*results, strict=True):
        torch.testing.assert_close(at_once, apart)


def test_what_stands_in_for_a_projection_is_called_in_training():
    class Adapter(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    attn, x = MultiHeadAttention(8, 2), torch.randn(1, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        plain = attn.project(x, x)
        adapter = Adapter(8, 8)
        adapter.load_state_dict(attn.v.state_dict())
        attn.v = adapter
        torch.testing.assert_close(attn.project(x, x)[2], plain[2] + 1)


def kept_by_projecting(attn, x):
    """Elements, by type, of what is kept for the backward pass; the parameters themselves are there anyway."""
    kept = {}

    def note(tensor):
        if all(tensor.data_ptr() != parameter.data_ptr() for parameter in [*attn.parameters(), x]):
            kept[tensor.dtype] = kept.get(tensor.dtype, 0) + tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attn.project(x, x)
    return kept


def test_projecting_at_once_keeps_one_copy_of_the_input_and_no_more_of_the_matrices():
    attn, x = MultiHeadAttention(8, 2, bias=False), torch.randn(1, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_by_projecting(attn, x) == {torch.bfloat16: 3 * 64 + 40}
        assert kept_by_projecting(attn.eval(), x) == {torch.bfloat16: 3 * 64 + 3 * 40}


def test_matrices_that_autocast_does_not_copy_are_not_joined():
    """As under FSDP, which lends them in bf16 and takes them back before the backward pass."""
    attn, x = MultiHeadAttention(8, 2, bias=False).bfloat16(), torch.randn(1, 5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert kept_by_projecting(attn, x) == {torch.bfloat16: 3 * 40}
    assert kept_by_projecting(attn.float(), x) == {}
