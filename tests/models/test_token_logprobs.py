"""Log-probabilities of tokens: goldens; blocks and chunks change neither values nor gradients."""

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
        monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * 50)


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
    monkeypatch.setattr(module, "CHUNK_BYTES", 5 * 4 * 50)
    head, hidden, kept = torch.nn.Linear(16, 50), torch.randn(40, 16, requires_grad=True), []

    def keep(tensor):
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head_logprobs(head, hidden, torch.zeros(40, dtype=torch.long))
    assert kept and all(shape[-1] != 50 or len(shape) < 2 for shape in kept if tuple(shape) != (50, 16))
