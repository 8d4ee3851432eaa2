"""What torch itself offers: nn.Transformer's layers, torch.save; and safetensors' save_file."""

import math
import os
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders import ours
from benchmarks.turns import Turns
from benchmarks.work import Work, batches


def train(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """The Transformer of 2017 from nn.TransformerEncoderLayer and nn.TransformerDecoderLayer; fused Adam."""
    import torch

    turns.imported()
    torch.manual_seed(work.seed)
    model = make(work).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, weight_decay=0, fused=True)
    data, state = batches(work), {"step": 0}

    def unit() -> None:
        batch = data[state["step"] % len(data)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options["precision"] == "bf16"):
            loss = loss_of(model, batch, smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        state["step"] += 1

    said = f"{options['precision']} autocast, the whole batch at once; also drops attention weights"
    turns.serve(unit, sum(p.numel() for p in model.parameters()), said)


def make(work: Work) -> Any:
    """Encoder and decoder of post-norm layers without a norm of their own behind them, and one tied matrix around."""
    import torch
    from torch import nn

    D, eps = work.d_model, 1e-6
    rest: dict[str, Any] = {"dropout": work.dropout, "activation": "relu", "layer_norm_eps": eps, "batch_first": True}

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(D, work.n_heads, work.d_ff, **rest)
            encoder = nn.TransformerEncoder(layer, work.n_layers, enable_nested_tensor=False)
            reader = nn.TransformerDecoderLayer(D, work.n_heads, work.d_ff, **rest)
            decoder = nn.TransformerDecoder(reader, work.n_layers)
            self.tokens = nn.Embedding(work.vocab_size, D)
            self.drop = nn.Dropout(work.dropout)
            self.inner = nn.Transformer(
                D, work.n_heads, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
            )
            nn.init.normal_(self.tokens.weight, std=D**-0.5)

        def embed(self, ids: Any) -> Any:
            return self.drop(self.tokens(ids) * math.sqrt(D) + positions(ids.shape[1], D))

        def forward(self, source: Any, inputs: Any, keep: Any) -> Any:
            later = torch.triu(torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool), 1)
            states = self.inner(
                self.embed(source),
                self.embed(inputs),
                tgt_mask=later,
                src_key_padding_mask=~keep,
                memory_key_padding_mask=~keep,
                tgt_is_causal=True,
            )
            return nn.functional.linear(states, self.tokens.weight)

    return Transformer()


def positions(length: int, d_model: int) -> Any:
    """The sines and cosines of section 3.5, interleaved: (T, D)."""
    import torch

    angle = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, d_model, 2) / d_model)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def loss_of(model: Any, batch: dict[str, Any], smoothing: float) -> Any:
    """The mean cross-entropy of the next tokens."""
    from torch.nn.functional import cross_entropy

    logits = model(batch["source"], batch["inputs"], batch["source_keep"])
    return cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten(), label_smoothing=smoothing)


def checkpoint(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Weights and moments into one file, with fsync; safetensors reads it back, too."""
    import torch
    from safetensors.torch import load_file, save_file

    ours.load()
    turns.imported()
    trainer = ours.make_trainer(work)
    model, optimizer = trainer.model, trainer.optimizer
    ours.fill_moments(model, optimizer)
    path, by_torch = Path("checkpoint"), options["by"] == "torch"

    def tensors() -> dict[str, Any]:
        named = dict(model.named_parameters())
        moments = {f"{kind}/{n}": t for n, p in named.items() for kind, t in optimizer.state[p].items() if t.ndim}
        return {n: p.detach() for n, p in named.items()} | moments

    def save() -> None:
        if by_torch:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        else:
            save_file(tensors(), path)
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)

    def resume() -> None:
        read = load_file(path)
        for name, tensor in tensors().items():
            tensor.copy_(read[name])

    def unit() -> dict[str, float]:
        began = time.perf_counter()
        save()
        seconds = {"save": time.perf_counter() - began}
        if not by_torch:
            began = time.perf_counter()
            resume()
            seconds["resume"] = time.perf_counter() - began
        path.unlink()
        return seconds

    said = "one file, fsync; a pickle, which we do not read" if by_torch else "one file, fsync, no sums"
    turns.serve(unit, model.count_parameters(), said)
