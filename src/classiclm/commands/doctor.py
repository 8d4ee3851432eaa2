"""classiclm doctor: what will run here, and whether this machine's arithmetic can be trusted."""

import importlib.metadata
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from classiclm import __version__
from classiclm.commands.tables import show, table
from classiclm.config import parse_flags, validate
from classiclm.data.corpora import NAMES, SHAKESPEARE
from classiclm.data.locate import cache_folder, find
from classiclm.models.gpt2 import GPT2, Config
from classiclm.nn.attention import set_attention_path
from classiclm.objectives import CausalLM
from classiclm.train import machine

_PACKAGES = ("torch", "numpy", "pydantic", "tokenizers", "safetensors")
_TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}  # of the error's norm, relative to the reference's


@dataclass(frozen=True)
class DoctorFlags:
    """Say what will run on this machine and why, and compare a tiny forward and backward pass with fp32 on the CPU."""

    device: str = "auto"  # auto, cpu, cuda or mps


def main(argv: Sequence[str], prog: str) -> int:
    """The report on stdout; exit code 1 if the arithmetic is wrong."""
    flags = validate(DoctorFlags, parse_flags(DoctorFlags, argv, prog), "the command line")
    here = machine.look(flags.device)
    precision, why = machine.choose_precision("auto", here)
    checks = check_arithmetic(here.device)
    made = table(["what", "here"])
    for name, value in [
        *versions(),
        ("device", f"{here.device}: {here.name}"),
        ("precision", f"{precision}: {why}"),
    ]:
        made.add_row(name, value)
    made.add_row("memory", f"{here.memory / 2**30:.1f} GiB")
    made.add_row("shakespeare", str(find(SHAKESPEARE) or f"not here; place it at {cache_folder() / SHAKESPEARE.place}"))
    made.add_row("named corpora", ", ".join(NAMES))
    for check in checks:
        made.add_row(check.name, f"{'ok' if check.ok else 'WRONG'}: differs by {check.error:.1e} (bar {check.bar:.0e})")
    show(made)
    return 0 if all(check.ok for check in checks) else 1


def versions() -> list[tuple[str, str]]:
    """classiclm, Python, the system, and the packages that results depend on."""
    packages = [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    system = f"{platform.system()} {platform.machine()}"
    return [("classiclm", __version__), ("python", f"{sys.version.split()[0]}, {system}"), *packages]


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
    precisions = ["fp32", *(["bf16"] if here.bf16 else []), *(["fp16"] if here.fp16 else [])]
    checks = []
    for precision in precisions:
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
