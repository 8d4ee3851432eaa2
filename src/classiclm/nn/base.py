"""What all models share: presets, a parameter count, a cache of the right size, and `generate`."""

import dataclasses
import sys
from typing import Any, Self

import torch
from torch import Tensor, nn

from classiclm.errors import Error, did_you_mean
from classiclm.nn.cache import KVCache


class LanguageModel(nn.Module):
    """`model(tokens, mask=None, cache=None, positions=None) -> logits`: (B, T) token ids -> (B, T, V).

    A subclass sets `config` (its paper's Config). `n_ctx` is the longest input, None if there is no limit;
    `n_attention` counts the attention layers that a cache has to serve.
    """

    config: Any
    n_ctx: int | None = None
    n_attention: int = 0

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> Self:
        """Fresh weights. The name is a preset of the model's file, with or without the family: "gpt2-124m" or "124m".

        Raises Error (exit 2) for an unknown name.
        """
        presets = sys.modules[cls.__module__].PRESETS
        matches = [preset for preset in presets if name in (preset, preset.partition("-")[2])]
        if not matches:
            raise Error(name, f"{cls.__name__} has no such preset", did_you_mean(name, presets))
        return sys.modules[cls.__module__].build(dataclasses.replace(presets[matches[0]], **changes))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def count_parameters(self) -> int:
        """Numbers that training changes; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def new_cache(self) -> KVCache:
        """An empty cache for n_ctx positions (none needed without attention)."""
        return KVCache(self.n_attention, self.n_ctx or 0)

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int = 50,
        temperature: float = 0.8,
        top_k: int | None = 40,
        **settings: Any,
    ) -> Tensor:
        """Continue (B, T) tokens by up to max_new_tokens; see `classiclm.generate.sample.generate` for the settings."""
        from classiclm.generate.sample import generate  # the one sanctioned upward import: a convenience

        return generate(self, tokens, max_new_tokens, temperature, top_k, **settings)
