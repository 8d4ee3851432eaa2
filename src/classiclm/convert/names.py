"""What all maps share: a table of sizes (config.json) and a table of tensors (model.safetensors), each read both ways.

Sizes   our Config  <->  the mapping in config.json
Tensors our state_dict  <->  what `save_pretrained` writes
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from classiclm.errors import BAD_INPUT, Error
from classiclm.nn.init import shapes_only

CONFIG_FILE = "config.json"
_DROPOUT = "dropout"  # the field whose keys may differ: it is a setting of training only
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # a tokenizer knows them, a Config does not


@dataclass(frozen=True)
class Size:
    """One field of our Config, their keys for it, and what an absent key means to them.

    Several keys must agree; only of dropouts, which matter in training alone, the first counts.
    """

    ours: str
    theirs: tuple[str, ...]
    default: int | float | None  # its type is the type of the value; None: a number of positive size, or null


@dataclass(frozen=True)
class Sizes:
    """How a paper's Config and a config.json say the same.

    fixed:    key -> (the only value that our model stands for, what an absent key means to them).
    synonyms: key -> other spellings of that value.
    training: as fixed, of keys that matter in training only; another value is noted, not refused.
    """

    model_type: str
    architecture: str
    rows: tuple[Size, ...]
    fixed: Mapping[str, tuple[Any, Any]]
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    training: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)

    def write(self, config: Any) -> dict[str, Any]:
        """The whole config.json of a Config, with null for the ids of special tokens.

        Raises Error (exit 2) if the heads do not fill d_model exactly, which the format takes for granted.
        """
        if config.d_head not in (None, config.d_model / config.n_heads):
            why = f"is {config.d_head}; the format has heads of d_model / n_heads only"
            raise Error("model.d_head", why, "train with --model.d_head null")
        kind = {"model_type": self.model_type, "architectures": [self.architecture]}
        sizes = {key: getattr(config, row.ours) for row in self.rows for key in row.theirs}
        fixed = {key: value for key, (value, _) in {**self.fixed, **self.training}.items()}
        return {**kind, **sizes, **fixed, **NO_IDS}

    def read(self, hf: Mapping[str, Any], schema: type) -> Any:
        """The Config (of type `schema`) of a config.json. Raises Error (exit 3) naming a key that it cannot follow."""
        for key, (ours, default) in {"model_type": (self.model_type, self.model_type), **self.fixed}.items():
            value = hf.get(key, default)
            if value in self.synonyms.get(key, ()):
                continue
            if value != ours or isinstance(value, bool) != isinstance(ours, bool):
                raise _config_error(key, f"is {value!r}, and this model only has {ours!r}")
        try:
            return schema(**{row.ours: _agreed(row, hf) for row in self.rows})
        except ValueError as e:  # sizes that do not go together
            raise Error(CONFIG_FILE, str(e), "give the folder of another model", BAD_INPUT) from e

    def notes(self, hf: Mapping[str, Any]) -> list[str]:
        """What a config.json says of training that our model does not follow: "attn_pdrop is 0.2, here 0.1"."""
        rows = [row for row in self.rows if row.ours == _DROPOUT]
        ours = {key: (hf.get(row.theirs[0], row.default), row.default) for row in rows for key in row.theirs}
        values = {key: (hf.get(key, default), here) for key, (here, default) in {**ours, **self.training}.items()}
        return [f"{key} is {value!r}, here {here!r}" for key, (value, here) in values.items() if value != here]


def _agreed(row: Size, hf: Mapping[str, Any]) -> Any:
    values = [_value(key, row, hf.get(key, row.default)) for key in row.theirs]
    for key, value in zip(row.theirs, values, strict=True):
        if row.ours != _DROPOUT and value != values[0]:
            raise _config_error(key, f"is {value!r}, and this model needs {row.theirs[0]}'s {values[0]!r}")
    return values[0]


def _value(key: str, row: Size, value: Any) -> Any:
    if isinstance(row.default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
        wanted = "a share from 0 up to 1"
    else:
        fits = (type(value) is int and 0 < value < 2**63) or (value is None and row.default is None)
        wanted = "a number above 0"
    if not fits:
        raise _config_error(key, f"is {value!r}, and should be {wanted}")
    return value


def _config_error(key: str, why: str) -> Error:
    return Error(f"{CONFIG_FILE}: {key}", why, "give the folder of a model that has it so", BAD_INPUT)


@dataclass(frozen=True)
class Row:
    """One module (its weight and bias, or the `parts` it has) under both names; {i} counts blocks.

    Where theirs joins several of ours along its last axis, `ours` has a {slot} for each name in `joined`.
    """

    ours: str
    theirs: str
    conv1d: bool = False  # theirs keeps a matrix as [in, out], nn.Linear as [out, in]
    joined: tuple[str, ...] = ("",)
    parts: tuple[str, ...] = ("weight", "bias")


WEIGHT = ("weight",)
BIAS = ("bias",)
Link = tuple[tuple[str, ...], str, bool]  # our names, their name, conv1d


@dataclass(frozen=True)
class Tensors:
    """How our state_dict and their file name, turn and join the same tensors.

    prefix:  of the body of the network, which files saved without a head leave out.
    tied:    copies that some files hold besides: name -> whose copy (both without the prefix).
    buffers: patterns of names that hold no weight (without the prefix).
    """

    prefix: str
    rows: tuple[Row, ...]
    tied: Mapping[str, str]
    buffers: tuple[str, ...]

    def links(self, n_layers: int) -> Iterator[Link]:
        """The table for so many blocks, tensor by tensor."""
        for row in self.rows:
            for i in range(n_layers if "{i}" in row.ours else 1):
                for part in row.parts:
                    ours = tuple(f"{row.ours.format(i=i, slot=slot)}.{part}" for slot in row.joined)
                    yield ours, f"{row.theirs.format(i=i)}.{part}", row.conv1d

    def write(self, n_layers: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our state_dict -> the tensors of their file, contiguous; tied copies are left out."""
        return {
            theirs: _joined([_turned(weights[name], conv1d) for name in ours])
            for ours, theirs, conv1d in self.links(n_layers)
        }

    def read(self, n_layers: int, shapes: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file -> our state_dict, in the file's precision. `shapes`: a state_dict of the right shapes.

        Raises Error (exit 3) for a tensor that is missing, unexpected, of another shape or no number, or not tied.
        """
        expected = self.write(n_layers, shapes)
        found = self._found(expected, tensors)
        weights: dict[str, Tensor] = {}
        for ours, theirs, conv1d in self.links(n_layers):
            pieces = found[theirs].chunk(len(ours), dim=-1)
            weights |= {name: _turned(piece, conv1d) for name, piece in zip(ours, pieces, strict=True)}
        return weights

    def _found(self, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name in `expected` -> tensor, after all the checks."""
        full = {name.removeprefix(self.prefix): name for name in expected}
        given = {name.removeprefix(self.prefix): name for name in tensors}
        if len(given) < len(tensors):
            twice = next(name for name in tensors if name not in given.values())
            raise _tensor_error(twice, f"is there with and without the prefix {self.prefix!r}")
        for short, name in given.items():
            if short in full:
                _check_tensor(name, tensors[name], expected[full[short]])
            elif short not in self.tied and not any(fnmatchcase(short, pattern) for pattern in self.buffers):
                raise _tensor_error(name, "is a tensor that this model does not have")
        for short, name in full.items():
            if short not in given:
                raise _tensor_error(name, "is missing from the file")
        for copy, original in self.tied.items():
            if copy in given and not torch.equal(tensors[given[copy]], tensors[given[original]]):
                raise _tensor_error(given[copy], f"differs from {given[original]}, with which this model ties it")
        return {full[short]: tensors[name] for short, name in given.items() if short in full}


def shapes_of(build: Callable[[Any], nn.Module], config: Any) -> dict[str, Tensor]:
    """The state_dict of a model on the meta device: names and shapes without numbers.

    Raises Error (exit 3) for sizes beyond what a tensor can have.
    """
    try:
        with shapes_only():
            return build(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as e:  # their product, or one of them, is no number of 64 bits
        sizes = ", ".join(f"{key} {value}" for key, value in vars(config).items() if type(value) is int)
        why = f"has sizes of which no tensor can be made ({sizes})"
        raise Error(CONFIG_FILE, why, "restore it from its origin", BAD_INPUT) from e


def without_default_d_ff(config: Any) -> Any:
    """The Config with d_ff null where that means the same."""
    return dataclasses.replace(config, d_ff=None) if config.d_ff == 4 * config.d_model else config


def _turned(tensor: Tensor, conv1d: bool) -> Tensor:
    return tensor.T.contiguous() if conv1d and tensor.ndim == 2 else tensor.contiguous()


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)


def _check_tensor(name: str, tensor: Tensor, expected: Tensor) -> None:
    if tensor.shape != expected.shape:
        raise _tensor_error(name, f"has the shape {list(tensor.shape)}, the config says {list(expected.shape)}")
    if not tensor.is_floating_point():
        raise _tensor_error(name, f"holds {str(tensor.dtype).removeprefix('torch.')}, not numbers with a point")


def _tensor_error(name: str, why: str) -> Error:
    return Error(name, why, "give the folder of a whole model whose weights and config.json belong together", BAD_INPUT)
