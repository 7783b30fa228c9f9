"""Group baselines, which compare the samples of a prompt: REINFORCE++-baseline, RLOO, GRPO.

Dimensions: B sequences, T response tokens, G groups (prompts).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.errors import ConfigError

GROUP_SCALE_FLOOR = 1e-4


class GroupMoments(NamedTuple):
    """Mean, sample standard deviation and size of each sequence's group. (B,) each"""

    mean: Tensor
    std: Tensor
    size: Tensor


def group_moments(rewards_B: Tensor, group_ids_B: Tensor) -> GroupMoments:
    """Return mean_g = sum(R) / n and std_g = sqrt(sum((R - mean_g)²) / (n - 1)) of each sequence's group g. -> (B,) each

    The sequences of a group can be anywhere in the batch.

    Raises:
        ConfigError: a group has a single sample, whose advantage would always be 0.
    """
    ids_B = torch.as_tensor(group_ids_B, device=rewards_B.device)
    _, group_B, size_G = torch.unique(ids_B, return_inverse=True, return_counts=True)
    if (size_G < 2).any():
        raise ConfigError(
            f"num_generations: {int((size_G < 2).sum())} of {len(size_G)} prompts have a single sample, so their advantage "
            "is always 0. Set num_generations to 2 or more, or use the estimator reinforce_plus_plus."
        )

    def mean_of(values_B: Tensor, divisor_G: Tensor) -> Tensor:
        sum_G = torch.zeros(len(size_G), device=values_B.device).index_add_(0, group_B, values_B)
        return (sum_G / divisor_G)[group_B]

    rewards_B = rewards_B.float()
    mean_B = mean_of(rewards_B, size_G)
    variance_B = mean_of((rewards_B - mean_B).square(), size_G - 1)
    return GroupMoments(mean_B, variance_B.sqrt(), size_G[group_B])


def group_advantages(rewards_B: Tensor, group_ids_B: Tensor, baseline: str, *, scaled: bool) -> Tensor:
    """Return R minus the group's baseline, divided by std_g + 1e-4 if ``scaled`` (GRPO, as in TRL). -> (B,)

    ``group_mean``: R - mean_g [arXiv 2501.03262v9 Eq. 6]. ``leave_one_out``: R - mean of the group's other samples, which equals
    (R - mean_g) · n / (n - 1) [arXiv 2402.14740].
    """
    group = group_moments(rewards_B, group_ids_B)
    centered_B = rewards_B.float() - group.mean
    if baseline == "leave_one_out":
        centered_B = centered_B * group.size / (group.size - 1)
    return centered_B / (group.std + GROUP_SCALE_FLOOR) if scaled else centered_B


def group_token_advantages(
    rewards_B: Tensor,
    kl_BT: Tensor | None,
    mask_BT: Tensor,
    group_ids_B: Tensor | None,
    estimator: str,
    *,
    kl_coef: float,
    gamma: float,
) -> Tensor:
    """Return each sequence's group advantage of R - kl_coef · sum_t kl_t at its sampled tokens, 0 where masked. -> (B, T)

    Raises:
        ConfigError: ``gamma`` isn't 1, the group ids are missing, or a group has a single sample.
    """
    if gamma != 1:
        raise ConfigError(f"gamma: {gamma} isn't valid for {estimator}. Use 1.")
    if group_ids_B is None:
        raise ConfigError(f"group_ids_B: missing, but {estimator} needs the prompt id of each sequence. Pass them.")
    spec = ESTIMATORS[estimator]
    penalized_B = rewards_B.float()
    if kl_BT is not None and kl_coef != 0:
        penalized_B = penalized_B - kl_coef * torch.where(mask_BT.bool(), kl_BT.float(), 0.0).sum(-1)
    advantages_B = group_advantages(penalized_B, group_ids_B, spec.baseline, scaled=spec.scale == "group")
    return torch.where(mask_BT.bool(), advantages_B.unsqueeze(-1), 0.0)
