"""Keys and values during generation, without copying all of them for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

ROOM = 128
"""Tokens that a cache makes room for at a time."""


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """The library's cache, its plain layers exchanged for ones that grow in strides; sliding windows stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RoomyLayer(DynamicLayer):
    """Holds keys and values in larger tensors, of which ``keys`` and ``values`` are the part in use."""

    keys: Tensor
    values: Tensor
    _spaces: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append to what is held and return all of it: (B, heads, tokens, head size) each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self._spaces is None or self._spaces[0].shape[-2] < end:
            self._spaces = (_space(self.keys, key_states, held, end), _space(self.values, value_states, held, end))
        for space, new in zip(self._spaces, (key_states, value_states), strict=True):
            space[..., held:end, :] = new
        self.keys, self.values = (space[..., :end, :] for space in self._spaces)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``."""
        super().batch_select_indices(indices)
        self._spaces = None


def _space(held_tensor: Tensor, new: Tensor, held: int, end: int) -> Tensor:
    space = torch.empty(*new.shape[:-2], end + ROOM, new.shape[-1], dtype=new.dtype, device=new.device)
    if held:
        space[..., :held, :] = held_tensor
    return space
