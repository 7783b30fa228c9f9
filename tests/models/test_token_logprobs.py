"""Log-probabilities of tokens: goldens; blocks and chunks change neither values nor gradients."""

import os
import sys
import types

import pytest
import torch

from reinforcepp.models import token_logprobs as module
from reinforcepp.models.token_logprobs import head_logprobs, token_logprobs


@pytest.mark.parametrize(
    ("temperature", "logprob", "entropy"), [(1.0, -0.407606, 0.832396), (0.5, -0.142932, 0.441057)]
)
def test_g10_temperature_and_entropy(temperature, logprob, entropy):
    logprobs, entropies = token_logprobs(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0]), temperature)
    assert logprobs.item() == pytest.approx(logprob, abs=1e-5)
    assert entropies.item() == pytest.approx(entropy, abs=1e-5)


def test_log_probabilities_are_float32_for_all_dtypes_of_logits():
    logits = torch.tensor([[8.0, 8.03, -4.0]], dtype=torch.bfloat16)
    logprobs, _ = token_logprobs(logits, torch.tensor([1]))
    assert logprobs.dtype == torch.float32
    assert logprobs.item() == pytest.approx(logits.float().log_softmax(-1)[0, 1].item(), abs=1e-6)


def plainly(logits, ids, temperature):
    """The definition, by autograd."""
    scaled = (logits.float() / temperature).log_softmax(-1)
    return scaled[range(len(ids)), ids], -(scaled.exp() * scaled).sum(-1)


@pytest.fixture(params=["whole", "in-blocks", "in-chunks"])
def divided(request, monkeypatch):
    if request.param != "whole":
        monkeypatch.setattr(module, "BLOCK_BYTES", {"cpu": 3 * 4 * 50})
    if request.param == "in-chunks":
        monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 5 * 4 * 50})


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_match_the_definition(divided, temperature):
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=True)
    hidden, ids, slope = torch.randn(13, 16, requires_grad=True), torch.randint(50, (13,)), torch.randn(13)
    expected, entropy = plainly(head(hidden), ids, temperature)
    inputs = (hidden, head.weight, head.bias)
    gradients = torch.autograd.grad((expected * slope).sum(), inputs, retain_graph=True)
    actual, actual_entropy = head_logprobs(head, hidden, ids, temperature)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(actual_entropy, entropy, atol=1e-5, rtol=0)
    assert not actual_entropy.requires_grad
    _, with_gradient = head_logprobs(head, hidden, ids, temperature, entropy_gradient=True)
    both = [torch.autograd.grad((e * slope.flip(0)).sum(), inputs, retain_graph=True) for e in (with_gradient, entropy)]
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    for one, other in zip(torch.autograd.grad((actual * slope).sum(), inputs), gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_chunks_respect_the_size_limit(monkeypatch):
    """What the backward pass keeps is bounded, however many tokens there are."""
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 5 * 4 * 50})
    head, hidden, kept = torch.nn.Linear(16, 50), torch.randn(40, 16, requires_grad=True), []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_logprobs(head, hidden, torch.zeros(40, dtype=torch.long))
    assert kept and all(shape[-1] != 50 or len(shape) < 2 for shape in kept if tuple(shape) != (50, 16))


@pytest.mark.parametrize("by_kernel", [False, True])
def test_the_gradient_overwrites_the_logits_of_a_linear_head_once(by_kernel, monkeypatch):
    if by_kernel:  # torch doesn't see what it writes
        unseen = lambda gradient, *rest: module._backward(gradient.data, *rest)  # noqa: E731
        kernels = types.SimpleNamespace(forward=module._forward, backward=unseen)
        monkeypatch.setattr(module, "fused_kernels", lambda device_type: kernels)
    head, hidden, ids = torch.nn.Linear(16, 50), torch.randn(3, 16), torch.tensor([1, 2, 3])
    logprobs, _ = head_logprobs(head, hidden, ids)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprobs.sum().backward()


class TanhHead(torch.nn.Linear):
    def forward(self, hidden):
        return super().forward(hidden).tanh()


def test_logits_that_another_operation_needs_are_kept():
    head, hidden, ids = TanhHead(16, 50), torch.randn(3, 16), torch.tensor([1, 2, 3])
    (expected,) = torch.autograd.grad(plainly(head(hidden), ids, 1.0)[0].sum(), [head.weight])
    head_logprobs(head, hidden, ids)[0].sum().backward()
    torch.testing.assert_close(head.weight.grad, expected, atol=1e-5, rtol=0)


# --- kernels --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu), "cpu"])
def kernels(request, monkeypatch):
    """The Triton kernels and their device; on a CPU, Triton must have been imported as an interpreter."""
    if request.param == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("set TRITON_INTERPRET=1 to run the kernels in Triton's interpreter")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pytest.importorskip("triton")
    from reinforcepp.models import token_kernels

    monkeypatch.setattr(token_kernels, "FORWARD_COLUMNS", 16)  # several blocks per row, the last one partly filled
    monkeypatch.setattr(token_kernels, "BACKWARD_COLUMNS", 16)
    return token_kernels, request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_kernels_match_the_operations_of_torch(kernels, monkeypatch, temperature, dtype):
    triton_kernels, device = kernels
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50).to(device, dtype)
    hidden = (5 * torch.randn(7, 16)).to(device, dtype)
    ids, slope, bonus = (x.to(device) for x in (torch.randint(50, (7,)), torch.randn(7), torch.randn(7)))

    def run(used, entropy_gradient):
        monkeypatch.setattr(module, "fused_kernels", lambda _: used)
        logprobs, entropy = head_logprobs(head, hidden, ids, temperature, entropy_gradient=entropy_gradient)
        loss = logprobs @ slope + (entropy @ bonus if entropy_gradient else 0)
        return logprobs, entropy, *torch.autograd.grad(loss, [head.weight, head.bias])

    for entropy_gradient in (False, True):
        for one, other in zip(run(triton_kernels, entropy_gradient), run(None, entropy_gradient), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5 if dtype == torch.float32 else 0.1, rtol=2e-2)


def test_kernels_that_do_not_compile_are_replaced_with_one_warning(monkeypatch, caplog):
    failing = types.ModuleType("token_kernels")
    failing.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("Failed to find C compiler.\nmore"))
    monkeypatch.setitem(sys.modules, "reinforcepp.models.token_kernels", failing)
    monkeypatch.setattr("reinforcepp.models.token_kernels", failing, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(1).long())
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    module.fused_kernels.cache_clear()
    assert module.fused_kernels("cpu") is None
    assert module.fused_kernels("cuda") is module.fused_kernels("cuda") is None
    assert caplog.text.count("Failed to find C compiler") == 1 and "build-essential python3." in caplog.text
    module.fused_kernels.cache_clear()
