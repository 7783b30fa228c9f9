"""From a scored batch to its advantages: the mask, the sign of the KL, and the log-probabilities that it is taken from."""

from dataclasses import replace

import pytest
import torch

from reinforcepp import ReinforceConfig
from reinforcepp.training.batches import batch_advantages
from reinforcepp.training.optimizer_step import OptimizerStep
from reinforcepp.types import RolloutBatch

MASK = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])


def batch(rewards, rollout=0.0, old=0.0):
    """Two completions of two and three tokens; ``rollout`` and ``old`` are log-probabilities of the first token."""
    first = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    return RolloutBatch(
        completions=[],
        mask_BT=MASK,
        rollout_logprobs_BT=rollout * first,
        old_logprobs_BT=old * first,
        ref_logprobs_BT=torch.zeros(2, 3),
        entropy_BT=torch.zeros(2, 3),
        rewards_B=torch.tensor(rewards),
        group_ids_B=torch.tensor([0, 1]),
    )


def test_padding_has_no_part_in_the_advantages():
    """Returns are 1, 1 and 0, 0, 0: their mean is 0.4, their standard deviation sqrt(0.24)."""
    advantages_BT, _ = batch_advantages(batch([1.0, 0.0]), ReinforceConfig(), 0.0, on_policy=False)
    expected = torch.tensor([[0.6, 0.6, 0.0], [-0.4, -0.4, -0.4]]) / 0.24**0.5
    torch.testing.assert_close(advantages_BT, expected)


def test_filters_multiply_the_weights_of_tokens():
    """Half of two negative tokens is the first one, with exp(-2); of three the last two, which are equally likely."""
    old_BT, config = torch.tensor([[-2.0, 0.0, 0.0], [0.0, -1.0, -1.0]]), ReinforceConfig(negative_token_fraction=0.5)
    scored = replace(batch([0.0, 0.0], rollout=-1.0), old_logprobs_BT=old_BT)
    step = OptimizerStep.of(scored, [0, 1], 0.0, config)
    given = scored, torch.tensor([0, 1]), old_BT, -torch.ones(2, 3), config
    weights_BT, stats = step.token_weights(*given, "off")
    assert (weights_BT * MASK).tolist() == [[1, 0, 0], [0, 1, 1]] and stats == {}
    weights_BT, stats = step.token_weights(*given, "binary_kl")  # the engine gave the first token -1, the others 0
    assert (weights_BT == 0).all()
    assert stats["sampling/trust_region_dropped_ratio"] == 1
    assert stats["sampling/importance_sampling_ratio/min"] == torch.tensor(-1.0).exp()


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("reinforce_plus_plus_baseline", [1.414214, 0, -0.707107, -0.707107]),
        ("rloo", [1, 0, 0, 0]),
        ("grpo", [0.707007, 0, 0, 0]),
        ("reinforce_plus_plus", [0, 0, 0, 0]),
        ("ppo", [0, 0, 0, 0]),
        ("flash_reinforce", [0.25, 0, 0.25, 0.25]),
    ],
)
def test_a_masked_completion_counts_in_the_baseline_only(estimator, expected):
    """Rewards 1, 0 | 1, 1 of one token each; the second completion is masked, because it was truncated.

    By hand: the mean of all is 3/4. The group's mean is 1/2, its leave-one-out mean 0, its sample deviation sqrt(1/2): 1/2, 1 and
    1/2 / 0.707207. The normalization is over the other three tokens: 1/2, 0, 0 have mean 1/6 and variance 1/18; 1, 1, 1 have
    none.
    """
    zeros = torch.zeros(4, 1)
    masked = RolloutBatch(
        completions=[],
        mask_BT=torch.tensor([[1.0], [0.0], [1.0], [1.0]]),
        rollout_logprobs_BT=zeros,
        old_logprobs_BT=zeros,
        ref_logprobs_BT=zeros,
        entropy_BT=zeros,
        rewards_B=torch.tensor([1.0, 0.0, 1.0, 1.0]),
        group_ids_B=torch.tensor([0, 0, 1, 1]),
    )
    config = ReinforceConfig(estimator=estimator, num_generations=2)
    advantages_BT, _ = batch_advantages(masked, config, 0.0, on_policy=False, values_BT=zeros)
    torch.testing.assert_close(advantages_BT[:, 0], torch.tensor(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("on_policy", "logprobs"), [(True, {"rollout": 1.0}), (False, {"old": 1.0})])
def test_a_token_that_the_policy_prefers_over_the_reference_costs_reward(on_policy, logprobs):
    """Its return is -0.1, all others are 0. On policy the engine's log-probabilities count, otherwise the trainer's."""
    advantages_BT, _ = batch_advantages(batch([0.0, 0.0], **logprobs), ReinforceConfig(), 0.1, on_policy=on_policy)
    expected = torch.tensor([[-0.08, 0.02, 0.0], [0.02, 0.02, 0.02]]) / 0.0016**0.5
    torch.testing.assert_close(advantages_BT, expected, atol=1e-5, rtol=1e-4)
