"""FlashREINFORCE, sequence-level importance weights and negative token filtering, against hand-computed goldens."""

import math
import random

import pytest
import torch

from reinforcepp.algorithm.advantages import compute_advantages
from reinforcepp.algorithm.importance import importance_weights, negative_token_mask, trust_region
from reinforcepp.algorithm.loss_types import Objective
from reinforcepp.algorithm.losses import policy_loss
from reinforcepp.algorithm.moments import moment_sums
from reinforcepp.errors import ConfigError

NAN = float("nan")


def tensor(rows):
    return torch.tensor(rows, dtype=torch.float32)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual.float(), tensor(expected), rtol=0, atol=tolerance)


# --- FlashREINFORCE: advantages ---------------------------------------------------------------------------------------


def flash(rewards, kl, mask, **changes):
    arguments = {"kl_coef": 0.1, "estimator": "flash_reinforce"} | changes
    return compute_advantages(tensor(rewards), tensor(kl), tensor(mask), **arguments)


def test_flash_reinforce_subtracts_the_mean_of_the_batch_and_normalizes_nothing():
    """Mean reward .5: 1.5 and -1.5 at the last tokens, minus .1 times the KL from each token on, as in G1."""
    kl, mask = [[0.2, -0.1, 0.4], [-0.2, 0.1, NAN]], [[1, 1, 1], [1, 1, 0]]
    advantages, returns = flash([2, -1], kl, mask)
    close(advantages, [[1.45, 1.47, 1.46], [-1.49, -1.51, 0]])
    assert torch.equal(advantages, returns)


def test_flash_reinforce_has_one_mean_for_all_ranks():
    """Rewards 1, 0 on one rank and 0, 0 on the other: the mean is 1/4 whatever the lengths, not 1/2 and 0."""
    other = moment_sums(tensor([0, 0]), torch.ones(2))
    kl, mask = torch.zeros(2, 2).tolist(), [[1, 1], [1, 0]]
    advantages, _ = flash([1, 0], kl, mask, sum_over_ranks=lambda part: part + other)
    close(advantages, [[0.75, 0.75], [-0.25, 0]])


def test_flash_reinforce_uses_the_sum_of_the_rewards_of_turns():
    kl, mask, turns = torch.zeros(2, 3).tolist(), [[1, 0, 1], [1, 1, 1]], tensor([[1, 0, 0], [0, 0, 0]])
    advantages, _ = flash([3, 1], kl, mask, turn_rewards_BT=turns)
    close(advantages, [[1, 0, 1], [-1, -1, -1]])
    with pytest.raises(ConfigError, match=r"gamma: 0.9 isn't valid for flash_reinforce"):
        flash([3, 1], kl, mask, gamma=0.9)


# --- FlashREINFORCE: trust region -------------------------------------------------------------------------------------

ENGINE, POLICY = tensor([[0.5, 0.5, 1], [0.5, 1, 1]]).log(), tensor([[0.25, 0.5, 1], [0.05, 1, 1]]).log()
MASK = tensor([[1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize(("max_kl", "trusted"), [(0.08, [1, 0]), (0.07, [0, 0]), (0.9, [1, 1]), (0.08305, [1, 0])])
def test_the_trust_region_drops_whole_sequences_by_their_mean_binary_kl(max_kl, trusted):
    """.5 log(.5 / .25) + .5 log(.5 / .75) = .143841 and 0, mean .071921; .5 log(.5 / .05) + .5 log(.5 / .95) = .830366."""
    unknown = torch.where(MASK.bool(), 0.0, NAN)
    found = trust_region(POLICY + unknown, ENGINE + unknown, MASK, max_kl)
    close(found, [[one] * 3 for one in trusted])


def test_the_binary_kl_takes_the_probability_of_the_engine_first():
    """p = .9, q = .5: .9 log 1.8 + .1 log .2 = .368064; the other way round .5 log(5 / 9) + .5 log 5 = .510826."""
    likely, even, mask = tensor([[0.9]]).log(), tensor([[0.5]]).log(), torch.ones(1, 1)
    assert trust_region(even, likely, mask, 0.4).item() == 1
    assert trust_region(likely, even, mask, 0.4).item() == 0
    certain, impossible = torch.zeros(1, 1), torch.full((1, 1), -1000.0)
    assert (
        trust_region(certain, impossible, mask, 13.9).item()
        == trust_region(impossible, certain, mask, 13.9).item()
        == 1
    )
    assert trust_region(certain, impossible, mask, 13.8).item() == 0  # (1 - 2e-6) log 1e6 = 13.8155


def test_the_loss_of_flash_reinforce():
    """Sequence 1: A = .5 with weights .25 / .5 and 1, mean (.25 + .5) / 2 = .375; sequence 2 is dropped. Half of it: -.1875."""
    weights = importance_weights(POLICY, ENGINE, MASK, mode="binary_kl", low=0.9, high=1.1)
    close(torch.where(MASK.bool(), weights, 0.0), [[0.5, 1, 0], [0.1, 0, 0]])
    weights = weights * trust_region(POLICY, ENGINE, MASK, 0.08)
    logprobs = POLICY.clone().requires_grad_()
    advantages = tensor([[0.5, 0.5, 0], [-0.5, 0, 0]])
    loss, _ = policy_loss(logprobs, POLICY, advantages, MASK, Objective("grpo"), weights_BT=weights)
    loss.backward()
    close(loss.detach(), -0.1875)
    close(logprobs.grad, [[-0.0625, -0.125, 0], [0, 0, 0]])  # -w · A / (2 tokens · 2 sequences)


# --- one weight per sequence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "low", "high", "expected"),
    [
        ("sequence_truncate", 0.5, 5, 3.158193),
        ("sequence_truncate", 0.5, 2, 2),
        ("sequence_truncate", 4, 5, 4),
        ("sequence_mask", 0.5, 5, 3.158193),
        ("sequence_mask", 0.5, 2, 0),
        ("sequence_mask", 4, 5, 0),
    ],
)
def test_a_sequence_has_the_product_of_its_tokens_weights(mode, low, high, expected):
    """The log-ratios of G8, .1 + 2 - 1 + .05 = 1.15: exp(1.15) = 3.158193. The second sequence has 0 and a masked token."""
    old, rollout = tensor([[-1, -2, -0.5, -1], [-1, NAN, 0, 0]]), tensor([[-1.1, -4, 0.5, -1.05], [-1, 7, 0, 0]])
    mask = tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    weights = importance_weights(old, rollout, mask, mode=mode, low=low, high=high)
    other = 1.0 if low <= 1 else {"sequence_truncate": low, "sequence_mask": 0.0}[mode]
    close(weights, [[expected] * 4, [other] * 4])


def test_an_unknown_correction_names_all():
    with pytest.raises(ConfigError, match="Choose tis, icepop, sequence_truncate, sequence_mask, binary_kl, off"):
        importance_weights(POLICY, ENGINE, MASK, mode="token_truncate", low=0, high=1)


# --- negative token filtering -----------------------------------------------------------------------------------------


def test_negative_token_filtering_keeps_the_least_likely_tokens():
    """.4 of five tokens are the two least likely, -3 and -2. Positive advantages, masked tokens and zeros stay."""
    logprobs = tensor([[-0.1, -3, -0.5, -2, -1], [-0.1, -3, -0.5, -2, -1], [-9, -1, -2, -3, NAN]])
    advantages = tensor([[-1] * 5, [1] * 5, [-1, 1, -0.5, 0, -1]])
    mask = tensor([[1] * 5, [1] * 5, [0, 1, 1, 1, 0]])
    found = negative_token_mask(logprobs, advantages, mask, 0.4)
    close(found * mask, [[0, 1, 0, 1, 0], [1] * 5, [0, 1, 1, 1, 0]])
    close(negative_token_mask(logprobs, advantages, mask, 0.0) * mask, [[0] * 5, [1] * 5, [0, 1, 0, 1, 0]])


def test_filtered_tokens_count_in_the_denominator():
    """Five tokens with A = -1 and ratio 1, of which two stay: 2 / 5, not 2 / 2."""
    logprobs, mask = tensor([[-0.1, -3, -0.5, -2, -1]]), torch.ones(1, 5)
    weights = negative_token_mask(logprobs, -mask, mask, 0.4)
    loss, _ = policy_loss(logprobs, logprobs, -mask, mask, weights_BT=weights)
    close(loss, 0.4)


@pytest.mark.parametrize("seed", range(10))
def test_negative_token_filtering_equals_a_naive_loop(seed):
    rng = random.Random(seed)
    shape = range(5), range(30)
    logprobs = [[rng.choice([-0.5, -1.0, -2.0]) for _ in shape[1]] for _ in shape[0]]  # ties go by position
    advantages = [[rng.choice([-1.0, 0.5]) for _ in shape[1]] for _ in shape[0]]
    mask = [[int(rng.random() < 0.7) for _ in shape[1]] for _ in shape[0]]
    fraction = rng.choice([0.1, 0.3, 0.5])
    expected = [[1.0] * 30 for _ in shape[0]]
    for i in shape[0]:
        negative = [t for t in shape[1] if mask[i][t] and advantages[i][t] < 0]
        kept = math.ceil(round(fraction * len(negative), 6))
        for t in sorted(negative, key=lambda t: logprobs[i][t])[kept:]:
            expected[i][t] = 0.0
    close(negative_token_mask(tensor(logprobs), tensor(advantages), tensor(mask), fraction), expected, 0)


def test_seven_percent_of_a_hundred_tokens_are_seven():
    ones = torch.ones(1, 100)
    assert 0.07 * 100 > 7
    assert negative_token_mask(-ones, -ones, ones, 0.07).sum() == 7
