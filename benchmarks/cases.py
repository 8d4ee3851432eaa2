"""What is compared with what. Each case is data: the work, who takes part, and what we want of it."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.work import Work

Role = Literal["ours", "peer", "limit"]


@dataclass(frozen=True)
class Entry:
    """One contender: its name in the report, "file:function" of contenders/, and the function's options."""

    name: str
    target: str
    role: Role
    options: dict[str, Any] = field(default_factory=dict)
    work: Work | None = None  # where it is not the case's
    x: float | None = None  # where it is a point of a curve
    limit: str | None = None  # the limit that it is compared with, where there are several


@dataclass(frozen=True)
class Measure:
    """What a unit is timed by, and in what the report gives it: a rate, or "s" for seconds."""

    name: str
    unit: str = "s"

    def amount(self, work: Work, n_params: int | None) -> float | None:
        """How much a unit does: tokens, or megabytes of weights and two moments in fp32. None where nobody counts."""
        amounts: dict[str, float] = {"step": work.n_tokens, "prefill": work.n_tokens}
        amounts["decode"] = work.batch * work.new_tokens
        amounts |= dict.fromkeys(("save", "resume"), 12e-6 * (n_params or 0))
        return amounts.get(self.name)


@dataclass(frozen=True)
class Bar:
    """What we set ourselves: the fastest of ours whose name begins so, in multiples of the fastest of theirs. "a or b"
    are two beginnings. of="memory": our peak, in multiples of theirs, at most the floor. of="loss" or "seconds": ours,
    at most the floor, whatever theirs is."""

    ours: str
    theirs: str
    floor: float
    goal: float | None = None
    of: Literal["speed", "memory", "loss", "seconds"] = "speed"


@dataclass(frozen=True)
class Case:
    """A comparison. `small` are the sizes of a quick run."""

    name: str
    title: str
    about: str
    work: Work
    entries: tuple[Entry, ...]
    measures: tuple[Measure, ...]
    small: dict[str, Any]
    bars: tuple[Bar, ...] = ()
    axis: str | None = None  # of a curve

    def quick(self) -> "Case":
        """The same at toy sizes, for finding out whether everything runs."""
        work = self.work.with_sizes(**self.small)
        entries = tuple(_small(entry, self.small) for entry in self.entries)
        return dataclasses.replace(self, work=work, entries=entries, bars=())


def _small(entry: Entry, sizes: dict[str, Any]) -> Entry:
    options = dict(entry.options)
    if "micro_batch" in options:
        options["micro_batch"] = min(options["micro_batch"], sizes.get("batch", options["micro_batch"]))
    if "steps" in options:
        options["steps"] = 4
    work = entry.work and entry.work.with_sizes(**{key: sizes[key] for key in ("n_layers", "d_model", "n_heads")})
    return dataclasses.replace(entry, options=options, work=work)


def _rates(*names: str) -> tuple[Measure, ...]:
    return tuple(Measure(name, "tokens/s") for name in names)


_TOY = {"n_layers": 2, "d_model": 32, "n_heads": 2}
_FLOATS = "ours plain or ours fp32 or ours bf16 or ours fp16"  # int8 costs quality: it has a bar of its own
_REPLAY = Entry("matrix products alone", "limits:replay", "limit")
_OURS = Entry("ours", "ours:train", "ours")

SHAKESPEARE = Work("causal", "gpt2-shakespeare", 6, 384, 6, 256, 65, batch=64, length=256, dropout=0.2, bias=False)
GPT2 = Work("causal", "gpt2-124m", 12, 768, 12, 1024, 50257, batch=2, length=1024)
BERT = Work("masked", "bert-base", 12, 768, 12, 512, 30522, batch=8, length=128, dropout=0.1)
PAIRS = Work("pairs", "transformer2017-base", 6, 512, 8, 256, 40960, batch=32, length=64, dropout=0.1)


def _trainers(*micro_batches: int, precisions: tuple[str, ...] = ("fp32", "bf16")) -> list[Entry]:
    return [
        Entry(
            f"transformers Trainer {precision}{f', micro-batch {n}' if len(micro_batches) > 1 else ''}",
            "transformers_:trainer",
            "peer",
            {"precision": precision, "micro_batch": n},
        )
        for precision in precisions
        for n in micro_batches
    ]


def _nanogpt() -> list[Entry]:
    named = {"fp32": "nanoGPT fp32 (its default)", "bf16": "nanoGPT bf16 autocast"}
    return [Entry(name, "nanogpt:train", "peer", {"precision": precision}) for precision, name in named.items()]


def _bert(work: Work) -> Case:
    return Case(
        f"train-bert-base-{work.length}",
        f"Pre-training BERT base, {work.batch} x {work.length}",
        "One optimizer step of masked words (15 %) and next sentence, dropout 0.1. transformers makes logits of all "
        "places; ours and the products alone make them of the masked ones.",
        work,
        (
            _OURS,
            Entry("transformers loop bf16", "transformers_:loop", "peer", {"precision": "bf16"}),
            *_trainers(work.batch, precisions=("bf16",)),
            _REPLAY,
        ),
        _rates("step"),
        {**_TOY, "vocab_size": 97, "n_ctx": 32, "batch": 2, "length": 16},
        (Bar("ours", "transformers", 1.3),),
    )


def _recipe(preset: str, note: str) -> Entry:
    return Entry(f"ours {preset}", "commands:recipe", "ours", {"preset": preset, "steps": None, "note": note})


def _decoding(work: Work, title: str, peers: list[Entry], bars: tuple[Bar, ...], limits: list[Entry]) -> Case:
    size = "shakespeare" if work.preset == "gpt2-shakespeare" else "gpt2-124m"
    ours = [
        Entry(f"ours {precision}", "ours:decode", "ours", {"precision": precision})
        for precision in ("plain", "fp32", "bf16", "fp16", "int8")
    ]
    return Case(
        f"decode-{size}-{work.batch}",
        title,
        f"{work.new_tokens} greedy tokens behind a prompt of {work.length}, the same random weights for all; the first "
        "token is the prefill's and counts apart.",
        work,
        tuple(dataclasses.replace(entry, limit=_reading(entry)) for entry in (*ours, *peers, *limits)),
        _rates("decode", "prefill"),
        {**_TOY, "vocab_size": 97, "n_ctx": 64, "length": 4, "new_tokens": 8},
        bars,
    )


def _reading(entry: Entry) -> str:
    """The limit with as many bytes a weight."""
    p = entry.options["precision"]
    same = "int8" if p.startswith("int8") else "fp32" if p in ("plain", "fp32", "float32") else "bf16"
    return f"reading {same} weights"


def _generate(caches: tuple[str, ...], precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")) -> list[Entry]:
    return [
        Entry(f"transformers {p}, {c} cache", "transformers_:decode", "peer", {"precision": p, "cache": c})
        for p in precisions
        for c in caches
    ]


def _ct2() -> list[Entry]:
    kinds = ("float32", "int8", "int8_float32", "bfloat16", "int8_bfloat16")
    return [Entry(f"CTranslate2 {kind}", "ctranslate2_:decode", "peer", {"precision": kind}) for kind in kinds]


def _decode_limits() -> list[Entry]:
    bare = [Entry(f"products alone {p}", "limits:vectors", "limit", {"precision": p}) for p in ("fp32", "bf16")]
    reading = ("fp32", "bf16", "int8")
    return [*bare, *(Entry(f"reading {p} weights", "limits:reading", "limit", {"precision": p}) for p in reading)]


def _command(name: str, role: Role, *words: str, note: str = "") -> Entry:
    options = {"words": list(words), "note": note}
    return Entry(name, "commands:command", role, options, limit="import torch")


_IMPORT_TORCH = _command("import torch", "limit", "-c", "import torch")


def _start(
    name: str, title: str, about: str, entries: tuple[Entry, ...], bar: Bar, measures: tuple[str, ...] = ("command",)
) -> Case:
    small = {**_TOY, "vocab_size": 97, "n_ctx": 64}
    return Case(f"start-{name}", title, about, GPT2, entries, tuple(map(Measure, measures)), small, (bar,))


def _curve(axis: str, title: str, about: str, entries: list[Entry], work: Work) -> Case:
    small = {**_TOY, "n_ctx": 64, "batch": 2, "length": 16}
    return Case(f"grow-{axis}", title, about, work, tuple(entries), _rates("step"), small, axis=axis)


_SMALL = SHAKESPEARE.with_sizes(dropout=0.0, batch=16)


def _points(*works: tuple[str, float, Work]) -> list[Entry]:
    return [Entry(name, "ours:train", "ours", work=work, x=x) for name, x, work in works]


_CONTEXTS = _points(
    *((f"T = {T}", T, _SMALL.with_sizes(n_ctx=T, length=T, batch=4096 // T)) for T in (128, 256, 512, 1024))
)
_BATCHES = _points(*((f"B = {B}", B, _SMALL.with_sizes(batch=B)) for B in (1, 4, 16, 64)))
_SIZES = _points(
    *(
        (f"{n} blocks of {d}", 12 * n * d * d, _SMALL.with_sizes(n_layers=n, d_model=d, n_heads=d // 64))
        for n, d in ((6, 384), (8, 512), (12, 768))
    )
)
_RANKS = [
    Entry(f"{n} process{'es' if n > 1 else ''}", "ranks:train", "ours", {"ranks": n}, work=_SMALL, x=n) for n in (1, 2)
]

CASES = (
    Case(
        "train-shakespeare",
        "Training a 10.7 M model on characters, 64 x 256, dropout 0.2",
        "One optimizer step of gpt2-shakespeare, clipping and AdamW included: 16,384 tokens.",
        SHAKESPEARE,
        (_OURS, *_nanogpt(), *_trainers(16, 64), _REPLAY),
        _rates("step"),
        {**_TOY, "n_ctx": 32, "length": 32, "batch": 4},
        (
            Bar("ours", "nanoGPT fp32", 4.0, 5.0),
            Bar("ours", "transformers Trainer bf16", 3.0),
            Bar("ours", "matrix products", 0.30, 0.45),
        ),
    ),
    Case(
        "recipe-shakespeare",
        "From the command to a model of Shakespeare's characters",
        "Whole processes: text read, trained, validated on the way, saved. The loss is that of the whole validation "
        "split, in nats per character; ours begins from another seed in each round (losses differ by 0.01 then), "
        "nanoGPT from its only one.",
        SHAKESPEARE,
        (
            _recipe("gpt2-shakespeare-cpu", "nanoGPT's recipe: 2,000 steps of 12 x 64, AdamW"),
            _recipe("gpt2-shakespeare-fast", "ours: 1,000 steps of 16 x 128, Muon, a rate that ends at 0"),
            Entry(
                "nanoGPT",
                "nanogpt:recipe",
                "peer",
                {"steps": 2000, "note": "its README's recipe for a CPU, 2,000 steps of 12 x 64, AdamW; fp32"},
            ),
        ),
        (Measure("recipe"),),
        _TOY,
        (
            Bar("ours gpt2-shakespeare-cpu", "nanoGPT", 2.0),
            Bar("ours gpt2-shakespeare-fast", "nanoGPT", 1.0),
            Bar("ours gpt2-shakespeare-fast", "nanoGPT", 1.75, of="loss"),
        ),
    ),
    Case(
        "train-gpt2-124m",
        "Training GPT-2 124M, 2 x 1,024, no dropout",
        "One optimizer step of 2,048 tokens. litgpt has rotary positions in place of learned ones.",
        GPT2,
        (
            _OURS,
            *_trainers(2),
            Entry("litgpt bf16 autocast", "litgpt_:train", "peer", {"precision": "bf16"}),
            _REPLAY,
        ),
        _rates("step"),
        {**_TOY, "vocab_size": 97, "n_ctx": 32, "length": 32},
        (
            Bar("ours", "transformers Trainer bf16", 1.5),
            Bar("ours", "transformers Trainer bf16", 1.0, of="memory"),
            Bar("ours", "matrix products", 0.45, 0.55),
        ),
    ),
    _bert(BERT),
    _bert(BERT.with_sizes(batch=2, length=512)),
    Case(
        "train-transformer2017-base",
        "Training the base model of 2017, 32 pairs of 64 tokens",
        "One optimizer step, dropout 0.1, smoothed labels. torch's layers drop attention weights, too, and inside the "
        "MLP, as they always do.",
        PAIRS,
        (_OURS, Entry("torch.nn.Transformer bf16", "torch_:train", "peer", {"precision": "bf16"}), _REPLAY),
        _rates("step"),
        {**_TOY, "vocab_size": 97, "n_ctx": 32, "batch": 3, "length": 16},
        (Bar("ours", "torch.nn.Transformer", 1.3),),
    ),
    _decoding(
        GPT2.with_sizes(batch=1, length=16, new_tokens=64),
        "Writing with GPT-2 124M, one text",
        [*_generate(("dynamic", "static")), *_ct2()],
        (Bar(_FLOATS, "transformers", 1.25, 1.4), Bar("ours int8", "CTranslate2 int8", 1.3)),
        _decode_limits(),
    ),
    _decoding(
        GPT2.with_sizes(batch=8, length=16, new_tokens=64),
        "Writing with GPT-2 124M, eight texts at once",
        [*_generate(("dynamic", "static"), ("fp32", "bf16")), *_ct2()],  # fp16: minutes a unit on a CPU
        (Bar(_FLOATS, "transformers", 1.5, 2.0),),
        _decode_limits(),
    ),
    _decoding(
        SHAKESPEARE.with_sizes(batch=1, length=16, new_tokens=200),
        "Writing with the 10.7 M model, one text",
        _generate(("dynamic",)),
        (Bar(_FLOATS, "transformers", 2.5, 3.5),),
        _decode_limits(),
    ),
    _start(
        "help",
        "Start-up: `classiclm --help`, `import classiclm`",
        "Cold processes on a warm disk.",
        (
            _command("classiclm --help", "ours", "-m", "classiclm", "--help"),
            _command("import classiclm", "ours", "-c", "import classiclm"),
            _command("python", "limit", "-c", "pass", note="an interpreter that does nothing"),
            _IMPORT_TORCH,
        ),
        Bar("classiclm --help", "import torch", 0.5, of="seconds"),
    ),
    _start(
        "generate",
        "Start-up: the first token of a 124 M model",
        "From the command to the first byte that it writes, and to its end, weights and tokenizer loaded: a cold "
        "process on a warm disk.",
        (
            _command("classiclm generate", "ours", "-m", "classiclm", "generate", "RUN", "--max_new_tokens", "1"),
            _command("transformers", "peer", "-c", "THEIRS", "EXPORT", note="from_pretrained, generate"),
            _IMPORT_TORCH,
        ),
        Bar("classiclm generate", "transformers", 3.0, of="seconds"),
        ("first output", "command"),
    ),
    Case(
        "checkpoint",
        "Saving and resuming a 124 M run",
        "Weights and both moments in fp32 to the disk, fsync included, and back into a model and an optimizer.",
        GPT2,
        (
            Entry("ours", "ours:checkpoint", "ours"),
            Entry("safetensors.save_file", "torch_:checkpoint", "peer", {"by": "safetensors"}),
            Entry("torch.save", "torch_:checkpoint", "peer", {"by": "torch"}),
        ),
        (Measure("save", "MB/s"), Measure("resume", "MB/s")),
        {**_TOY, "vocab_size": 97, "n_ctx": 32, "length": 32},
    ),
    _curve("context", "How it grows: context", "4,096 tokens a step of a 10.7 M model.", _CONTEXTS, _SMALL),
    _curve("batch", "How it grows: batch", "Sequences of 256 in a step of a 10.7 M model.", _BATCHES, _SMALL),
    _curve("size", "How it grows: parameters", "16 x 256 tokens a step.", _SIZES, _SMALL),
    _curve(
        "ranks",
        "How it grows: processes",
        "16 x 256 tokens a step of a 10.7 M model, shared out to processes of one thread each (gloo).",
        _RANKS,
        _SMALL,
    ),
)
