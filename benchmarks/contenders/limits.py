"""What the machine allows: the bare matrix products of a step, those of a token, and reading the weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.contenders import ours
from benchmarks.turns import Turns, timed
from benchmarks.work import Work

WIDTH = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of a weight


@dataclass(frozen=True)
class Product:
    """X W^T, `count` times with another W: X (batch, m, k), W (batch, n, k)."""

    m: int
    k: int
    n: int
    count: int = 1
    batch: int = 1

    @property
    def flops(self) -> int:
        """Of all, forward only."""
        return 2 * self.batch * self.m * self.k * self.n * self.count


def products(work: Work, rows: int) -> list[Product]:
    """The products of one forward pass over `rows` sequences: all linear layers and attention's two.

    q, k and v are one product. Of masked models, the output layer counts at masked places only.
    """
    return [*linear(work, rows), *attention(work, rows)]


def linear(work: Work, rows: int) -> list[Product]:
    """The linear layers, the output layer among them."""
    D, F, M, L = work.d_model, work.d_ff, rows * work.length, work.n_layers
    block = [Product(M, D, 3 * D, L), Product(M, D, D, L), Product(M, D, F, L), Product(M, F, D, L)]
    if work.kind == "causal":
        return [*block, Product(M, D, work.vocab_size)]
    if work.kind == "masked":
        P = rows * work.n_places
        return [*block, Product(P, D, D), Product(P, D, work.vocab_size), Product(rows, D, D), Product(rows, D, 2)]
    cross = [Product(M, D, D, L), Product(M, D, 2 * D, L), Product(M, D, D, L)]
    return [*block, *block, *cross, Product(M, D, work.vocab_size)]


def attention(work: Work, rows: int) -> list[Product]:
    """Scores and sums of values: of each block once, of a decoder's twice."""
    T, K, heads = work.length, work.d_model // work.n_heads, rows * work.n_heads
    n = work.n_layers * (3 if work.kind == "pairs" else 1)
    return [Product(T, K, T, n, heads), Product(T, T, K, n, heads)]


def replay(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """The products of a training step of ours, forward and both backward, in its micro-batches and its precision."""
    import torch

    plan = ours.make_trainer(work).plan
    turns.imported()
    rows = max(1, plan.micro_batch // work.length) if work.kind == "pairs" else plan.micro_batch
    rows = min(rows, work.batch)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[plan.precision]
    calls = [call for product in products(work, rows) for call in prepared(product, dtype, backward=True)]
    flops = 3 * sum(product.flops for product in products(work, rows)) * (work.batch / rows)

    def unit() -> None:
        for _ in range(round(work.batch / rows)):
            for call in calls:
                call()

    said = f"{plan.precision}, {rows} sequences at a time, {flops / 1e12:.2f} TFLOP a step"
    turns.serve(unit, None, said, flops=flops)


def prepared(product: Product, dtype: Any, backward: bool) -> list[Callable[[], Any]]:
    """A call for each product, on matrices that are there already; results overwrite one another."""
    import torch

    p = product
    shape = (p.batch,) if p.batch > 1 else ()
    x, dy = torch.randn(*shape, p.m, p.k).to(dtype), torch.randn(*shape, p.m, p.n).to(dtype)
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    calls: list[Callable[[], Any]] = []
    for _ in range(p.count):
        w = torch.randn(*shape, p.n, p.k).to(dtype)
        calls.append(lambda w=w: torch.matmul(x, w.mT, out=y))
        if backward:
            dw = torch.empty_like(w)
            calls.append(lambda w=w: torch.matmul(dy, w, out=dx))
            calls.append(lambda dw=dw: torch.matmul(dy.mT, x, out=dw))
    return calls


def vectors(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """The linear layers of each new token, with one row for each text of the batch, by torch's own products."""
    import torch

    turns.imported()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options["precision"]]
    layers = linear(work.with_sizes(length=1), work.batch)
    calls = [call for product in layers for call in prepared(product, dtype, backward=False)]

    def unit() -> dict[str, float]:
        seconds, _ = timed(lambda: [call() for _ in range(work.new_tokens) for call in calls])
        return {"decode": seconds}

    with torch.inference_mode():
        turns.serve(unit, None, f"{options['precision']}, torch.matmul")


def reading(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Reading as many bytes as the weights have, once for each new token: no decoder of dense weights can do less."""
    import torch

    turns.imported()
    n_weights = sum(product.k * product.n * product.count for product in linear(work.with_sizes(length=1), 1))
    n_bytes = n_weights * WIDTH[options["precision"]]
    numbers = torch.ones(n_bytes // 8, dtype=torch.int64)

    def unit() -> dict[str, float]:
        seconds, _ = timed(lambda: [numbers.sum() for _ in range(work.new_tokens)])
        return {"decode": seconds}

    unit()
    rate = n_bytes * work.new_tokens / unit()["decode"] / 1e9
    turns.serve(unit, None, f"{n_bytes / 1e6:.0f} MB a token, read at {rate:.1f} GB/s")
