"""A KV cache for generation that doesn't copy all keys and values for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

SPARE_TOKENS = 128
"""Tokens by which the cache grows at a time."""


def preallocated_cache(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> DynamicCache:
    """Return the library's cache with layers that grow in strides; layers with sliding windows stay as they are.

    Args:
        config: The model's configuration.
        dtype: Type in which keys and values are stored; by default the model's.
    """
    cache = DynamicCache(config=config)
    cache.layers = [PreallocatedLayer(dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def select_rows(cache: Cache, indices: Tensor) -> None:
    """Keep the rows ``indices``; unlike ``batch_select_indices``, this also selects recurrent and convolution states."""
    for layer in cache.layers:
        layer.reorder_cache(indices)


def join_rows(cache: Cache, kept: list[int], others: Sequence[tuple[Cache, list[int]]], tokens: int) -> None:
    """Keep rows of ``cache`` and append rows of other caches, aligned at the last token and padded with zeros on the left.

    Layer by layer, so that only one layer exists twice. The other caches lose their layers.

    Args:
        cache: The cache that is changed.
        kept: Indices of its rows.
        others: Other caches, and indices of their rows; a row can occur several times.
        tokens: Length of the cache afterwards. It covers the longest row.

    Raises:
        NotImplementedError: A layer holds something other than keys and values.
    """
    for layer in cache.layers:
        sources = [(layer, kept)] if kept else []
        sources += [(other.layers.pop(0), indices) for other, indices in others]
        if any(type(source) not in (PreallocatedLayer, DynamicSlidingWindowLayer) for source, _ in sources):
            raise NotImplementedError("a cache layer holds something other than keys and values")
        width = min(tokens, max(source.keys.shape[-2] for source, _ in sources))  # a sliding window keeps fewer tokens
        spare = SPARE_TOKENS if isinstance(layer, PreallocatedLayer) else 0
        keys, values = (
            _joined([(getattr(source, name), indices) for source, indices in sources], width, spare)
            for name in ("keys", "values")
        )
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        if isinstance(layer, PreallocatedLayer):
            layer.set_buffers(keys, values, tokens)
        else:
            layer.keys, layer.values, layer.cumulative_length = keys, values, tokens


def _joined(sources: Sequence[tuple[Tensor, list[int]]], width: int, spare: int) -> Tensor:
    """Return a buffer with rows of several keys or values, each of which ends at column ``width``."""
    first, count = sources[0][0], sum(len(indices) for _, indices in sources)
    buffer = first.new_empty(count, first.shape[1], width + spare, first.shape[-1])
    begin = 0
    for states, indices in sources:
        rows, columns = slice(begin, begin + len(indices)), min(width, states.shape[-2])
        buffer[rows, :, : width - columns] = 0
        buffer[rows, :, width - columns : width] = states[indices, :, states.shape[-2] - columns :]
        begin = rows.stop
    return buffer


class PreallocatedLayer(DynamicLayer):
    """A cache layer whose ``keys`` and ``values`` are views into larger tensors of type ``dtype``, by default the model's."""

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._stored_dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to the cache and return all of it: keys and values, each (B, heads, tokens, head size).

        The first tokens, those of prompts, are returned in the model's type.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < end:
            self._buffers = (
                _grown(self.keys, key_states, begin, end, self._stored_dtype),
                _grown(self.values, value_states, begin, end, self._stored_dtype),
            )
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., begin:end, :] = new
        self.set_buffers(*self._buffers, end)
        return (self.keys, self.values) if begin else (key_states, value_states)

    def set_buffers(self, keys: Tensor, values: Tensor, tokens: int) -> None:
        """Hold the first ``tokens`` columns of larger tensors."""
        self._buffers = keys, values
        self.keys, self.values = keys[..., :tokens, :], values[..., :tokens, :]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows ``beam_idx``."""
        super().reorder_cache(beam_idx)
        self._buffers = None


def _grown(cached: Tensor, new: Tensor, begin: int, end: int, dtype: torch.dtype | None) -> Tensor:
    """Return a larger buffer that begins with the ``begin`` cached tokens; ``new`` gives its shape and default type."""
    buffer = new.new_empty(*new.shape[:-2], end + SPARE_TOKENS, new.shape[-1], dtype=dtype)
    if begin:
        buffer[..., :begin, :] = cached
    return buffer
