"""GPT-1 as OpenAI published it: `model/` of github.com/openai/finetune-transformer-lm.

    params_0.npy ... params_9.npy   all weights one behind another, cut into ten pieces without regard to tensors
    params_shapes.json              the shapes of the tensors in that order
    encoder_bpe_40000.json          token -> id
    vocab_40000.bpe                 the merges

The shapes come without names. Their order is that in which train.py makes its variables: position embeddings, token
embeddings, and for each block the twelve tensors of `_BLOCK`. Convolutions of width 1 are its linear layers.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from classiclm.convert import gpt1
from classiclm.errors import BAD_INPUT, Error
from classiclm.models.gpt1 import Config

SHAPES = "params_shapes.json"
N_FILES = 10
N_HEADS = 12  # the files do not say it: train.py's default

Shape = tuple[int, ...]

# One block, by the names of Hugging Face's GPT-1, which has the same layout but for the leading 1.
_BLOCK = (
    "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias", "ln_1.weight", "ln_1.bias",
    "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_2.weight", "ln_2.bias",
)  # fmt: skip


def is_release(folder: Path) -> bool:
    """Whether a folder is meant to be OpenAI's release of GPT-1."""
    return (folder / SHAPES).is_file() or (folder / "params_0.npy").is_file()


def read_release(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """The sizes, and the weights by our names. Raises Error (exit 3) for files that are missing or do not fit."""
    shapes = _read_shapes(folder / SHAPES)
    config = config_of(shapes, folder / SHAPES)
    numbers = np.concatenate([_read_numbers(folder / f"params_{i}.npy") for i in range(N_FILES)])
    sizes = [math.prod(shape) for shape in shapes]
    if numbers.size != sum(sizes):
        why = f"its shapes need {sum(sizes):,} numbers, and the {N_FILES} files hold {numbers.size:,}"
        raise Error(folder / SHAPES, why, "restore all files as OpenAI published them", BAD_INPUT)
    pieces = np.split(numbers, np.cumsum(sizes)[:-1])
    tensors = {
        name: torch.from_numpy(piece.reshape(shape[1:] if shape[0] == 1 else shape))
        for name, piece, shape in zip(_names(config.n_layers), pieces, shapes, strict=True)
    }
    return config, gpt1.from_hf(config, tensors)


def _names(n_layers: int) -> list[str]:
    blocks = [f"h.{i}.{name}" for i in range(n_layers) for name in _BLOCK]
    return ["positions_embed.weight", "tokens_embed.weight", *blocks]


def config_of(shapes: Sequence[Shape], source: object) -> Config:
    """The sizes that the shapes imply. Raises Error (exit 3) if they are not those of a GPT-1."""
    n_layers, rest = divmod(len(shapes) - 2, len(_BLOCK))
    try:
        (n_ctx, d_model), (vocab_size, _) = shapes[:2]
        config = Config(n_layers, d_model, N_HEADS, n_ctx=n_ctx, vocab_size=vocab_size)
    except ValueError as e:  # fewer shapes, vectors among them, or a d_model that 12 heads do not divide
        raise _not_gpt1(source, f"{len(shapes)} shapes that are no GPT-1's of {N_HEADS} heads") from e
    if rest or n_layers < 1 or list(shapes) != _shapes(config):
        raise _not_gpt1(source, f"{len(shapes)} shapes in another order or size than GPT-1's")
    return config


def _shapes(c: Config) -> list[Shape]:
    d, f = c.d_model, 4 * c.d_model
    vector: Shape = (d,)
    attention: list[Shape] = [(1, d, 3 * d), (3 * d,), (1, d, d), vector]
    block = [*attention, vector, vector, (1, d, f), (f,), (1, f, d), vector, vector, vector]
    return [(c.n_ctx, d), (c.vocab_size, d), *block * c.n_layers]


def _read_shapes(path: Path) -> list[Shape]:
    try:
        tree = json.loads(path.read_bytes())
        shapes = [tuple(shape) for shape in tree]
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise _not_gpt1(path, "no readable list of shapes") from e
    if not all(shape and all(type(n) is int and n > 0 for n in shape) for shape in shapes):
        raise _not_gpt1(path, "shapes that are not lists of positive numbers")
    return shapes


def _not_gpt1(path: object, what: str) -> Error:
    return Error(path, f"holds {what}", "restore it as OpenAI published it", BAD_INPUT)


def _read_numbers(path: Path) -> np.ndarray:
    """One flat fp32 array of a .npy file, which is never unpickled. Raises Error (exit 3)."""
    try:
        with path.open("rb") as file:
            _check_header(file, path.stat().st_size)
            file.seek(0)
            return npy.read_array(file, allow_pickle=False).ravel()
    except FileNotFoundError as e:
        raise Error(path, "is missing", "restore it as OpenAI published it", BAD_INPUT) from e
    except (OSError, ValueError, TypeError, RecursionError, SyntaxError, TokenError) as e:
        why = f"is not a readable array of fp32 numbers ({' '.join(str(e).split())})"
        raise Error(path, why, "restore it as OpenAI published it", BAD_INPUT) from e


def _check_header(file: BinaryIO, size: int) -> None:
    """Raises ValueError unless the header promises just the fp32 numbers that the file holds."""
    version = npy.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version} of the format")
    shape, _, dtype = npy.read_array_header_1_0(file)
    if dtype != np.dtype("<f4"):
        raise ValueError(f"holds {dtype}")
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"promises {math.prod(shape):,} numbers and holds {size - file.tell():,} bytes")
