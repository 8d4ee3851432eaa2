"""The first weights of every model have the distribution that its paper (or its official code) asks for.

Each group of weights is held against the exact distribution: its mean and standard deviation within five standard
errors, and the whole of it by the distance of Kolmogorov and Smirnov, which tells a normal from a uniform or a cut-off
one.
"""

import dataclasses
import math
import re
import subprocess
import sys
from collections import defaultdict

import pytest
import torch
from torch import Tensor

from classiclm import registry
from classiclm.models import bert, gpt1, gpt2, gpt3, transformer2017
from classiclm.nn.init import shapes_only

SIGMA = 0.02
ERRORS = 5.0  # standard errors
DISTANCE = 2.3  # times 1 / sqrt(n): larger once in 20,000 samples


def phi(x: Tensor) -> Tensor:
    """The normal distribution function."""
    return (1 + torch.erf(x / math.sqrt(2))) / 2


class Normal:
    """N(0, std)."""

    def __init__(self, std):
        self.std, self.kurtosis = std, 3.0

    def below(self, x):
        """The share of numbers up to x."""
        return phi(x / self.std)

    bound = math.inf


class Truncated:
    """N(0, sigma) without what lies beyond two sigma (the mass beyond is spread over the rest)."""

    def __init__(self, sigma):
        self.sigma, self.bound = sigma, 2 * sigma
        self.mass = (phi(torch.tensor(2.0)) - phi(torch.tensor(-2.0))).item()
        density = math.exp(-2) / math.sqrt(2 * math.pi)  # of the standard normal, at 2
        variance = 1 - 4 * density / self.mass
        self.std = sigma * math.sqrt(variance)
        self.kurtosis = (3 * variance - 16 * density / self.mass) / variance**2  # by parts: E x^4 = 3 E x^2 - 2 8 phi/Z

    def below(self, x):
        return (phi(x / self.sigma) - phi(torch.tensor(-2.0))) / self.mass


class Uniform:
    """U(-bound, bound)."""

    def __init__(self, bound):
        self.bound, self.std, self.kurtosis = bound, bound / math.sqrt(3), 1.8

    def below(self, x):
        return (x / self.bound + 1) / 2


def groups_of(model):
    """Name without the block's number -> all the numbers of that name, in order of size."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        groups[re.sub(r"\.\d+\.", ".", name)].append(parameter.detach().double().flatten())
    return {name: torch.cat(parts).sort().values for name, parts in groups.items()}


def assert_drawn_from(x, expected, name):
    n = len(x)
    assert n > 500
    assert abs(x.mean()) <= ERRORS * expected.std / math.sqrt(n), name
    # A sample's standard deviation has the standard error std sqrt((kurtosis - 1) / 4n).
    error = expected.std * math.sqrt((expected.kurtosis - 1) / (4 * n))
    assert abs(x.pow(2).mean().sqrt() - expected.std) <= ERRORS * error, name
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    share = expected.below(x)
    distance = torch.maximum((share - steps[:-1]).abs().max(), (share - steps[1:]).abs().max())
    assert distance * math.sqrt(n) <= DISTANCE, name
    assert x.abs().max() <= expected.bound, name
    if math.isfinite(expected.bound):
        assert x.abs().max() >= expected.bound * (1 - 40 / n), name  # the ends are reached


def assert_starts(model, expected):
    """`expected`: group of weights -> distribution; besides them there are only biases of 0 and gains of 1."""
    groups = groups_of(model)
    for name, x in groups.items():
        if name.endswith("bias"):
            assert not x.any(), name
        elif re.search(r"\bln\w*\.weight$", name):
            assert (x == 1).all(), name
        else:
            assert_drawn_from(x, expected[name], name)
    assert expected.keys() <= groups.keys()


def inside_blocks(stack="blocks", attentions=("attn",)):
    """The names of all matrices in a stack of blocks."""
    names = [f"{attention}.{part}" for attention in attentions for part in "qkvo"]
    return [f"{stack}.{name}.weight" for name in (*names, "mlp.up", "mlp.down")]


def test_gpt1_starts_at_n_0_002_everywhere():
    torch.manual_seed(1)
    model = gpt1.GPT1(gpt1.Config(n_layers=3, d_model=96, n_heads=4, n_ctx=101, vocab_size=997))
    names = ["tok_emb.weight", "pos_emb.weight", *inside_blocks()]
    assert_starts(model, dict.fromkeys(names, Normal(SIGMA)))


@pytest.mark.parametrize("n_layers", [1, 4, 11])
@pytest.mark.parametrize(("family", "cls"), [(gpt2, gpt2.GPT2), (gpt3, gpt3.GPT3)])
def test_gpt2_and_gpt3_start_smaller_where_a_layer_writes_into_the_residual_stream(family, cls, n_layers):
    torch.manual_seed(2)
    model = cls(family.Config(n_layers=n_layers, d_model=96, n_heads=4, n_ctx=101, vocab_size=997))
    names = ["tok_emb.weight", "pos_emb.weight", *inside_blocks()]
    expected = dict.fromkeys(names, Normal(SIGMA))
    residual = Normal(SIGMA / math.sqrt(2 * n_layers))
    expected |= dict.fromkeys(["blocks.attn.o.weight", "blocks.mlp.down.weight"], residual)
    assert_starts(model, expected)


def test_bert_starts_at_a_normal_that_is_cut_off_at_two_sigma():
    torch.manual_seed(3)
    sizes = {"n_ctx": 101, "n_segments": 7, "vocab_size": 997}
    model = bert.BERT(bert.Config(n_layers=3, d_model=288, n_heads=4, d_ff=128, **sizes))
    names = ["tok_emb.weight", "pos_emb.weight", "seg_emb.weight", "pooler.weight", "mlm.dense.weight", "nsp.weight"]
    assert_starts(model, dict.fromkeys([*names, *inside_blocks()], Truncated(SIGMA)))


@pytest.mark.parametrize("positions", ["sinusoids", "learned"])
def test_the_transformer_starts_uniform_by_fan_in_and_its_embedding_at_one_over_root_d_model(positions):
    torch.manual_seed(4)
    d_model, n_heads, d_head, d_value, d_ff = 96, 4, 20, 12, 200  # all widths that a matrix can have differ
    model = transformer2017.Transformer2017(
        transformer2017.Config(3, d_model, n_heads, d_head, d_value, d_ff, positions, n_ctx=101, vocab_size=997)
    )
    names = [*inside_blocks("encoder"), *inside_blocks("decoder", ("attn", "cross"))]
    d_in = dict.fromkeys(names, d_model)
    d_in |= {name: n_heads * d_value for name in names if ".o." in name}
    d_in |= {name: d_ff for name in names if ".down." in name}
    expected = {name: Uniform(math.sqrt(3 / width)) for name, width in d_in.items()}
    expected["tok_emb.weight"] = Normal(d_model**-0.5)
    if positions == "learned":
        expected["pos_emb.weight"] = Normal(d_model**-0.5)
    assert_starts(model, expected)


def test_the_yardsticks_tell_the_distributions_apart():
    torch.manual_seed(5)
    n, uniform, normal = 20_000, Uniform(0.06), Normal(SIGMA)
    sample = (SIGMA * torch.randn(n, dtype=torch.float64)).sort().values
    assert_drawn_from(sample, normal, "normal")
    cut = sample[sample.abs() <= 2 * SIGMA]
    assert_drawn_from(cut, Truncated(SIGMA), "truncated")
    wrong = [
        (sample, Truncated(SIGMA)),
        (cut, normal),
        (sample, Uniform(SIGMA * math.sqrt(3))),
        (sample * 1.03, normal),
    ]
    wrong += [(sample + 0.001, normal), (torch.linspace(-0.05, 0.05, n, dtype=torch.float64), uniform)]
    for x, expected in wrong:
        with pytest.raises(AssertionError):
            assert_drawn_from(x, expected, "")


@pytest.mark.parametrize(
    "name", ["gpt1-117m", "gpt2-124m", "gpt3-small", "bert-base", "transformer2017-base", "ladder-12"]
)
def test_a_model_of_shapes_has_the_names_and_shapes_of_one_with_numbers(name):
    preset = registry.preset(name)
    small = dataclasses.replace(preset.config, n_layers=2, d_model=32, n_heads=2, n_ctx=16, vocab_size=50)
    with shapes_only():
        empty = preset.module.build(small)
    full = preset.module.build(small)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in full.state_dict().items()}


def test_shapes_need_no_compiler():
    program = "import sys; from classiclm import registry; registry.count_parameters(registry.preset('gpt2-124m'))"
    program += "; print('sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "False"
