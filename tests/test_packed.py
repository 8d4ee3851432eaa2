"""Packed matrices: what each form rounds is bounded by the form, and every family goes on as it did in fp32."""

import copy
import importlib
import json

import pytest
import torch
import torch.nn.functional as F

from classiclm.errors import Error
from classiclm.generate.packed import Eighths, Packed, pack, quantize
from classiclm.generate.sample import generate
from classiclm.models import gpt2
from classiclm.nn.mask import Mask
from classiclm.objectives import CausalLM, mean_loss
from test_generate_command import run  # noqa: F401 (a fixture)

# Of one weight at most, as a share of its row's largest.
ROUNDING = {"fp32": 2**-24, "bf16": 2**-8, "fp16": 2**-11, "int8": 1 / 254}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
packings = pytest.mark.parametrize("precision", ROUNDING)
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_ctx": 24, "vocab_size": 61}
FAMILIES = {
    "ladder": {"rung": 12, "d_ff": 64},
    "gpt1": {},
    "gpt2": {},
    "gpt3": {"band": 4},
    "bert": {},
    "transformer2017": {"d_ff": 64},
}


def build(family):
    """Weights large enough that a wrong product would be seen."""
    module = importlib.import_module(f"classiclm.models.{family}")
    torch.manual_seed(3)
    model = module.build(module.Config(**SIZES, **FAMILIES[family])).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0 if "emb" in name else 0.25)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def forward(family, model, tokens):
    if family == "transformer2017":
        return model(tokens.flip(1), tokens, Mask(keep=torch.ones_like(tokens, dtype=torch.bool)))
    outputs = model(tokens)
    return outputs if isinstance(outputs, torch.Tensor) else outputs[0]


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("bias", [True, False])
@packings
def test_a_product_is_that_of_the_rounded_matrix(precision, rows, bias):
    torch.manual_seed(0)
    weight, x, b = torch.randn(48, 96), torch.randn(rows, 1, 96), torch.randn(48) if bias else None
    matrix = Eighths(weight, b) if precision == "int8" else Packed(weight, b, DTYPES[precision])
    rounded = (matrix.rows(torch.arange(48)) if precision == "int8" else weight.to(DTYPES[precision])).double()
    share = weight.abs().amax(dim=1, keepdim=True)
    assert ((rounded - weight).abs() <= ROUNDING[precision] * share * 1.01).all()
    exact = F.linear(x.double(), rounded, None if b is None else b.double())
    terms = F.linear(x.double().abs(), rounded.abs())  # what errors of x and of partial sums are in proportion to
    unit = {"fp32": 2**-20, "fp16": 2**-10}.get(precision, 2**-8)
    assert ((matrix(x) - exact).abs() <= unit * (terms + exact.abs() + 4)).all()


def test_fp16_is_multiplied_where_there_is_no_fbgemm_too(monkeypatch):
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    torch.manual_seed(0)
    weight, x, b = torch.randn(48, 96), torch.randn(3, 1, 96), torch.randn(48)
    y = Packed(weight, b, torch.float16)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), F.linear(x, weight, b), rtol=2**-9, atol=0.05)


def test_scales_have_no_error_of_their_own_and_no_weight_is_cut_off():
    torch.manual_seed(1)
    weight = torch.randn(300, 40) * torch.logspace(-6, 3, 300)[:, None]
    weight[7] = 0
    numbers, scales = quantize(weight)
    assert scales.dtype == torch.bfloat16
    assert numbers.abs().max() <= 127
    assert numbers[7].abs().max() == 0
    rounded = numbers.double() * scales.double()[:, None]
    assert ((rounded - weight).abs() <= scales.double()[:, None] / 2 * (1 + 1e-6)).all()
    assert (scales.double() >= weight.abs().amax(dim=1).double() / 127 * (1 - 1e-7)).all()


@pytest.mark.parametrize("family", FAMILIES)
@packings
def test_every_family_gives_nearly_the_logits_of_fp32(family, precision):
    model, tokens = build(family), torch.randint(1, 61, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = forward(family, model, tokens)
    packed = pack(copy.deepcopy(model), precision)
    error = forward(family, packed, tokens) - expected
    assert error.std() <= 16 * ROUNDING[precision] * expected.std()
    assert precision == "fp32" or error.std() > 0
    left = {type(module).__name__ for module in packed.modules()} & {"Linear", "TokenEmbedding"}
    assert not left


@packings
def test_a_cache_reads_what_a_whole_pass_reads(precision):
    model = pack(build("gpt2"), precision)
    tokens = torch.randint(1, 61, (1, 12), generator=torch.Generator().manual_seed(0))
    whole, cache = model(tokens), model.new_cache()
    steps = torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(12)], dim=1)
    assert (steps - whole).std() <= 8 * 2**-8 * whole.std()


def test_whole_numbers_take_a_quarter_of_the_memory():
    model = gpt2.build(gpt2.Config(n_layers=2, d_model=128, n_heads=2, n_ctx=8, vocab_size=500)).eval()
    matrices = sum(p.numel() * 4 for name, p in model.named_parameters() if p.ndim == 2 and "pos_emb" not in name)
    pack(model, "int8")
    held = [tensor for name, tensor in model.named_buffers() if name.endswith((".numbers", ".scales"))]
    assert sum(tensor.numel() * tensor.element_size() for tensor in held) <= 0.25 * matrices * 1.02
    assert not [p for name, p in model.named_parameters() if p.ndim == 2 and "pos_emb" not in name]


@packings
def test_a_packed_model_writes(precision):
    model = pack(build("gpt3"), precision)
    one = generate(model, torch.tensor([[5, 6, 7]]), 40, seed=2)
    assert one.shape == (1, 43)
    assert torch.equal(one, generate(model, torch.tensor([[5, 6, 7]]), 40, seed=2))


@packings
def test_a_table_of_bigrams_which_is_nothing_but_an_embedding_is_measured_and_written_with(precision):
    module = importlib.import_module("classiclm.models.ladder")
    model = pack(module.build(module.Config(1, **SIZES)), precision)
    tokens = torch.randint(1, 61, (2, 9))
    assert mean_loss(model, CausalLM(), [{"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}]) > 0
    assert generate(model, tokens[:1, :3], 4).shape == (1, 7)


def test_an_unknown_precision_is_refused():
    with pytest.raises(Error, match="bf16"):
        pack(build("gpt2"), "fp8")


def test_the_commands_take_a_precision(cli, run):  # noqa: F811
    how = ["--max_new_tokens", 8, "--precision", "int8", "--device", "cpu"]
    code, out, _ = cli("generate", run, "--prompt", "HAMLET:", *how)
    assert code == 0
    assert out.startswith("HAMLET:")
    losses = {}
    for precision in ROUNDING:
        code, out, _ = cli("evaluate", run, "--precision", precision, "--json", "--device", "cpu")
        assert code == 0
        (row,) = json.loads(out)
        assert row["precision"] == precision
        losses[precision] = row["loss"]
    assert len(set(losses.values())) == len(ROUNDING)
    assert all(loss == pytest.approx(losses["fp32"], rel=5e-3) for loss in losses.values())
