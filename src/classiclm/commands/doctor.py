"""classiclm doctor: what will run here, what is missing and how to get it, and whether this machine's arithmetic can be
trusted.

It also measures the peak of matrix products and writes it into the cache, so that runs can show their share of it.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from classiclm import __version__
from classiclm.commands.tables import show, table
from classiclm.config import parse_flags, validate
from classiclm.data.byte_bpe import GPT2_FILES
from classiclm.data.corpora import MULTI30K, NAMES, SHAKESPEARE
from classiclm.data.gpt1_bpe import GPT1_FILES
from classiclm.data.locate import Download, cache_folder, find
from classiclm.data.wordpiece import BERT_FILE
from classiclm.errors import Error
from classiclm.models.gpt2 import GPT2, Config
from classiclm.nn.attention import set_attention_path
from classiclm.objectives import CausalLM
from classiclm.train import machine
from classiclm.train.gauges import known_peak, measure_peak, remember_peak

_PACKAGES = ("torch", "numpy", "pydantic", "tokenizers", "safetensors")
# What each extra brings, as in pyproject.toml.
EXTRAS = {
    "eval": ("sacrebleu",),
    "export": ("transformers", "gguf"),
    "data": ("datasets", "pyarrow", "zstandard", "ftfy", "tiktoken"),
    "cluster": ("datatrove",),
    "ray": ("ray",),
    "track": ("wandb", "tensorboard"),
    "bench": ("accelerate", "ctranslate2"),
}
_FILES: dict[str, tuple[Download, ...]] = {
    "shakespeare": (SHAKESPEARE,),
    "multi30k": MULTI30K,
    "tokenizer gpt1": GPT1_FILES,
    "tokenizer gpt2": GPT2_FILES,
    "tokenizer bert": (BERT_FILE,),
}
_COMPILERS = ("g++", "clang++", "c++", "cl")
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}  # of the error's norm, relative to the reference's


@dataclass(frozen=True)
class DoctorFlags:
    """Say what will run on this machine and what is missing, measure the peak of its matrix products, and compare a
    tiny forward and backward pass with fp32 on the CPU."""

    device: str = "auto"  # auto, cpu, cuda or mps


def main(argv: Sequence[str], prog: str) -> int:
    """The report on stdout; exit code 1 if the arithmetic is wrong."""
    flags = validate(DoctorFlags, parse_flags(DoctorFlags, argv, prog), "the command line")
    here = machine.look(flags.device)
    checks = check_arithmetic(here.device)
    made = table(["what", "here"])
    for name, value in [*versions(), *extras(), *about(here), *storage(), *files(), *peaks(here)]:
        made.add_row(name, value)
    for check in checks:
        made.add_row(check.name, f"{'ok' if check.ok else 'WRONG'}: differs by {check.error:.1e} (bar {check.bar:.0e})")
    show(made)
    return 0 if all(check.ok for check in checks) else 1


def versions() -> list[tuple[str, str]]:
    """classiclm, Python, the system, and the packages that results depend on."""
    packages = [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    system = f"{platform.system()} {platform.machine()}"
    return [("classiclm", __version__), ("python", f"{sys.version.split()[0]}, {system}"), *packages]


def extras() -> Iterator[tuple[str, str]]:
    """What each extra of the package brings: versions, and how to get what is missing."""
    for extra, packages in EXTRAS.items():
        found = {name: _version(name) for name in packages}
        words = [f"{name} {version}" for name, version in found.items() if version]
        missing = [name for name, version in found.items() if not version]
        if missing:
            words.append(f"missing {', '.join(missing)}: pip install 'classiclm[{extra}]'")
        yield f"extra {extra}", "; ".join(words)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def about(here: machine.Machine) -> list[tuple[str, str]]:
    """The device, what `auto` means on it, and what torch needs to compile for it."""
    precision, why = machine.choose_precision("auto", here)
    return [
        ("device", f"{here.device}: {here.name}"),
        ("GPU", _gpu()),
        ("memory", f"{here.memory / 2**30:.1f} GiB"),
        ("precision", f"{precision}: {why}"),
        ("bf16", "fast" if here.bf16 else "slow: needs AMX, AVX-512 BF16, Arm's bf16, or a GPU of Ampere or newer"),
        ("torch.compile", _compiler(here.device)),
    ]


def _gpu() -> str:
    """The GPU that torch sees, or why it sees none."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, CUDA {torch.version.cuda}"
    if torch.backends.mps.is_available():
        return "Apple's, through MPS"
    if not shutil.which("nvidia-smi"):
        return "none"
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
    return f"a driver is here, but {built}: install the torch that fits it, see https://pytorch.org/get-started"


def _compiler(device: str) -> str:
    """What torch.compile would use: Triton on a GPU, a C++ compiler on a CPU."""
    if device == "cuda":
        return f"Triton {_version('triton')}" if _version("triton") else "no Triton: pip install triton"
    asked = os.environ.get("CXX")
    found = next((path for name in ([asked] if asked else _COMPILERS) if (path := shutil.which(name))), None)
    if found:
        return found
    lacking = f"CXX={asked} is not there" if asked else "no C++ compiler"
    return f"{lacking}: install g++ or clang++; without, runs are not compiled"


def storage() -> list[tuple[str, str]]:
    """Where files are looked for and kept, and the room that is left there."""
    cache = cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = f"{shutil.disk_usage(there).free / 1e9:,.1f} GB free"
    return [("cache", f"{cache}, {free}"), ("CLASSICLM_DATA", _data_folder())]


def _data_folder() -> str:
    root = os.environ.get("CLASSICLM_DATA")
    if not root:
        return "not set: name a folder with published files, if there is one"
    return root if Path(root).is_dir() else f"{root}: no such folder"


def files() -> Iterator[tuple[str, str]]:
    """The published corpora and tokenizers: where they are, or where to place them."""
    for name, downloads in _FILES.items():
        missing = [file for file in downloads if not find(file)]
        if not missing:
            yield name, str(Path(str(find(downloads[0]))).parent)
            continue
        places = ", ".join(file.place for file in missing)
        yield name, f"not here; downloaded when asked for, or place {places} in {cache_folder()}"
    yield "named corpora", ", ".join(NAMES)


def peaks(here: machine.Machine, measure: Callable[[str, str], float] = measure_peak) -> Iterator[tuple[str, str]]:
    """The peak of matrix products in each precision of the device, measured now and remembered for runs to come.

    Other processes only slow products down, so a higher one that is remembered already stays.
    """
    for precision in _precisions(here):
        peak = max(measure(here.device, precision), known_peak(here.device, precision) or 0.0)
        try:
            remember_peak(here.device, precision, peak)
            note = "remembered: runs show their share of it"
        except Error as e:  # a cache that cannot be written is no defect of the machine
            note = f"not remembered ({str(e).partition('. Fix: ')[0]})"
        yield f"peak {precision}", f"{peak / 1e12:,.3g} TFLOPs/s in matrix products; {note}"


def _precisions(here: machine.Machine) -> list[str]:
    return ["fp32", *(["bf16"] if here.bf16 else []), *(["fp16"] if here.fp16 else [])]


@dataclass(frozen=True)
class Check:
    """One comparison with fp32 on the CPU: the norm of the error, relative to that of the reference."""

    name: str
    error: float
    bar: float

    @property
    def ok(self) -> bool:
        """False for an error above the bar, and for NaN."""
        return self.error <= self.bar


def check_arithmetic(device: str) -> list[Check]:
    """Logits and gradients of a tiny GPT-2 for each precision and attention path of the device.

    Some versions of some backends give silently wrong results; this finds out in a second.
    """
    reference = _logits_and_gradient("cpu", "fp32", "written")
    here = machine.look(device)
    checks = []
    for precision in _precisions(here):
        for path in ("written", "fused"):
            result = _logits_and_gradient(device, precision, path)
            error = max(_relative_error(a, b) for a, b in zip(result, reference, strict=True))
            checks.append(Check(f"{device} {precision}, attention {path}", error, _TOLERANCE[precision]))
    return checks


def _logits_and_gradient(device: str, precision: str, path: str) -> tuple[Tensor, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2(Config(n_layers=2, d_model=64, n_heads=4, n_ctx=32, vocab_size=101))
        tokens = torch.randint(101, (2, 33))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # at the usual start logits are near 0, and errors hide
    model.to(device)
    set_attention_path(model, path)
    batch = {"inputs": tokens[:, :-1].to(device), "targets": tokens[:, 1:].to(device)}
    with machine.autocast(device, precision):
        logits = model(batch["inputs"])
        loss = CausalLM()(model, batch)
    loss.total(CausalLM().counts(batch)).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return logits.detach().float().cpu(), gradient.float().cpu()


def _relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())
