"""GPT-3 with dense layers <-> `GPT2LMHeadModel`: the same tables as GPT-2's. Banded layers have no place in them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from classiclm.convert import gpt2
from classiclm.convert.gpt2 import ARCHITECTURE, MODEL_TYPE, from_hf, to_hf
from classiclm.errors import Error
from classiclm.models.gpt3 import Config

__all__ = ["ARCHITECTURE", "MODEL_TYPE", "from_hf", "hf_config", "our_config", "to_hf"]


def hf_config(config: Config) -> dict[str, Any]:
    """config.json. Raises Error (exit 2) for banded layers, and for heads of a width of their own."""
    if config.band is not None:
        why = f"is {config.band}; the format has no locally banded layers"
        raise Error("model.band", why, "make all layers dense with --model.band null")
    return gpt2.hf_config(config)


def our_config(hf: Mapping[str, Any]) -> Config:
    """The Config of a config.json, all layers dense. Raises Error (exit 3) naming a key that GPT-3 cannot follow."""
    return Config(**dataclasses.asdict(gpt2.our_config(hf)), band=None)
