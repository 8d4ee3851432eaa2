"""Folders in Hugging Face's form, read and made without the transformers library.

    config.json              sizes, and the ids of special tokens
    model.safetensors        weights; or several files and model.safetensors.index.json, which says what is where
    generation_config.json   where writing begins and ends (models that write)
    tokenizer.json and tokenizer_config.json

Only safetensors is read: a pickle can run any program, and the other formats need heavy libraries.
"""

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

import classiclm.convert
from classiclm.convert import openai_npy, vocabularies
from classiclm.data.tokenizers import Tokenizer
from classiclm.errors import BAD_INPUT, Error

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_SAVE = "with transformers, where you trust its origin, and write it anew with save_pretrained, as safetensors"
_PICKLE = ("is a pickle, which can run any program when it is read", f"load it {_SAVE}")
_TENSORFLOW = ("is a TensorFlow checkpoint", f"convert it {_SAVE} (BERT: transformers 4 reads TensorFlow)")

# What is refused, by the pattern of its name: why, and how to convert it.
_REFUSED = {
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.jl"), _PICKLE),
    **dict.fromkeys(("*.ckpt.*", "*.ckpt-*", "*.h5", "*.pb"), _TENSORFLOW),
    "*.msgpack": ("is a Flax checkpoint", f"convert it {_SAVE}"),
    "*.gguf": ("is a GGUF file, which this program only writes", "import the folder that it was made from"),
}
# How such files begin, whatever they are called.
_MAGIC = {
    b"PK\x03\x04": _PICKLE,  # torch.save, a zip with a pickle in it
    **{bytes((0x80, version)): _PICKLE for version in range(2, 6)},
    b"\x89HDF": _TENSORFLOW,
    b"GGUF": _REFUSED["*.gguf"],
}


@dataclass(frozen=True)
class Foreign:
    """A model that came from elsewhere, by our names."""

    family: str
    config: Any  # of the family
    weights: dict[str, Tensor]  # our state_dict, fp32
    dtypes: tuple[str, ...]  # what the weights were kept in
    notes: tuple[str, ...] = ()  # settings of training that differ here


@cache
def maps() -> dict[str, ModuleType]:
    """Family -> its module in convert/, for every family that has one."""
    names = sorted(info.name for info in pkgutil.iter_modules(classiclm.convert.__path__))
    modules = {name: importlib.import_module(f"classiclm.convert.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "MODEL_TYPE")}


def read(source: Path) -> Foreign:
    """The model in a folder, or of a .safetensors file with its config.json beside it.

    Raises Error (exit 3), with the way to convert it, for anything that is no such folder, or is damaged.
    """
    folder = source if source.is_dir() else source.parent
    if source.is_dir() and openai_npy.is_release(source):
        config, weights = openai_npy.read_release(source)
        return _foreign("gpt1", config, weights, folder)
    files = _files(source)
    hf = _read_object(folder / CONFIG)
    family, tables = _map_of(hf, folder / CONFIG)
    config = _config(hf, tables, folder / CONFIG)
    tensors = _tensors(files)
    if config.n_layers > len(tensors):  # before anything of that size is made
        why = f"says {config.n_layers:,} layers, and there are {len(tensors):,} tensors"
        raise Error(folder / CONFIG, why, "restore config.json and weights that belong together", BAD_INPUT)
    foreign = _foreign(family, config, tables.from_hf(config, tensors), folder)
    return dataclasses.replace(foreign, notes=tuple(tables.SIZES.notes(hf)))


def _foreign(family: str, config: Any, weights: Mapping[str, Tensor], folder: Path) -> Foreign:
    """All weights as fp32. Raises Error (exit 3) for one that is not finite."""
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    full = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    for name, tensor in full.items():
        if not torch.isfinite(tensor).all():
            raise Error(folder, f"weight {name} is not finite", "restore the weights from their origin", BAD_INPUT)
    return Foreign(family, config, full, tuple(dtypes))


def _files(source: Path) -> dict[Path, set[str] | None]:
    """File -> names of its tensors, None for all of them. Raises Error (exit 3) for what is not safetensors."""
    if source.is_file() and source.suffix == ".safetensors":
        return {source: None}
    if (source / WEIGHTS).is_file():
        return {source / WEIGHTS: None}
    if (source / INDEX).is_file():
        return _shards(source / INDEX)
    _refuse(source)
    fix = f"name a folder with {CONFIG} and {WEIGHTS}"
    raise Error(source, f"has no {WEIGHTS}" if source.exists() else "does not exist", fix, BAD_INPUT)


def _refuse(source: Path) -> None:
    """Raises Error (exit 3) with the way to convert it if this is, or holds, a file of another kind."""
    if source.is_dir():
        files = sorted(source.iterdir())
    else:  # a TensorFlow checkpoint is called by what the names of its files have in common
        files = [source] if source.is_file() else sorted(source.parent.glob(f"{source.name}.*"))
    for pattern, (why, fix) in _REFUSED.items():
        for file in files:
            if fnmatchcase(file.name, pattern):
                raise Error(file, why, fix, BAD_INPUT)


def _shards(index: Path) -> dict[Path, set[str] | None]:
    """The files that an index names. Raises Error (exit 3) if it is damaged, or names files elsewhere."""
    where = _read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise Error(index, "has no weight_map", "restore it from its origin", BAD_INPUT)
    files: dict[Path, set[str] | None] = {}
    for tensor, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            why = f"keeps {tensor} in {file!r}, which is no .safetensors file beside it"
            raise Error(index, why, "restore it from its origin", BAD_INPUT)
        names = files.setdefault(index.parent / file, set())
        assert names is not None
        names.add(tensor)
    return files


def _tensors(files: Mapping[Path, set[str] | None]) -> dict[str, Tensor]:
    """Name -> tensor, of all files. Raises Error (exit 3) naming a file that is missing or damaged."""
    tensors: dict[str, Tensor] = {}
    for path, names in files.items():
        found = _read_tensors(path)
        absent = (names or set()) - found.keys()
        if absent:
            why = f"lacks {min(absent)}, which {INDEX} says it has"
            raise Error(path, why, "restore all files from their origin", BAD_INPUT)
        tensors |= found if names is None else {name: found[name] for name in names}
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file. Raises Error (exit 3) if it is missing, damaged, or something else under that name."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
        refused = next((words for magic, words in _MAGIC.items() if start.startswith(magic)), None)
        if refused:
            raise Error(path, *refused, BAD_INPUT)
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except Error:
        raise
    except FileNotFoundError as e:
        raise Error(path, "is missing", f"restore all files that {INDEX} names", BAD_INPUT) from e
    except Exception as e:  # the library raises several kinds for a damaged header
        why = f"is not a readable safetensors file ({' '.join(str(e).split())[:200]})"
        raise Error(path, why, "restore it from its origin", BAD_INPUT) from e


def _read_object(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises Error (exit 3)."""
    try:
        tree = json.loads(path.read_bytes())
    except FileNotFoundError as e:
        raise Error(path, "is missing", "it has to be beside the weights: it says their sizes", BAD_INPUT) from e
    except (OSError, ValueError, RecursionError) as e:
        raise Error(path, "is not readable JSON", "restore it from its origin", BAD_INPUT) from e
    if not isinstance(tree, dict):
        raise Error(path, "is no JSON object", "restore it from its origin", BAD_INPUT)
    return tree


def _map_of(hf: Mapping[str, Any], source: Path) -> tuple[str, ModuleType]:
    """The family of a config.json's model_type: gpt2 is GPT-2, though a dense GPT-3 is written so, too."""
    for family, tables in maps().items():
        if hf.get("model_type") == tables.MODEL_TYPE:
            return family, tables
    known = ", ".join(sorted({tables.MODEL_TYPE for tables in maps().values()}))
    why = f"has the model_type {hf.get('model_type')!r}"
    raise Error(source, why, f"name a folder of one of these: {known}", BAD_INPUT)


def _config(hf: Mapping[str, Any], tables: ModuleType, source: Path) -> Any:
    """Our Config. Raises Error (exit 3) for what ours cannot follow."""
    try:
        return tables.our_config(hf)
    except (TypeError, ValueError) as e:
        raise Error(source, f"has impossible values ({e})", "restore it from its origin", BAD_INPUT) from e


def contents(family: str, config: Any, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> dict[str, bytes]:
    """File name -> bytes of a whole folder. Raises Error (exit 2) for what the format cannot express."""
    tables = maps()[family]
    hf = tables.hf_config(config)
    translates = hf.get("is_encoder_decoder", False)
    ids = vocabularies.special_ids(tokenizer, translates)
    tensors = {name: tensor.cpu() for name, tensor in tables.to_hf(config, weights).items()}
    files = {
        CONFIG: _json({**hf, **ids, "dtype": "float32"}),
        WEIGHTS: save_tensors(tensors, metadata={"format": "pt"}),
        **vocabularies.contents(tokenizer, config.n_ctx, translates),
    }
    if ids.get("eos_token_id") is not None:
        files["generation_config.json"] = _json(ids)
    return files


def _json(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, indent=2, ensure_ascii=False).encode()
