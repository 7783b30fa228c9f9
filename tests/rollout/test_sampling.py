"""Drawing tokens at given numbers."""

import pytest
import torch

from reinforcepp.rollout.sampling import BLOCK, draw, uniforms


def naively(logits, number):
    """Add up probabilities, token by token, until the number is passed."""
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
    expected = [naively(row, u) for row, u in zip(logits, numbers.tolist(), strict=True)]
    assert (
        sum(a != b for a, b in zip(ids.tolist(), expected, strict=True)) <= 1
    )  # a number at a border may fall either way
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[range(200), ids], atol=1e-5, rtol=0)


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("allowed", [[0], [700], [3, 4], [BLOCK - 1, BLOCK], [5, 699]])
def test_a_token_that_was_filtered_out_is_never_drawn(number, allowed):
    logits = torch.full((1, 701), float("-inf"))
    logits[0, allowed] = torch.tensor([0.3, -20.0])[: len(allowed)]
    ids, logprobs = draw(logits, torch.tensor([number], dtype=torch.float64))
    assert ids.item() in allowed and torch.isfinite(logprobs).all()


def test_without_numbers_it_takes_the_likeliest():
    logits = torch.randn(5, 300).bfloat16()
    ids, logprobs = draw(logits, None)
    assert torch.equal(ids, logits.argmax(-1)) and logprobs.dtype == torch.float32


def test_one_number_at_a_time_or_all_at_once_are_the_same():
    """vLLM asks for them one by one."""
    generator = torch.Generator().manual_seed(7)
    single = [torch.rand((), generator=generator, dtype=torch.float64).item() for _ in range(40)]
    assert uniforms(7, 40).tolist() == single
