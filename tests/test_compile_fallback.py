"""torch.compile that fails: the model runs as it is, with the same bits, after one warning."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from classiclm.models import gpt2
from classiclm.objectives import CausalLM
from classiclm.train.compiling import Compiled
from test_norms import SMALL, causal_batch


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def small(seed=1):
    torch.manual_seed(seed)
    return gpt2.GPT2(gpt2.Config(**SMALL)).train()


def train(model, forward, steps=3):
    """The weights after some steps with dropout."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        batch = causal_batch()
        optimizer.zero_grad()
        CausalLM()(forward, batch).total(CausalLM().counts(batch)).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def raising(graph, inputs):
    raise RuntimeError("no such\nbackend here")


def runs_as_it_is(graph, inputs):
    return graph.forward


def raising_backwards(graph, inputs):
    raise RuntimeError("no backward pass")


BACKENDS = {
    "at once": raising,
    "in the backward pass": aot_autograd(fw_compiler=runs_as_it_is, bw_compiler=raising_backwards),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_that_raises_leaves_the_run_its_bits_and_one_warning(backend, capsys):
    expected = train(model := small(), model)
    weights = train(model := small(), Compiled(model, backend=BACKENDS[backend]))
    assert all(torch.equal(a, b) for a, b in zip(expected, weights, strict=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    (warning,) = captured.err.splitlines()
    why = "no such" if backend == "at once" else "no backward pass"
    assert warning == f"warning: torch.compile failed (RuntimeError: {why}); going on without it"


def test_a_backend_that_works_is_used_without_a_word(capsys):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    train(model := small(), Compiled(model, backend=counter))
    assert counter.op_count > 0
    assert capsys.readouterr().err == ""


def test_a_failure_at_a_later_shape_is_answered_too(capsys):
    calls = []

    def once(graph, inputs):
        calls.append(graph)
        return graph.forward if len(calls) == 1 else raising(graph, inputs)

    model = nn.Linear(3, 3)
    compiled = Compiled(model, backend=once, dynamic=False)
    for x in (torch.ones(2, 3), torch.ones(5, 3), torch.ones(7, 3)):
        assert torch.equal(compiled(x), model(x))
    assert len(calls) == 2  # not tried a third time
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_random_numbers_that_a_failed_try_drew_are_drawn_again():
    class Broken(nn.Module):
        def forward(self, x):
            x = x + torch.rand(3)
            torch._dynamo.graph_break()
            return x.relu().sum() + torch.rand(())

    def second_fails(graph, inputs):
        if any("relu" in str(node.target) for node in graph.graph.nodes):
            raise RuntimeError("no relu")
        return graph.forward

    torch.manual_seed(3)
    expected = Broken()(torch.zeros(3))
    torch.manual_seed(3)
    assert torch.equal(Compiled(Broken(), backend=second_fails)(torch.zeros(3)), expected)


def test_an_error_of_the_programs_own_stays_one_and_blames_nobody(capsys):
    model = small()
    compiled = Compiled(model, backend="eager")
    with pytest.raises(ValueError, match="past the last of n_ctx"):
        compiled(torch.zeros(1, 13, dtype=torch.int64))
    assert capsys.readouterr().err == ""
    assert compiled(torch.zeros(1, 12, dtype=torch.int64)).shape == (1, 12, 31)
    assert compiled._run is not model


def test_want_of_memory_is_not_tried_twice(capsys):
    def hungry(graph, inputs):
        def run(*_):
            raise torch.OutOfMemoryError("no memory")

        return run

    compiled = Compiled(nn.Linear(3, 3), backend=hungry)
    with pytest.raises(torch.OutOfMemoryError):
        compiled(torch.ones(2, 3))
    assert capsys.readouterr().err == ""


_WITHOUT_A_COMPILER = """
import torch
from classiclm.train.compiling import Compiled
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.GELU())
compiled = Compiled(model)
for n in (2, 3):
    x = torch.ones(n, 3)
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
print("done")
"""


@pytest.mark.slow
def test_a_machine_without_a_compiler_trains_after_one_warning(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("the other half of this test needs a compiler")
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for compiler, warnings in (("g++", 0), ("/nonexistent", 1)):
        out = subprocess.run(
            [sys.executable, "-c", _WITHOUT_A_COMPILER],
            env={**environment, "CXX": compiler, "CC": compiler},
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert out.stdout == "done\n", out.stderr
        assert out.stderr.count("torch.compile failed") == warnings
        assert len(out.stderr.splitlines()) == warnings
