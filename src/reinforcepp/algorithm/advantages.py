"""From rewards to advantages, as pure functions over tensors.

Source: Hu et al., "REINFORCE++: Stabilizing Critic-Free Policy Optimization", arXiv 2501.03262v9, cited as [v9].
``estimators`` lists the components of each estimator; ``groups`` and ``critic`` hold the baselines, and
``moments`` the normalization. No function communicates: global sums are arguments, so a test can split a batch at will.

Dimensions: B sequences, T response tokens. ``mask_BT`` is 1 on tokens that the policy sampled, EOS included, and 0
elsewhere (padding, tool output). Masked values never affect a result, not even NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from reinforcepp.algorithm.critic import compute_gae
from reinforcepp.algorithm.discount import discounted_sums, discounts
from reinforcepp.algorithm.estimators import DiscountPer, Scale, checked_spec
from reinforcepp.algorithm.groups import centered_over_batch, group_sequence_advantages, scaled_over_batch
from reinforcepp.algorithm.moments import Population, combine_moments, moment_sums, normalize, population_mask


def clip_rewards(rewards_B: Tensor, bounds: tuple[float, float] | None) -> Tensor:
    """Return R clipped to ``bounds``, or unchanged for None. Apply it before any centering. -> (B,)"""
    return rewards_B if bounds is None else rewards_B.clamp(*bounds)


def token_rewards(
    rewards_B: Tensor, kl_BT: Tensor | None, mask_BT: Tensor, kl_coef: float, turn_rewards_BT: Tensor | None = None
) -> Tensor:
    """Return r_t = 1[t is the last sampled token] · R - kl_coef · kl_t, 0 where masked. [v9 Eq. 4] -> (B, T)

    ``turn_rewards_BT`` is the part of R that earlier turns earned, at the last sampled token of each of these turns. It stays
    there, and the last sampled token of the sequence gets the rest of R.
    """
    mask_BT = mask_BT.bool()
    remaining_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)
    last_BT = mask_BT & (remaining_BT == 1)
    rewards_BT = torch.where(mask_BT, 0.0 if turn_rewards_BT is None else turn_rewards_BT.float(), 0.0)
    rest_B1 = rewards_B.float().unsqueeze(-1) - rewards_BT.sum(-1, keepdim=True)
    rewards_BT = torch.where(last_BT, rewards_BT + rest_B1, rewards_BT)
    if kl_BT is None or kl_coef == 0:
        return rewards_BT
    return rewards_BT - kl_coef * torch.where(mask_BT, kl_BT.float(), 0.0)


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor, gamma: Tensor | float = 1.0) -> Tensor:
    """Return G_t = r_t + gamma_t · G_{t+1}, 0 where masked; t + 1 is the next sampled token. -> (B, T)"""
    mask_BT = mask_BT.bool()
    return torch.where(mask_BT, discounted_sums(rewards_BT, mask_BT, gamma), 0.0)


def compute_advantages(
    rewards_B: Tensor,
    kl_BT: Tensor | None,
    mask_BT: Tensor,
    *,
    turn_rewards_BT: Tensor | None = None,
    kl_coef: float,
    gamma: float = 1.0,
    discount_per: DiscountPer = "tokens",
    estimator: str = "reinforce_plus_plus",
    group_ids_B: Tensor | None = None,
    scale: Scale | None = None,
    normalize_over: Population = "tokens",
    values_BT: Tensor | None = None,
    gae_lambda: float = 1.0,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """Return ``(advantages_BT, returns_BT)`` of a batch. [v9 Eq. 4 to 8]

    Args:
        rewards_B: score of each sequence.
        kl_BT: per-token k1 of the sampling policy against the reference policy; can be None if ``kl_coef`` is 0.
        mask_BT: 1 on sampled tokens.
        turn_rewards_BT: the part of ``rewards_B`` that turns before the last one earned, each at its last sampled token; the
            mean of a group or of the batch as the baseline uses the sums only.
        kl_coef: weight of the KL in the reward; must be 0 if the estimator has the KL in the loss.
        gamma: discount; must be 1 with the mean of a group or of the batch as the baseline.
        discount_per: apply ``gamma`` between tokens, or only between turns.
        estimator: a name from ``estimators.ESTIMATORS``.
        group_ids_B: prompt id of each sequence, needed with a group baseline.
        scale: instead of the estimator's; see ``EstimatorSpec``.
        normalize_over: ``tokens`` (the paper's code) or ``sequences``, where each sequence counts once.
        values_BT: the critic's value before each token; needed by ppo.
        gae_lambda: 1 uses observed returns only, 0 the critic's one-step estimates.
        sum_over_ranks: all-reduce (sum) of a tensor; by default the batch is on one rank.

    Raises:
        ConfigError: the arguments contradict each other, or a group has a single sample.
    """
    spec = checked_spec(estimator, kl_coef=kl_coef, gamma=gamma)
    scale = scale or spec.scale
    if spec.grouped:
        given = rewards_B, kl_BT, mask_BT, group_ids_B, estimator
        advantages_B = group_sequence_advantages(*given, kl_coef=kl_coef, scaled=scale == "group")
        if scale in ("reward_std", "sequences"):
            advantages_B = scaled_over_batch(advantages_B, rewards_B, scale, sum_over_ranks)
        raw_BT = returns_BT = torch.where(mask_BT.bool(), advantages_B.unsqueeze(-1), 0.0)
    else:
        if spec.baseline == "batch_mean":
            rewards_B, turn_rewards_BT = centered_over_batch(rewards_B, sum_over_ranks), None
        rewards_BT = token_rewards(rewards_B, kl_BT, mask_BT, kl_coef, turn_rewards_BT)
        gamma_BT = discounts(mask_BT, gamma, discount_per)
        if spec.uses_critic:
            raw_BT, returns_BT = compute_gae(rewards_BT, values_BT, mask_BT, gamma=gamma_BT, lam=gae_lambda)
        else:
            raw_BT = returns_BT = returns_to_go(rewards_BT, mask_BT, gamma_BT)
    if scale != "batch":
        return raw_BT.clone(), returns_BT  # a file can't hold one tensor under two names
    counted_BT = population_mask(mask_BT, normalize_over)
    global_moments = combine_moments(sum_over_ranks(moment_sums(raw_BT, counted_BT)))
    return normalize(raw_BT, mask_BT, global_moments), returns_BT
