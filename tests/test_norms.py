"""Norms by layer: against sums by hand, for every family, without a trace in the run that they are taken of."""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from classiclm.models import bert, gpt1, gpt2, gpt3, ladder, transformer2017
from classiclm.nn.blocks import Block
from classiclm.nn.mask import Mask
from classiclm.objectives import CausalLM, MaskedLM, Translation
from classiclm.train.norms import activation_norms, as_numbers, blocks_of, gradient_norms

SMALL = {"n_layers": 3, "d_model": 24, "n_heads": 2, "n_ctx": 12, "vocab_size": 31, "dropout": 0.1}


def causal_batch():
    tokens = torch.randint(31, (4, 13))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}


def masked_batch():
    batch = causal_batch()
    places = torch.tensor([[1, 5], [2, 3], [0, 4], [6, 7]])
    return {
        "inputs": batch["inputs"],
        "segments": torch.zeros(4, 12, dtype=torch.int64),
        "keep": torch.ones(4, 12, dtype=torch.bool),
        "places": places,
        "targets": batch["targets"].gather(1, places),
        "next": torch.tensor([0, 1, 1, 0]),
    }


def pair_batch():
    batch = causal_batch()
    return {**batch, "source": torch.randint(31, (4, 9)), "source_keep": torch.ones(4, 9, dtype=torch.bool)}


FAMILIES = {
    "gpt1": (lambda: gpt1.GPT1(gpt1.Config(**SMALL)), CausalLM(), causal_batch, 3),
    # More than ten blocks: "blocks.1" is not "blocks.10".
    "gpt2": (lambda: gpt2.GPT2(gpt2.Config(**{**SMALL, "n_layers": 11})), CausalLM(), causal_batch, 11),
    "gpt3": (lambda: gpt3.GPT3(gpt3.Config(**SMALL, band=4)), CausalLM(), causal_batch, 3),
    "bert": (lambda: bert.BERT(bert.Config(**SMALL)), MaskedLM(), masked_batch, 3),
    "transformer2017": (
        lambda: transformer2017.Transformer2017(transformer2017.Config(**SMALL)),
        Translation(),
        pair_batch,
        6,
    ),
    **{
        f"ladder-{rung}": (lambda rung=rung: ladder.build(ladder.config_of(rung)), CausalLM(), causal_batch, n_blocks)
        for rung, n_blocks in ((1, 0), (3, 0), (9, 3))
    },
}


@pytest.fixture(params=FAMILIES)
def family(request):
    """(model, objective, batch, how many blocks it has), in training mode."""
    make, objective, make_batch, n_blocks = FAMILIES[request.param]
    torch.manual_seed(1)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.train(), objective, make_batch(), n_blocks


def backward(model, objective, batch):
    model.zero_grad(set_to_none=True)
    objective(model, batch).total(objective.counts(batch)).backward()


def test_the_squares_of_the_layers_gradient_norms_add_up_to_that_of_the_whole(family):
    model, objective, batch, n_blocks = family
    backward(model, objective, batch)
    norms = as_numbers(gradient_norms(model))
    whole = nn.utils.clip_grad_norm_(model.parameters(), math.inf).item()
    assert math.sqrt(sum(norm**2 for norm in norms.values())) == pytest.approx(whole, rel=1e-5)
    assert len([name for name in norms if name.removeprefix("grad_norm/") in blocks_of(model)]) == n_blocks
    assert len(norms) > n_blocks  # at least an embedding is outside
    assert all(norm > 0 for norm in norms.values())


def test_each_layers_gradient_norm_is_that_of_its_parameters(family):
    model, objective, batch, _ = family
    backward(model, objective, batch)
    norms = as_numbers(gradient_norms(model))
    for name, norm in norms.items():
        layer = model.get_submodule(name.removeprefix("grad_norm/"))
        own = layer.parameters(recurse=isinstance(layer, Block))
        flat = torch.cat([p.grad.double().flatten() for p in own if p.grad is not None])
        assert norm == pytest.approx(flat.pow(2).sum().sqrt().item(), rel=1e-5), name


def test_every_block_of_every_family_has_its_activations_measured(family):
    model, objective, batch, n_blocks = family
    norms = as_numbers(activation_norms(model, lambda: objective(model, batch)))
    assert [name.removeprefix("act_rms/") for name in norms] == [
        name for name, module in model.named_modules() if type(module).__name__.endswith("Block")
    ]
    assert len(norms) == n_blocks
    assert all(norm > 0 for norm in norms.values())


def test_activation_norms_are_the_root_mean_squares_of_what_blocks_put_out():
    torch.manual_seed(2)
    model = gpt2.GPT2(gpt2.Config(**SMALL)).train()
    tokens = causal_batch()["inputs"]
    norms = as_numbers(activation_norms(model, lambda: model(tokens)))
    model.eval()  # the oracle walks through the blocks itself, without dropout
    x = model.tok_emb(tokens) + model.pos_emb(0, tokens.shape[1])
    for i, block in enumerate(model.blocks):
        x = block(x, mask=Mask(causal=True))
        assert norms[f"act_rms/blocks.{i}"] == pytest.approx(x.double().square().mean().sqrt().item(), rel=1e-5)


def test_post_norm_activations_have_a_root_mean_square_of_one():
    """A fact from outside: what a layer norm with fresh gains puts out has variance 1 (2017, section 5.4 aside)."""
    model = gpt1.GPT1(gpt1.Config(**{**SMALL, "d_model": 96}))
    norms = as_numbers(activation_norms(model, lambda: model(causal_batch()["inputs"])))
    assert list(norms.values()) == pytest.approx([1.0] * 3, abs=1e-3)


def train(family_name, with_norms, steps=4):
    make, objective, make_batch, _ = FAMILIES[family_name]
    torch.manual_seed(3)
    model, batch = make().train(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        backward(model, objective, batch)
        if with_norms:
            assert as_numbers(gradient_norms(model) | activation_norms(model, lambda: objective(model, batch)))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model, torch.get_rng_state()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_with_norms_ends_with_the_same_bytes(name):
    """With dropout, and one seed for all steps: a single random number more would show."""
    model, state = train(name, with_norms=False)
    looked_at, state_too = train(name, with_norms=True)
    assert torch.equal(state, state_too)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), looked_at.parameters(), strict=True))
    assert looked_at.training
    assert all(module.training for module in looked_at.modules())
    assert not any(module._forward_hooks for module in looked_at.modules())


def test_a_pass_that_fails_leaves_no_hook_and_the_mode_as_it_was():
    model = gpt2.GPT2(gpt2.Config(**SMALL)).train()
    with pytest.raises(RuntimeError, match="boom"):
        activation_norms(model, lambda: (_ for _ in ()).throw(RuntimeError("boom")))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


class Waits(TorchDispatchMode):
    """Counts the operations that wait for a device: a tensor that becomes a Python number."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.n += "_local_scalar_dense" in str(function)
        return function(*arguments, **(keywords or {}))


def test_no_norm_waits_for_the_device_until_all_are_asked_for_at_once():
    model, objective, batch = gpt2.GPT2(gpt2.Config(**SMALL)), CausalLM(), causal_batch()
    backward(model, objective, batch)
    with Waits() as waits:
        norms = gradient_norms(model) | activation_norms(model, lambda: objective(model, batch))
        assert waits.n == 0
        next(iter(norms.values())).item()
        assert waits.n == 1  # the counter counts
        as_numbers(norms)
        assert waits.n == 1


def test_a_norm_that_is_not_finite_is_null():
    assert as_numbers({"a": torch.tensor(math.inf), "b": torch.tensor(math.nan), "c": torch.tensor(2.0)}) == {
        "a": None,
        "b": None,
        "c": 2.0,
    }
    assert as_numbers({}) == {}


def test_bf16_activations_are_measured_in_fp32():
    model = gpt2.GPT2(gpt2.Config(**SMALL)).bfloat16().eval()
    tokens, exact = causal_batch()["inputs"], []

    def forward():
        assert not torch.is_grad_enabled()
        for block in model.blocks:
            block.register_forward_hook(lambda _, __, x: exact.append(x.double().square().mean().sqrt().item()))
        model(tokens)

    norms = activation_norms(model, forward)
    assert list(as_numbers(norms).values()) == pytest.approx(exact, rel=1e-5)


def test_a_layer_without_a_gradient_has_no_norm():
    model, objective, batch = gpt2.GPT2(gpt2.Config(**SMALL)), CausalLM(), causal_batch()
    model.blocks[1].requires_grad_(False)
    backward(model, objective, batch)
    assert [name for name in gradient_norms(model) if "blocks" in name] == ["grad_norm/blocks.0", "grad_norm/blocks.2"]


def test_a_compiled_model_is_neither_missed_nor_compiled_again():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = gpt2.GPT2(gpt2.Config(**{**SMALL, "dropout": 0.0})), CompileCounter()
    tokens = causal_batch()["inputs"]
    compiled = torch.compile(model, backend=counter)
    before, n = compiled(tokens), counter.frame_count
    assert len(activation_norms(model, lambda: model(tokens))) == 3
    assert torch.equal(compiled(tokens), before)
    assert counter.frame_count == n > 0


def test_sharded_parameters_have_the_norms_of_whole_ones():
    """FSDP2 on one process: gradients are DTensors there."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(4)
    model, objective, batch = gpt2.GPT2(gpt2.Config(**{**SMALL, "dropout": 0.0})), CausalLM(), causal_batch()

    def look():
        backward(model, objective, batch)
        return as_numbers(gradient_norms(model) | activation_norms(model, lambda: objective(model, batch)))

    whole = look()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
        sharded = look()
    finally:
        dist.destroy_process_group()
    assert hasattr(next(model.parameters()), "full_tensor")
    assert sharded == pytest.approx(whole, rel=1e-5)
