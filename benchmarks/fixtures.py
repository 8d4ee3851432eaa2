"""Files that contenders share: random weights of one seed, in each form that somebody reads.

Each is made once, in a process of its own, so that making it leaves no trace in a contender's memory.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from benchmarks.turns import Missing
from benchmarks.work import Work

LIVELY = 8


def need(kind: str, work: Work, folder: Path) -> Path:
    """The folder of kind "hf", "ct2-float32" (or another type), or "run", made if it is not there yet."""
    sizes = f"{work.n_layers}x{work.d_model}-{work.n_ctx}-{work.vocab_size}"
    path = folder / f"{kind}-{sizes}"
    with FileLock(path.with_name(path.name + ".lock")):
        if not path.exists():
            _make_apart(kind, path, work)
    return path


def _make_apart(kind: str, path: Path, work: Work) -> None:
    command = [sys.executable, "-m", "benchmarks.fixtures", kind, str(path), json.dumps(dataclasses.asdict(work))]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise Missing(lines[-1].removeprefix("benchmarks.turns.Missing: "))


def read_model(work: Work, folder: Path) -> Any:
    """The common weights as our model, in evaluation mode."""
    from classiclm.convert import folders
    from classiclm.registry import families

    foreign = folders.read(need("hf", work, folder))
    model = families()[foreign.family].build(foreign.config)
    model.load_state_dict(foreign.weights)
    return model.eval()


def count(work: Work, folder: Path) -> int:
    """Parameters of the common weights: a packed model may hold them in another form."""
    from safetensors import safe_open

    with safe_open(need("hf", work, folder) / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 - it is no mapping
    return sum(_product(shape) for shape in shapes)


def _product(shape: list[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def build(work: Work) -> Any:
    """Our model of these sizes, with the weights of the seed."""
    import torch

    from classiclm.registry import preset

    chosen = preset(work.preset)
    names = ("n_layers", "d_model", "n_heads", "n_ctx", "vocab_size", "dropout")
    sizes = {name: getattr(work, name) for name in names} | ({"bias": work.bias} if work.kind == "causal" else {})
    torch.manual_seed(work.seed)
    return chosen.module.build(dataclasses.replace(chosen.config, **sizes))


def lively(model: Any) -> Any:
    """The model with larger matrices in its blocks: as they are drawn, it would repeat one token for ever."""
    import torch

    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.mul_(LIVELY if parameter.ndim > 1 else 1)
    return model


def hf_tensors(model: Any, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and the tensors of a model of ours in transformers' form."""
    from classiclm.convert import folders

    tables = folders.maps()[family]
    return tables.hf_config(model.config), tables.to_hf(model.config, model.state_dict())


def _hf(path: Path, work: Work) -> None:
    """config.json and model.safetensors, without a tokenizer: ids come in, ids go out."""
    from safetensors.torch import save_file

    config, tensors = hf_tensors(lively(build(work)), "gpt2")
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path / "model.safetensors", {"format": "pt"})


def _ct2(path: Path, work: Work, quantization: str) -> None:
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError as e:
        raise Missing("ctranslate2 is not installed") from e

    class Converter(TransformersConverter):
        def load_tokenizer(self, *_: Any, **__: Any) -> Any:
            return _Vocabulary(work.vocab_size)

    source = need("hf", work, path.parent)
    Converter(str(source)).convert(str(path), quantization=None if quantization == "float32" else quantization)


class _Vocabulary:
    """Token i is the word "ti": all that the converter asks of a tokenizer."""

    bos_token = eos_token = unk_token = "t0"

    def __init__(self, n: int):
        self.n = n

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(self.n)}


def _run(path: Path, work: Work) -> None:
    """A run of ours with one checkpoint, and the same exported for transformers beside it, tokenizers included."""
    import torch

    from classiclm.commands.export import main as export
    from classiclm.data.tokenizers import load_tokenizer, make_tokenizer
    from classiclm.optim import make_optimizer
    from classiclm.registry import preset
    from classiclm.train import checkpoint

    published = work.vocab_size == 50257
    tokenizer = load_tokenizer("gpt2") if published else make_tokenizer("bpe-512", "how now brown cow\n" * 200)
    model = build(work.with_sizes(vocab_size=tokenizer.vocab_size))
    info = {"family": "gpt2", "preset": work.preset, "config": dataclasses.asdict(model.config)}
    texts = {"model.json": json.dumps(info), "tokenizer.json": tokenizer.to_json()}
    with torch.no_grad():
        optimizer = make_optimizer(model, preset(work.preset).recipe)
    checkpoint.save(path, model, optimizer, checkpoint.State(step=1), texts)
    export([str(path), "--to", "hf", "--out", str(path / "hf")], "export")


def main() -> None:
    """`python -m benchmarks.fixtures KIND PATH SIZES`: the whole folder, or none."""
    kind, path, work = sys.argv[1], Path(sys.argv[2]), Work(**json.loads(sys.argv[3]))
    part = path.with_name(path.name + ".part")
    if kind.startswith("ct2-"):
        _ct2(part, work, kind.removeprefix("ct2-"))
    else:
        {"hf": _hf, "run": _run}[kind](part, work)
    part.rename(path)


if __name__ == "__main__":
    main()
