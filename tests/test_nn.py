"""Dropout, layer norm, MLP, blocks and first weights against torch's own modules and against statistics."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from classiclm.nn.blocks import PlainBlock, PostLNBlock, PreLNBlock, ResidualBlock
from classiclm.nn.dropout import Dropout, scaled_mask
from classiclm.nn.embedding import PositionEmbedding, TokenEmbedding
from classiclm.nn.init import init_fan_in, init_gpt2
from classiclm.nn.mask import Mask
from classiclm.nn.mlp import MLP
from classiclm.nn.norm import LayerNorm, layer_norm


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_dropout_drops_a_share_p_independently_and_keeps_the_mean(p):
    torch.manual_seed(0)
    n = 400_000
    y = Dropout(p).train()(torch.ones(n))
    dropped = (y == 0).double()
    deviation = math.sqrt(p * (1 - p) / n)
    assert abs(dropped.mean() - p) < 5 * deviation
    assert abs(y.mean() - 1) < 5 * deviation / (1 - p)
    assert torch.unique(y).numel() == 2
    for lag in (1, 2, 3, 4, 8):  # neighbours share a random word: they must not share their fate
        correlation = torch.corrcoef(torch.stack([dropped[:-lag], dropped[lag:]]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(n)


def test_dropout_is_seeded_and_its_gradient_is_its_own_mask():
    x = torch.randn(7, 11, requires_grad=True)
    torch.manual_seed(5)
    y = Dropout(0.3).train()(x)
    torch.manual_seed(5)
    assert torch.equal(y, Dropout(0.3).train()(x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


def test_dropout_does_nothing_in_evaluation_or_with_p_0():
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x


@pytest.mark.parametrize("n", [1, 2, 3, 5, 4097])
def test_masks_of_any_size_have_their_shape(n):
    mask = scaled_mask(torch.Size((n,)), 0.25, torch.float32, torch.device("cpu"))
    assert mask.shape == (n,)
    assert set(mask.tolist()) <= {0.0, torch.tensor(4 / 3).item()}


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_written_out_equals_the_fused_one_and_torch_nn(bias):
    torch.manual_seed(1)
    x = torch.randn(4, 6, 16, dtype=torch.float64, requires_grad=True)
    ours, theirs = LayerNorm(16, 1e-5, bias).double(), nn.LayerNorm(16, 1e-5, bias=bias).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    written = layer_norm(x, ours.weight, ours.bias, ours.eps)
    torch.testing.assert_close(written, ours(x))
    torch.testing.assert_close(written, theirs(x))
    upstream = torch.randn_like(written)
    a, b = (torch.autograd.grad(y, x, upstream)[0] for y in (written, ours(x)))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("act", "function"),
    [("relu", F.relu), ("gelu", F.gelu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))],
)
def test_the_mlp_is_two_linear_layers(act, function):
    mlp, x = MLP(8, 20, act), torch.randn(2, 3, 8)
    expected = function(x @ mlp.up.weight.T + mlp.up.bias) @ mlp.down.weight.T + mlp.down.bias
    torch.testing.assert_close(mlp(x), expected)


def test_the_post_ln_block_equals_torchs_encoder_layer_and_the_pre_ln_block_its_norm_first():
    for ours_class, norm_first in ((PostLNBlock, False), (PreLNBlock, True)):
        torch.manual_seed(2)
        ours = ours_class(16, 4, act="relu")
        theirs = nn.TransformerEncoderLayer(16, 4, 64, 0.0, "relu", batch_first=True, norm_first=norm_first)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.3)
            for i, layer in enumerate((ours.attn.q, ours.attn.k, ours.attn.v)):
                layer.weight.copy_(theirs.self_attn.in_proj_weight[16 * i : 16 * (i + 1)])
                layer.bias.copy_(theirs.self_attn.in_proj_bias[16 * i : 16 * (i + 1)])
        ours.attn.o.load_state_dict(theirs.self_attn.out_proj.state_dict())
        ours.mlp.up.load_state_dict(theirs.linear1.state_dict())
        ours.mlp.down.load_state_dict(theirs.linear2.state_dict())
        ours.ln1.load_state_dict(theirs.norm1.state_dict())
        ours.ln2.load_state_dict(theirs.norm2.state_dict())
        x, forbidden = torch.randn(3, 7, 16), torch.ones(7, 7, dtype=torch.bool).triu(1)
        torch.testing.assert_close(ours(x, mask=Mask(causal=True)), theirs(x, src_mask=forbidden), rtol=1e-4, atol=1e-4)


def test_residuals_are_what_tells_the_residual_block_from_the_plain_one():
    torch.manual_seed(3)
    plain, residual = PlainBlock(8, 2), ResidualBlock(8, 2)
    residual.load_state_dict(plain.state_dict())
    x = torch.randn(1, 4, 8)
    after = x + plain.attn(x)
    torch.testing.assert_close(residual(x), after + plain.mlp(after))
    torch.testing.assert_close(plain(x), plain.mlp(plain.attn(x)))


def test_blocks_build_only_the_norms_they_use():
    counts = {c.__name__: sum(isinstance(m, LayerNorm) for m in c(8, 2).modules()) for c in (PlainBlock, ResidualBlock)}
    assert counts == {"PlainBlock": 0, "ResidualBlock": 0}
    block = PreLNBlock(8, 2)
    block(torch.randn(1, 3, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


def test_positions_end_at_n_ctx():
    positions = PositionEmbedding(4, 2)
    assert positions(1, 3).shape == (3, 2)
    with pytest.raises(ValueError, match="n_ctx = 4"):
        positions(2, 3)


def test_gpt2_weights_start_with_the_stated_spreads():
    torch.manual_seed(4)
    model = nn.ModuleDict({"tok": TokenEmbedding(500, 128), "pos": PositionEmbedding(100, 128)})
    model["blocks"] = nn.ModuleList(PreLNBlock(128, 4) for _ in range(8))
    init_gpt2(model, n_layers=8)
    block = model["blocks"][3]
    for weight in (model["tok"].weight, model["pos"].weight, block.attn.q.weight, block.mlp.up.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    for weight in (block.attn.o.weight, block.mlp.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.03)
    assert not block.attn.q.bias.any()


def test_fan_in_weights_keep_the_variance_of_a_signal():
    torch.manual_seed(5)
    layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(8)))
    init_fan_in(layers)
    assert layers(torch.randn(512, 256)).std().item() == pytest.approx(1.0, rel=0.15)
