"""Group baselines, which compare the samples of a prompt (REINFORCE++-baseline, RLOO, GRPO), and baselines of the batch.

Dimensions: B sequences, T response tokens, G groups (prompts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.estimators import ESTIMATORS, Scale
from reinforcepp.algorithm.moments import combine_moments, moment_sums
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


def normalized_sum(scores: Sequence[Sequence[float | None]], weights: Sequence[float], group_ids_B: Tensor) -> Tensor:
    """Return sum_f weight_f · (score_f - mean_g) / (std_g + 1e-4), without the functions that gave None. -> (B,)

    Mean and sample deviation of each function are those of its scores in the sequence's group, as in TRL. [arXiv 2601.05242]
    """
    _, group_B = torch.unique(group_ids_B, return_inverse=True)
    total_B = torch.zeros(len(group_B), device=group_B.device)
    for row, weight in zip(scores, weights, strict=True):
        score_B = total_B.new_tensor([math.nan if score is None else score for score in row])
        known_B = ~score_B.isnan()

        def sums(values_B: Tensor, known_B: Tensor = known_B) -> Tensor:
            sum_G = values_B.new_zeros(len(values_B)).index_add_(0, group_B, torch.where(known_B, values_B, 0.0))
            return sum_G[group_B]

        count_B = sums(torch.ones_like(score_B))
        centered_B = score_B - sums(score_B) / count_B
        std_B = (sums(centered_B.square()) / (count_B - 1).clamp_min(1)).sqrt()
        total_B += weight * torch.where(known_B, centered_B / (std_B + GROUP_SCALE_FLOOR), 0.0)
    return total_B


def centered_over_batch(rewards_B: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Return R - mean(R) over the sequences of all ranks. -> (B,)"""
    moments = combine_moments(sum_over_ranks(moment_sums(rewards_B, torch.ones_like(rewards_B))))
    return (rewards_B.double() - moments.mean).float()


def scaled_over_batch(
    advantages_B: Tensor, rewards_B: Tensor, scale: Scale, sum_over_ranks: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return advantages that are scaled by a sample deviation over all ranks, as in TRL. -> (B,)

    ``reward_std``: A / (std(R) + 1e-4). ``sequences``: (A - mean(A)) / (std(A) + 1e-4).
    """
    values_B = advantages_B if scale == "sequences" else rewards_B
    sums = sum_over_ranks(moment_sums(values_B, torch.ones_like(values_B)))
    mean, variance = combine_moments(sums)
    std = (variance * sums[0] / (sums[0] - 1).clamp_min(1)).sqrt()
    return ((advantages_B - (mean if scale == "sequences" else 0.0)) / (std + GROUP_SCALE_FLOOR)).float()


def group_sequence_advantages(
    rewards_B: Tensor,
    kl_BT: Tensor | None,
    mask_BT: Tensor,
    group_ids_B: Tensor | None,
    estimator: str,
    *,
    kl_coef: float,
    scaled: bool,
) -> Tensor:
    """Return each sequence's group advantage of R - kl_coef · sum_t kl_t, see :func:`group_advantages`. -> (B,)

    Raises:
        ConfigError: the group ids are missing, or a group has a single sample.
    """
    if group_ids_B is None:
        raise ConfigError(f"group_ids_B: missing, but {estimator} needs the prompt id of each sequence. Pass them.")
    spec = ESTIMATORS[estimator]
    penalized_B = rewards_B.float()
    if kl_BT is not None and kl_coef != 0:
        penalized_B = penalized_B - kl_coef * torch.where(mask_BT.bool(), kl_BT.float(), 0.0).sum(-1)
    return group_advantages(penalized_B, group_ids_B, spec.baseline, scaled=scaled)
