"""Sampling tokens at given uniform numbers."""

import pytest
import torch

from reinforcepp.rollout.sampling import BLOCK, draw, uniforms


def naive_index(logits, number):
    """Sum probabilities token by token until they exceed the number."""
    total = 0.0
    for token, p in enumerate(logits.double().softmax(-1).tolist()):
        total += p
        if number < total:
            return token
    raise AssertionError("rounding")


@pytest.mark.parametrize("size", [3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
def test_it_inverts_the_cumulative_distribution(size):
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(200, size, generator=generator)
    numbers = torch.rand(200, generator=generator, dtype=torch.float64) * 0.99
    ids, logprobs = draw(logits, numbers)
    expected = [naive_index(row, u) for row, u in zip(logits, numbers.tolist(), strict=True)]
    assert (
        sum(a != b for a, b in zip(ids.tolist(), expected, strict=True)) <= 1
    )  # at a boundary rounding can select either token
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(200), ids], atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("allowed", [[0], [700], [3, 4], [BLOCK - 1, BLOCK], [5, 699]])
def test_a_filtered_token_is_never_drawn(number, allowed):
    logits = torch.full((1, 701), float("-inf"))
    logits[0, allowed] = torch.tensor([0.3, -20.0])[: len(allowed)]
    ids, logprobs = draw(logits, torch.tensor([number], dtype=torch.float64))
    assert ids.item() in allowed and torch.isfinite(logprobs).all()


def test_without_numbers_it_returns_the_likeliest_token():
    logits = torch.randn(5, 300).bfloat16()
    ids, logprobs = draw(logits, None)
    assert torch.equal(ids, logits.argmax(-1)) and logprobs.dtype == torch.float32


def test_numbers_drawn_one_by_one_equal_those_drawn_at_once():
    """vLLM draws them one by one."""
    generator = torch.Generator().manual_seed(7)
    single = [torch.rand((), generator=generator, dtype=torch.float64).item() for _ in range(40)]
    assert uniforms(7, 40).tolist() == single
