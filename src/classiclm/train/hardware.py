"""What a run asks of a machine (floating-point operations) and what GPUs offer, from their vendors' data sheets.

Speeds are peaks of dense matrix products (no 2:4 sparsity), with sums in fp32; fp32 is without TF32, as torch computes
by default. Memory is as printed, in 10^9 bytes; power is the board's limit.
"""

import dataclasses
import os
from dataclasses import dataclass

from classiclm.errors import Error, did_you_mean
from classiclm.train.machine import Machine, Precision, cpu_flags
from classiclm.train.memory import Micro, Network, keys

_T, _G = 10**12, 10**9
USABLE = 0.9  # of a GPU's memory: the rest is for CUDA itself, its libraries and gaps between tensors
_CPU_CLOCK = 2.5e9  # Hz, assumed


@dataclass(frozen=True)
class Hardware:
    """One device: bytes, FLOP/s and watts; None where nobody says."""

    name: str
    memory: int
    half: float  # bf16, or fp16 where there is no bf16
    fp32: float
    watts: int | None
    bf16: bool = True
    cpu: bool = False
    source: str = ""

    @property
    def machine(self) -> Machine:
        """As the facts that `auto` is decided by."""
        return Machine("cpu" if self.cpu else "cuda", self.name, self.bf16, not self.cpu, self.memory)

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory * USABLE)

    def peak(self, precision: Precision) -> float:
        """FLOP/s of matrix products."""
        return self.fp32 if precision == "fp32" else self.half


def _gpu(name: str, memory: int, half: float, fp32: float, watts: int, source: str, bf16: bool = True) -> Hardware:
    return Hardware(name, memory * _G, half * _T, fp32 * _T, watts, bf16, source=source)


# Printed with sparsity in the newer sheets; half of that is here.
GPUS = {
    "h200": _gpu("H200 SXM", 141, 989, 67, 700, "NVIDIA H200 data sheet"),
    "h100": _gpu("H100 SXM 80 GB", 80, 989, 67, 700, "NVIDIA H100 data sheet"),
    "a100": _gpu("A100 SXM 80 GB", 80, 312, 19.5, 400, "NVIDIA A100 data sheet"),
    "a100-40gb": _gpu("A100 SXM 40 GB", 40, 312, 19.5, 400, "NVIDIA A100 data sheet"),
    "v100": _gpu("V100 SXM2 32 GB", 32, 125, 15.7, 300, "NVIDIA V100 data sheet", bf16=False),
    "4090": _gpu("GeForce RTX 4090", 24, 165, 82.6, 450, "NVIDIA Ada GPU architecture whitepaper"),
    "3090": _gpu("GeForce RTX 3090", 24, 71, 35.6, 350, "NVIDIA Ampere GA102 whitepaper"),
    "t4": _gpu("T4", 16, 65, 8.1, 70, "NVIDIA T4 data sheet", bf16=False),
}


def hardware(name: str, here: Machine) -> Hardware:
    """A GPU of the table by name; "cpu" is this machine's; "auto" this machine's GPU, if the table has it, or its CPU.

    Raises Error (exit 2) for a name or a GPU that is not in the table.
    """
    if name == "cpu" or (name == "auto" and here.device == "cpu"):
        return _this_cpu(here)
    if name != "auto":
        if name not in GPUS:
            raise Error(f"--gpu {name}", "is not in the table", did_you_mean(name, ["cpu", *GPUS]))
        return GPUS[name]
    words = here.name.lower().replace("-", " ").split()
    found = next((gpu for key, gpu in GPUS.items() if key in words), None)
    if found is None:
        raise Error(f"--gpu {here.name}", "is not in the table", f"name the nearest, of {', '.join(GPUS)}")
    return dataclasses.replace(found, memory=here.memory)  # an A100 comes with 40 and with 80 GB


def _this_cpu(here: Machine) -> Hardware:
    """This machine's CPU: cores x operations a cycle of its widest unit, at an assumed clock. A rough figure."""
    flags = cpu_flags()
    cores = os.cpu_count() or 1
    fp32 = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16  # two units, multiply and add
    half = 2048 if "amx_bf16" in flags else 2 * fp32 if "avx512_bf16" in flags else fp32
    name = f"this CPU, {cores} cores"
    source = "instruction sets, at an assumed 2.5 GHz"
    speeds = (cores * half * _CPU_CLOCK, cores * fp32 * _CPU_CLOCK)
    return Hardware(name, here.memory, *speeds, None, here.bf16, cpu=True, source=source)


def flops_per_token(network: Network, micro: Micro) -> tuple[int, int]:
    """Operations of forward and backward pass per token: in the weights, and in attention.

    6 N: each weight multiplies and adds once forward (2 N) and twice backward. The output matrix, V D of the N, works
    for tokens with logits only. 12 L D S: Q K^T and weights x V are 2 D S each forward, and twice that backward; the
    masked half of S is computed, too. (Where an encoder and a decoder share the work, a token is one of each.)
    """
    tied = network.vocab_size * network.d_model
    weights = 6 * (network.n_params - tied) + 6 * tied * micro.n_targets // micro.tokens
    attention = sum(
        6 * layer.n_attentions * (layer.d_query + layer.d_value) * keys(layer, micro.n_ctx) for layer in network.layers
    )
    return weights, attention


def seconds(flops: float, device: Hardware, n_devices: int, precision: Precision, utilisation: float) -> float:
    """Time for so many operations at a share of the peak."""
    return flops / (n_devices * device.peak(precision) * utilisation)
