"""The preallocated cache has the same content as the library's cache."""

import pytest
import tiny
import torch
from transformers import DynamicCache

from reinforcepp.rollout import kv_cache as module
from reinforcepp.rollout.kv_cache import PreallocatedLayer, preallocated_cache, select_rows


@pytest.mark.parametrize("room", [0, 1, 5, 128])
def test_it_equals_the_librarys_cache(monkeypatch, room):
    monkeypatch.setattr(module, "SPARE_TOKENS", room)
    config = tiny.model("llama").config
    caches = [DynamicCache(config=config), preallocated_cache(config)]
    assert all(type(layer) is PreallocatedLayer for layer in caches[1].layers)
    generator = torch.Generator().manual_seed(0)
    for tokens, rows in ((4, 3), (1, 3), (1, 3), (7, 2), (1, 2)):
        if rows == 2 and caches[0].layers[0].keys.shape[0] == 3:
            for cache in caches:
                select_rows(cache, torch.tensor([2, 0]))
        for layer in range(2):
            new = [torch.randn(rows, 1, tokens, 32, generator=generator) for _ in range(2)]
            (keys, values), (own_keys, own_values) = (cache.update(*new, layer) for cache in caches)
            assert torch.equal(keys, own_keys) and torch.equal(values, own_values)
        assert caches[0].get_seq_length() == caches[1].get_seq_length()


@torch.no_grad()
def test_a_buffer_is_not_copied_for_each_token():
    layer = PreallocatedLayer()
    layer.update(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8))
    address = layer.keys.data_ptr()
    for _ in range(module.SPARE_TOKENS):
        layer.update(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
    assert layer.keys.data_ptr() == address and layer.keys.shape[-2] == 4 + module.SPARE_TOKENS
    layer.update(torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))
    assert layer.keys.data_ptr() != address and layer.keys[0, 0, 4:].eq(1).all()


def test_a_wider_type_is_stored_and_prompts_are_returned_as_they_are():
    layer, new = PreallocatedLayer(torch.float32), torch.rand(2, 1, 3, 8).bfloat16()
    assert layer.update(new, new)[0] is new
    keys, values = layer.update(new[:, :, :1], new[:, :, :1])
    assert keys.dtype == values.dtype == torch.float32
    assert torch.equal(keys, torch.cat([new, new[:, :, :1]], dim=2).float())
