"""Group baselines: the samples of one prompt are compared with each other (REINFORCE++-baseline, RLOO, GRPO)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.estimators import EstimatorSpec
from reinforcepp.errors import ConfigError

GROUP_SCALE_FLOOR = 1e-4


class GroupMoments(NamedTuple):
    """For each sequence, of the sequences with the same group id, wherever they stand: mean, deviation, number. (B,)"""

    mean: Tensor
    deviation: Tensor
    size: Tensor


def group_moments(rewards_B: Tensor, group_ids_B: Tensor) -> GroupMoments:
    """Mean and sample standard deviation (n - 1) of the rewards of each sequence's group.

    Raises ``ConfigError`` for a group of one sample, whose advantage would always be 0.
    """
    ids_B = torch.as_tensor(group_ids_B, device=rewards_B.device)
    _, group_B, size_G = torch.unique(ids_B, return_inverse=True, return_counts=True)
    if (size_G < 2).any():
        raise ConfigError(
            f"{int((size_G < 2).sum())} of {len(size_G)} prompts have a single sample, so their advantage would always "
            "be 0: set num_generations to 2 or more, or use the estimator reinforce_plus_plus."
        )

    def mean_of(values_B: Tensor, divisor_G: Tensor) -> Tensor:
        sum_G = torch.zeros(len(size_G), device=values_B.device).index_add_(0, group_B, values_B)
        return (sum_G / divisor_G)[group_B]

    rewards_B = rewards_B.float()
    mean_B = mean_of(rewards_B, size_G)
    variance_B = mean_of((rewards_B - mean_B).square(), size_G - 1)
    return GroupMoments(mean_B, variance_B.sqrt(), size_G[group_B])


def group_advantages(rewards_B: Tensor, group_ids_B: Tensor, baseline: str, *, scaled: bool) -> Tensor:
    """R - mean of the group [v9 Eq. 6], or of its other samples (RLOO); ``scaled`` by its deviation (GRPO). -> (B,)

    GRPO's divisor is the sample deviation + 1e-4, as in TRL.
    """
    group = group_moments(rewards_B, group_ids_B)
    centred_B = rewards_B.float() - group.mean
    if baseline == "leave_one_out":
        centred_B = centred_B * group.size / (group.size - 1)
    return centred_B / (group.deviation + GROUP_SCALE_FLOOR) if scaled else centred_B


def group_token_advantages(
    rewards_B: Tensor,
    kl_BT: Tensor | None,
    mask_BT: Tensor,
    group_ids_B: Tensor,
    spec: EstimatorSpec,
    *,
    kl_coef: float,
) -> Tensor:
    """Return each sequence's group advantage at each of its tokens, zero where masked. [v9 Eq. 6] -> (B, T)

    The sum of kl_coef · KL over the sequence is subtracted from its reward first.
    """
    sums_B = rewards_B.float()
    if kl_BT is not None and kl_coef != 0:
        sums_B = sums_B - kl_coef * torch.where(mask_BT.bool(), kl_BT.float(), 0.0).sum(-1)
    advantages_B = group_advantages(sums_B, group_ids_B, spec.baseline, scaled=spec.scale == "group")
    return torch.where(mask_BT.bool(), advantages_B.unsqueeze(-1), 0.0)
