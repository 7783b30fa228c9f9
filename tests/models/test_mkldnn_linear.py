"""oneDNN gives the same results; packed weights are used only inside the context."""

import pytest
import tiny
import torch

from reinforcepp.models import mkldnn_linear
from reinforcepp.models.mkldnn_linear import linear, packed


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_large_products_equal_those_of_the_layer(monkeypatch, bias, frozen):
    monkeypatch.setattr(mkldnn_linear, "MIN_MULTIPLICATIONS", 1)
    torch.manual_seed(0)
    layer, slope = torch.nn.Linear(48, 75, bias=bias), torch.randn(33, 75)
    layer.weight.requires_grad_(not frozen)
    outputs, gradients = [], []
    for compute in (layer, lambda x: linear(layer, x)):
        x = torch.randn(33, 48, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer.zero_grad()
        outputs.append(compute(x))
        outputs[-1].backward(slope)
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    assert type(outputs[1].grad_fn).__name__ == "_LinearBackward"
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    assert [gradient is None for gradient in gradients[1]] == [False, frozen, *[False] * bias]
    for actual, expected in zip(*gradients, strict=True):
        assert actual is expected is None or torch.allclose(actual, expected, atol=1e-5, rtol=1e-5)


def test_other_layers_compute_themselves(monkeypatch):
    layer, x = torch.nn.Linear(8, 8), torch.ones(2, 8)
    assert type(linear(layer, x).grad_fn).__name__ != "_LinearBackward"  # too small
    monkeypatch.setattr(mkldnn_linear, "MIN_MULTIPLICATIONS", 1)
    assert type(linear(layer, x).grad_fn).__name__ == "_LinearBackward"
    assert linear(torch.nn.Identity(), x) is x
    hook = layer.register_forward_hook(lambda *_: torch.zeros(1))
    assert linear(layer, x).shape == (1,)
    hook.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16
    assert type(linear(layer.bfloat16(), x.bfloat16()).grad_fn).__name__ != "_LinearBackward"
