"""A KV cache for generation that doesn't copy all keys and values for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

SPARE_TOKENS = 128
"""Tokens by which the cache grows at a time."""


def preallocated_cache(config: PreTrainedConfig) -> DynamicCache:
    """Return the library's cache with layers that grow in strides; layers with sliding windows stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Cache, indices: Tensor) -> None:
    """Keep the rows ``indices``; unlike ``batch_select_indices``, this also selects recurrent and convolution states."""
    for layer in cache.layers:
        layer.reorder_cache(indices)


class PreallocatedLayer(DynamicLayer):
    """A cache layer whose ``keys`` and ``values`` are views into larger tensors."""

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to the cache and return all of it: keys and values, each (B, heads, tokens, head size)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = (
                _grown(self.keys, key_states, begin, end),
                _grown(self.values, value_states, begin, end),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = new
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``."""
        super().reorder_cache(beam_idx)
        self._buffers = None


def _grown(cached: Tensor, new: Tensor, begin: int, end: int) -> Tensor:
    """Return a larger buffer that begins with the ``begin`` cached tokens; ``new`` gives its shape and type."""
    buffer = torch.empty(*new.shape[:-2], end + SPARE_TOKENS, new.shape[-1], dtype=new.dtype, device=new.device)
    if begin:
        buffer[..., :begin, :] = cached
    return buffer
