"""litgpt's model class in a loop of its own. Its pins may need an environment apart: nothing of ours is imported."""

from typing import Any

from benchmarks.turns import Turns
from benchmarks.work import Work, batches


def train(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """bf16 autocast, clipping, fused AdamW; the whole batch at once."""
    import torch
    from litgpt.utils import chunked_cross_entropy

    turns.imported()
    model = make(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    data, state = batches(work), {"step": 0}

    def unit() -> None:
        batch = data[state["step"] % len(data)]
        with torch.autocast("cpu", torch.bfloat16, enabled=options["precision"] == "bf16"):
            loss = chunked_cross_entropy(model(batch["inputs"]), batch["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        state["step"] += 1

    said = f"{options['precision']} autocast; rotary positions in place of learned ones, output layer tied by us"
    turns.serve(unit, sum(p.numel() for p in model.parameters()), said)


def make(work: Work) -> Any:
    """GPT-2's block in its words: plain MLP with GELU, layer norms with biases, one residual after the other."""
    import torch
    from litgpt import GPT, Config

    torch.manual_seed(work.seed)
    config = Config(
        name="gpt2",
        block_size=work.n_ctx,
        vocab_size=work.vocab_size,
        padded_vocab_size=work.vocab_size,
        n_layer=work.n_layers,
        n_head=work.n_heads,
        n_embd=work.d_model,
        bias=work.bias,
        lm_head_bias=False,
        norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
        parallel_residual=False,
        intermediate_size=work.d_ff,
    )
    model = GPT(config)
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight
    return model.train()
