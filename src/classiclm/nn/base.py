"""What models share: presets and a parameter count; and what can write a text: a cache and `generate`."""

import dataclasses
import sys
from abc import ABC, abstractmethod
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from classiclm.errors import Error, did_you_mean
from classiclm.nn.cache import DecoderCache, KVCache
from classiclm.nn.embedding import ReadOut, as_logits
from classiclm.nn.mask import Mask


class Model(nn.Module):
    """Any of the networks. A subclass sets `config` (its paper's Config); `n_ctx` is the longest input, None = any."""

    config: Any
    n_ctx: int | None = None

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
        return next(chain(self.parameters(), self.buffers())).device

    def count_parameters(self) -> int:
        """Numbers that training changes; a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.parameters())


class LanguageModel(Model):
    """`model(tokens, mask=None, cache=None, positions=None) -> logits`: (B, T) token ids -> (B, T, V).

    It takes a `read_out`, too, which may make something smaller than logits of its last states. `n_attention` counts
    the attention layers that a cache has to serve.
    """

    n_attention: int = 0

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


class EncoderDecoder(Model, ABC):
    """`model(source, target, source_mask=None) -> logits`: (B, S) and (B, T) token ids -> (B, T, V).

    Decoding reads the source once (`encode`) and then the target token by token (`decode`, with a cache).
    """

    @abstractmethod
    def encode(self, source: Tensor, mask: Mask | None = None) -> Tensor:
        """(B, S) token ids -> (B, S, D), the memory."""

    @abstractmethod
    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        memory_mask: Mask | None = None,
        cache: DecoderCache | None = None,
        read_out: ReadOut = as_logits,
    ) -> Tensor:
        """(B, T) token ids and the memory (B, S, D) -> (B, T, V). With a cache, `target` are the new tokens only."""

    @abstractmethod
    def new_cache(self, n_target: int, n_source: int) -> DecoderCache:
        """An empty cache for so many target and source positions."""

    def forward(
        self, source: Tensor, target: Tensor, source_mask: Mask | None = None, read_out: ReadOut = as_logits
    ) -> Tensor:
        """The logits of each next target token: target position t sees targets up to t and the whole source."""
        return self.decode(target, self.encode(source, source_mask), source_mask, read_out=read_out)

    def generate(self, source: Tensor, start: int, end: int, **settings: Any) -> list[list[int]]:
        """Translate rows of (B, S) tokens without padding; see `classiclm.generate.beam.translate` for the settings."""
        from classiclm.generate.beam import translate  # as in LanguageModel.generate

        return translate(self, source.tolist(), start, end, **settings)
