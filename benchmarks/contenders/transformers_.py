"""Hugging Face's transformers: its Trainer, its models in a plain loop, its generate."""

import os
import time
from typing import Any

from benchmarks import fixtures
from benchmarks.turns import Turns, decoding
from benchmarks.work import IGNORE, Work, batches, prompt

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def make(work: Work) -> Any:
    """GPT2LMHeadModel or BertForPreTraining of these sizes, with fresh weights."""
    import transformers

    transformers.set_seed(work.seed)
    if work.kind == "masked":
        return transformers.BertForPreTraining(bert_config(work))
    d, p = work.d_model, work.dropout
    sizes = {"n_positions": work.n_ctx, "n_embd": d, "n_layer": work.n_layers, "n_head": work.n_heads}
    sizes |= {"vocab_size": work.vocab_size, "bos_token_id": None, "eos_token_id": None}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p)  # type: ignore[arg-type]
    )


def bert_config(work: Work) -> Any:
    """BERT of these sizes."""
    import transformers

    return transformers.BertConfig(
        vocab_size=work.vocab_size,
        hidden_size=work.d_model,
        num_hidden_layers=work.n_layers,
        num_attention_heads=work.n_heads,
        intermediate_size=work.d_ff,
        max_position_embeddings=work.n_ctx,
        hidden_dropout_prob=work.dropout,
        attention_probs_dropout_prob=work.dropout,
        pad_token_id=None,
    )


def rows(work: Work, n: int = 4) -> dict[str, Any]:
    """n batches as its models take them: (n B, T) each. Causal models shift the labels themselves, and so lose one."""
    import torch

    made = batches(work, n)
    if work.kind == "causal":
        ids = torch.cat([batch["inputs"] for batch in made])
        return {"input_ids": ids, "labels": ids}
    labels = [torch.full_like(batch["inputs"], IGNORE).scatter(1, batch["places"], batch["targets"]) for batch in made]
    names = {"input_ids": "inputs", "token_type_ids": "segments", "attention_mask": "keep"}
    tensors = {theirs: torch.cat([batch[ours] for batch in made]) for theirs, ours in names.items()}
    tensors["attention_mask"] = tensors["attention_mask"].long()
    return {**tensors, "labels": torch.cat(labels), "next_sentence_label": torch.cat([b["next"] for b in made])}


def trainer(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Its Trainer owns the loop, so the turns are taken in its callbacks: a unit is a step from begin to end."""
    transformers = load()
    turns.imported()
    model = make(work)
    data = rows(work, n=16)
    dataset = [{name: tensor[i] for name, tensor in data.items()} for i in range(len(data["input_ids"]))]
    settings = _arguments(work, options)
    micro = f"{options['micro_batch']} x {work.batch // options['micro_batch']}"
    said = f"{options['precision']}, {micro} sequences, fused AdamW"
    callback = _turns_of(turns, sum(p.numel() for p in model.parameters()), said)
    transformers.Trainer(model=model, args=settings, train_dataset=dataset, callbacks=[callback]).train()


def load() -> Any:
    """The library with all that is used of it here, which it imports only when asked."""
    import transformers

    for name in ("Trainer", "TrainingArguments", "GPT2LMHeadModel", "BertForPreTraining"):
        getattr(transformers, name)
    transformers.logging.set_verbosity_error()
    return transformers


def _arguments(work: Work, options: dict[str, Any]) -> Any:
    """Its settings, near those of our recipes: none of them changes the speed."""
    import transformers

    return transformers.TrainingArguments(
        output_dir="trainer",
        per_device_train_batch_size=options["micro_batch"],
        gradient_accumulation_steps=work.batch // options["micro_batch"],
        bf16=options["precision"] == "bf16",
        use_cpu=True,
        max_steps=1_000_000,
        learning_rate=1e-3,
        weight_decay=0.1,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=work.seed,
    )


def _turns_of(turns: Turns, n_params: int, said: str) -> Any:
    import transformers

    class Callback(transformers.TrainerCallback):
        done, began = -turns.warm_up, 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if self.done == 0:
                turns.ready(n_params, said)
            if self.done >= 0 and not turns.wait():
                raise SystemExit(0)  # it is inside a step, which it would take first
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - self.began
            if self.done >= 0:
                turns.done({"step": seconds})
            self.done += 1

    return Callback()


def loop(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """The model in the shortest loop that trains: autocast, clipping, fused AdamW; the whole batch at once."""
    import torch

    load()
    turns.imported()
    model, data, state = make(work).train(), rows(work), {"step": 0}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    starts = range(0, 4 * work.batch, work.batch)
    parts = [{name: tensor[i : i + work.batch] for name, tensor in data.items()} for i in starts]

    def unit() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options["precision"] == "bf16"):
            loss = model(**parts[state["step"] % 4]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        state["step"] += 1

    said = f"{options['precision']}, plain loop, the whole batch at once, fused AdamW"
    turns.serve(unit, sum(p.numel() for p in model.parameters()), said)


def decode(work: Work, options: dict[str, Any], turns: Turns) -> None:
    """Its generate, greedy, in one of torch's types, with the dynamic or the static cache."""
    import torch

    transformers = load()
    turns.imported()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[options["precision"]]
    folder = fixtures.need("hf", work, turns.folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    tokens = prompt(work)
    mask = torch.ones_like(tokens)
    static = {"cache_implementation": "static"} if options["cache"] == "static" else {}

    def write(n: int) -> Any:
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=mask, max_new_tokens=n, do_sample=False, **static)

    written = write(work.new_tokens)[:, work.length :]
    assert written.shape[1] == work.new_tokens
    n_params = sum(p.numel() for p in model.parameters())
    said = f"{options['precision']}, {options['cache']} cache"
    turns.serve(decoding(write, work.new_tokens), n_params, said, written=written.tolist())
