"""A loss whose logits are made in pieces: the plain loss's values and gradients, in less memory."""

import json
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from classiclm.errors import Error
from classiclm.models import gpt2, transformer2017
from classiclm.nn.mask import IGNORE
from classiclm.objectives import CausalLM, InPieces, MaskedLM, Translation, choose_rows, measure
from test_norms import FAMILIES, SMALL, causal_batch, masked_batch, pair_batch

MiB = 1 << 20


def in_pieces(objective, rows):
    return Translation(objective.smoothing, rows) if isinstance(objective, Translation) else type(objective)(rows)


def with_holes(batch):
    """Every third target is none."""
    targets = batch["targets"].clone()
    targets.view(-1)[::3] = IGNORE
    return {**batch, "targets": targets}


def step(model, objective, batch, dtype=None):
    """The total loss and the whole gradient, (N,)."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)  # of dropout
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = objective(model, batch).total(objective.counts(batch))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def family(name):
    make, objective, make_batch, _ = FAMILIES[name]
    torch.manual_seed(1)
    model, batch = make().train(), with_holes(make_batch())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model, Translation(0.1) if isinstance(objective, Translation) else objective, batch


@pytest.mark.parametrize("rows", [1, 7, 48, 1000])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_in_pieces_is_the_plain_loss(name, rows):
    model, objective, batch = family(name)
    loss, gradient = step(model, objective, batch)
    again, gradient_again = step(model, in_pieces(objective, rows), batch)
    assert again == pytest.approx(loss, rel=1e-6)
    assert (gradient_again - gradient).norm() <= 1e-5 * gradient.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_under_autocast_the_pieces_are_as_near_to_fp32_as_the_plain_loss(name):
    """Here the output matrix's gradient is a sum of rounded ones, there it is rounded once. A sum that is rounded after
    each piece would be off by 16 % more for "gpt1"."""
    model, objective, batch = family(name)
    _, exact = step(model, objective, batch)
    loss, gradient = step(model, objective, batch, torch.bfloat16)
    again, gradient_again = step(model, in_pieces(objective, 7), batch, torch.bfloat16)
    assert again == pytest.approx(loss, rel=1e-6)
    assert (gradient_again - exact).norm() <= 1.01 * (gradient - exact).norm() + 1e-5 * exact.norm()


def test_under_autocast_one_piece_has_the_plain_gradient():
    model, objective, batch = family("gpt2")
    loss, gradient = step(model, objective, batch, torch.bfloat16)
    again, gradient_again = step(model, in_pieces(objective, 1000), batch, torch.bfloat16)
    assert again == pytest.approx(loss, rel=1e-6)
    assert (gradient_again - gradient).norm() <= 1e-5 * gradient.norm()


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 30),
    rows=st.integers(1, 40),
    smoothing=st.sampled_from([0.0, 0.1, 0.3]),
    seed=st.integers(0, 999),
)
def test_pieces_of_any_size_add_up_to_the_sum_by_hand(n, rows, smoothing, seed):
    """An oracle in fp64 without torch's loss: labels of 1 - s and s / (V - 1), as section 5.4 of 2017 has them."""
    generator = torch.Generator().manual_seed(seed)
    V, D = 11, 5
    x, weight = torch.randn(n, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (n,), generator=generator)
    targets[torch.rand(n, generator=generator) < 0.3] = IGNORE
    expected = 0.0
    for state, target in zip(x.double(), targets.tolist(), strict=True):
        if target != IGNORE:
            log_p = (weight.double() @ state).log_softmax(0)
            labels = torch.full((V,), smoothing / (V - 1), dtype=torch.float64)
            labels[target] = 1 - smoothing
            expected -= (labels @ log_p).item()
    loss = InPieces(targets, rows, smoothing)(lambda state: F.linear(state, weight), x)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_documents_reach_the_model_with_pieces_too():
    torch.manual_seed(2)
    model = gpt2.GPT2(gpt2.Config(**{**SMALL, "dropout": 0.0}))
    documents = (torch.arange(12) >= 5).long().expand(4, 12)
    batch = causal_batch()
    masked = batch | {"documents": documents, "positions": torch.arange(12).expand(4, 12) - 5 * documents}
    loss, gradient = step(model, CausalLM(), masked)
    again, gradient_again = step(model, CausalLM(7), masked)
    assert again == pytest.approx(loss, rel=1e-6)
    assert (gradient_again - gradient).norm() <= 1e-5 * gradient.norm()
    assert step(model, CausalLM(7), batch)[0] != pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "make_batch", "name"),
    [(CausalLM, causal_batch, "gpt1"), (MaskedLM, masked_batch, "bert"), (Translation, pair_batch, "transformer2017")],
)
def test_what_is_measured_does_not_depend_on_pieces(objective, make_batch, name):
    model = FAMILIES[name][0]()
    batches = [with_holes(make_batch()) for _ in range(3)]
    plain, pieces = measure(model, objective(), batches), measure(model, objective(rows=5), batches)
    assert pieces.terms == pytest.approx(plain.terms, rel=1e-6)
    assert pieces.total == pytest.approx(plain.total, rel=1e-6)


def test_the_logits_of_more_than_one_piece_are_never_there_at_once():
    torch.manual_seed(3)
    model = gpt2.GPT2(gpt2.Config(**SMALL))
    widths, logits = [], model.tok_emb.logits
    model.tok_emb.logits = lambda x: widths.append(x.shape[:-1].numel()) or logits(x)
    step(model, CausalLM(20), causal_batch())
    assert widths[:3] == [20, 20, 8]  # of 48 targets
    assert sorted(widths[3:]) == [8, 20, 20]  # and once more in the backward pass
    widths.clear()
    with torch.no_grad():
        CausalLM(20)(model, causal_batch())
    assert widths == [20, 20, 8]


def test_too_much_smoothing_is_an_error_with_pieces_too():
    model = transformer2017.Transformer2017(transformer2017.Config(**SMALL))
    with pytest.raises(Error) as error:
        Translation(0.99, rows=4)(model, pair_batch())
    assert error.value.code == 2


def test_without_pieces_a_model_needs_no_read_out():
    batch = causal_batch()
    uniform = CausalLM()(lambda tokens: torch.zeros(*tokens.shape, 31), batch)
    assert uniform.terms["loss"].sum.item() == pytest.approx(48 * math.log(31), rel=1e-6)


# The rule


@pytest.mark.parametrize(
    ("asked", "targets", "vocab_size", "expected"),
    [
        ("auto", 64 * 256, 65, None),  # 4 MiB of logits
        ("auto", 1024, 1 << 16, None),  # exactly 256 MiB
        ("auto", 1025, 1 << 16, 1024),
        ("auto", 16 * 1024, 50257, 1024),  # 1,335 would fit
        ("auto", 5, 1 << 28, 1),  # not even one fits
        (300, 1000, 65, 300),
        (1000, 1000, 65, None),  # one piece is no pieces
        (1000, 300, 65, None),
    ],
)
def test_logits_of_over_256_mib_are_made_in_pieces_that_are_not(asked, targets, vocab_size, expected):
    assert choose_rows(asked, targets, vocab_size) == expected


@given(targets=st.integers(1, 10**7), vocab_size=st.integers(2, 10**6))
def test_no_piece_takes_more_than_256_mib_or_half_of_what_it_could(targets, vocab_size):
    rows = choose_rows("auto", targets, vocab_size)
    taken = 4 * vocab_size * (rows or targets)
    assert taken <= 256 * MiB
    assert rows is None or 2 * taken > 256 * MiB - 4 * vocab_size


# Memory

_PEAK = """
import json, resource, sys, torch
from classiclm.models import gpt2
from classiclm.objectives import CausalLM
torch.set_num_threads(1)
torch.manual_seed(0)
model = gpt2.GPT2(gpt2.Config(1, 32, 2, n_ctx=128, vocab_size=50257))
tokens = torch.randint(50257, (16, 129))
batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
def step(objective, rows=16):
    objective(model, {name: tensor[:rows] for name, tensor in batch.items()}).terms["loss"].sum.backward()
step(CausalLM(), 1)
start = peak()
step(CausalLM(256))  # 49 MiB each: smaller ones would lie in glibc's heap, and leave holes
pieces = peak() - start
step(CausalLM())
print(json.dumps({"pieces": pieces, "plain": peak() - start}))
"""


@pytest.mark.slow
def test_the_process_needs_a_third_of_the_memory_for_the_logits_of_gpt_2():
    """2,048 targets: 393 MiB of logits, which the plain loss holds three times. The smaller peak comes first, since a
    process's peak does not come down."""
    out = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True, timeout=100)
    peaks = json.loads(out.stdout)
    assert peaks["plain"] > 2 * 393 * MiB
    assert peaks["pieces"] < peaks["plain"] / 3
