"""What each process of tests/test_distributed.py runs: a few steps of training, one fault, or one question.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/distributed_run.py JSON

JSON has the settings; rank 0 writes its answer to the file `out`.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch

from classiclm.data.batches import derive, rows_of
from classiclm.data.pairs import micro_batches
from classiclm.errors import Error
from classiclm.nn.mask import IGNORE
from classiclm.objectives import CausalLM, MaskedLM, Translation
from classiclm.optim import make_optimizer
from classiclm.recipe import Recipe
from classiclm.train.distributed import (
    add_up,
    clip_norm,
    distribute,
    joined,
    measure_share,
    share,
    whole,
    world_from_env,
)
from classiclm.train.machine import autocast

VOCABULARY, N_CTX = 29, 12
SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_ctx": N_CTX, "vocab_size": VOCABULARY, "dropout": 0.0}
FAMILIES = {  # module, its own sizes, objective, optimizer
    "ladder": ("ladder", {"rung": 9, "d_ff": 64}, CausalLM(), "adamw"),
    "bigram": ("ladder", {"rung": 1}, CausalLM(), "adamw"),  # has no block, so that FSDP has the root only
    "gpt1": ("gpt1", {}, CausalLM(), "adam-gpt1"),
    "gpt2": ("gpt2", {}, CausalLM(), "adamw"),
    "gpt3": ("gpt3", {"band": 4}, CausalLM(), "adamw"),
    "bert": ("bert", {}, MaskedLM(), "adam-bert"),
    "transformer2017": ("transformer2017", {"d_ff": 64}, Translation(0.1), "adamw"),
}


def random_tokens(*shape, generator):
    """Some far more often than others: that can be learnt in a few steps."""
    return 1 + (torch.rand(shape, generator=generator) ** 4 * (VOCABULARY - 1)).long()


def causal_batch(n, generator):
    tokens = random_tokens(n, N_CTX + 1, generator=generator)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:].clone()}


def masked_batch(n, generator):
    """Rows with another number of targets each, and padding."""
    targets = random_tokens(n, 3, generator=generator)
    targets[torch.rand(n, 3, generator=generator) < 0.3] = IGNORE
    lengths = torch.randint(6, N_CTX + 1, (n, 1), generator=generator)
    return {
        "inputs": random_tokens(n, N_CTX, generator=generator),
        "segments": torch.randint(0, 2, (n, N_CTX), generator=generator),
        "keep": torch.arange(N_CTX) < lengths,
        "places": torch.arange(3).expand(n, 3),
        "targets": targets,
        "next": torch.randint(0, 2, (n,), generator=generator),
    }


def pair_batch(n, generator):
    """Pairs of very different lengths, the longest last, as a sorted corpus has them."""
    lengths = torch.randint(1, N_CTX + 1, (2, n, 1), generator=generator).sort(dim=1).values
    source, target = (random_tokens(n, N_CTX, generator=generator) for _ in range(2))
    keep, inside = (torch.arange(N_CTX) < length for length in lengths)
    inputs = torch.zeros_like(target)
    inputs[:, 1:] = target[:, :-1]
    targets = target.masked_fill(~inside, IGNORE)
    return {"source": source * keep, "source_keep": keep, "inputs": inputs, "targets": targets}


MAKERS = {"bert": masked_batch, "transformer2017": pair_batch}


def batch_of(family, step, n):
    return MAKERS.get(family, causal_batch)(n, torch.Generator().manual_seed(derive("batch", step)))


def parts_of(family):
    return micro_batches if family == "transformer2017" else rows_of


def build(family, dropout=0.0):
    module, own, objective, optimizer = FAMILIES[family]
    module = importlib.import_module(f"classiclm.models.{module}")
    model = module.build(module.Config(**{**SIZES, **own, "dropout": dropout}))
    return model, objective, optimizer


def train(world, family, strategy, steps=20, batch=8, micro_batch=4, seed=0, **settings):
    """Losses, norms and validation losses of `steps` steps; bytes of weights and moments; the weights at the end."""
    torch.manual_seed(seed + settings.get("other_seed_on", {}).get(str(world.rank), 0))
    model, objective, optimizer_name = build(family, settings.get("dropout", 0.0))
    precision = settings.get("precision", "fp32")
    forward = distribute(model, strategy, world, precision, settings.get("copies", 1))
    recipe = Recipe(optimizer=optimizer_name, lr=3e-3, weight_decay=0.1, clip=settings.get("clip", 0.5))
    optimizer = make_optimizer(model, recipe)
    rows = []
    for step in range(steps):
        world.at_step(step + 1)
        fault(settings.get("fault"), world, step)
        torch.manual_seed(derive("dropout", seed, step, world.rank))
        whole_batch = batch_of(family, step, batch)
        counts = objective.counts(whole_batch)
        loss = torch.zeros(())
        parts = share(whole_batch, parts_of(family), micro_batch, world)
        for i, micro in enumerate(parts):
            add_up(forward, last=i == len(parts) - 1)
            with autocast("cpu", precision):
                part = objective(forward, micro).total(counts)
            part.backward()
            loss += part.detach()
        norm = clip_norm(model, recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        rows.append([world.sum(loss).item(), norm.item()])
    with autocast("cpu", precision):
        validation = (batch_of(family, 1000 + i, 3) for i in range(settings.get("n_validation", 5)))
        measured = measure_share(model, objective, validation, world)
    sharded = all(hasattr(p, "full_tensor") for p in model.parameters())
    held = n_bytes(model, optimizer)
    weights = [whole(p.detach()).double().sum().item() for p in model.parameters()]
    measured = [measured.total, measured.terms]
    return {"rows": rows, "measured": measured, "bytes": held, "weights": weights, "sharded": sharded}


def n_bytes(model, optimizer):
    """Of weights and moments in this process."""
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def fault(wanted, world, step):
    """Do to one rank at one step what no program can catch, or let it fail by itself."""
    if not wanted or [world.rank, step] != wanted["at"]:
        return
    if wanted["kind"] == "raise":
        raise ZeroDivisionError("a fault of the test's own")
    os.kill(os.getpid(), getattr(signal, wanted["kind"]))


def ask(world):
    """One answer of each of World's methods."""
    gathered = world.gather({"rank": world.rank, "text": "é" * (1 + 5 * world.rank)})
    world.barrier()
    return {
        "gathered": gathered,
        "sum": world.sum(torch.tensor([world.rank + 1.0, 1e-17], dtype=torch.float64)).tolist(),
        "any": [world.any(world.rank == 1), world.any(False)],
        "largest": world.largest(world.rank * 7),
    }


def main(settings):
    world = world_from_env()
    torch.set_num_threads(1)
    with joined(world, "cpu", settings.get("timeout", 60)) as world:
        answer = [train(world, **case) for case in settings.get("cases", [])]
        answer += [ask(world)] if settings.get("ask") else []
        answers = world.gather(answer)
        if world.is_main:
            Path(settings["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except Error as e:  # as cli.main does
        print(f"error: {e}", file=sys.stderr)
        sys.exit(e.code)
