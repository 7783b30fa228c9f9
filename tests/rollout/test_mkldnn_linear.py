"""Packed weights give the same results, and only inside the context."""

import pytest
import tiny
import torch

from reinforcepp.rollout.mkldnn_linear import packed


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_results_are_unchanged(family, dtype):
    model, ids = tiny.model(family), torch.arange(24).view(2, 12)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()  # they are 0 at first, so the test wouldn't notice if they were ignored
    model.to(dtype)
    expected = model(ids).logits
    with packed(model, 2):
        replaced = [m for m in model.modules() if "forward" in vars(m)]
        actual = model(ids).logits
    # Without instructions for bfloat16 (AVX-512 or AMX), oneDNN has no packed product of that type: the model stays as it is.
    available = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert len(replaced) > 8 if available else replaced == []
    tolerance = 1e-4 if dtype == torch.float32 else 0.5
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=1e-2)
    assert not [m for m in model.modules() if "forward" in vars(m)]


@torch.no_grad()
def test_each_context_packs_the_current_weights():
    model, ids = tiny.model(), torch.arange(12)[None]
    with packed(model, 1):
        first = model(ids).logits
    model.transformer.h[0].mlp.c_fc.weight.mul_(2)
    expected = model(ids).logits
    with packed(model, 1):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
    assert not torch.allclose(first, expected, atol=1e-2)


def test_an_error_restores_the_model():
    model = tiny.model()
    with pytest.raises(KeyboardInterrupt), packed(model, 1):
        raise KeyboardInterrupt
    model(torch.arange(4)[None]).logits.sum().backward()
    assert model.transformer.h[0].mlp.c_fc.weight.grad is not None
