"""REINFORCE++, and the estimators beside it, from rewards to advantages, as pure functions over tensors.

Source: Hu et al., "REINFORCE++: Stabilizing Critic-Free Policy Optimization", arXiv 2501.03262v9, cited as [v9].
What each estimator is made of stands in ``estimators``.

A batch is B sequences of T response tokens. ``mask_BT`` is 1 on tokens the policy sampled, EOS included, and 0
elsewhere (padding, tool output); whatever stands in a masked slot, NaN included, has no influence on anything.
Nothing here talks to other ranks: sums that must be global are arguments, so a caller adds them up over ranks and
a test can split a batch at will.

Deviations from the paper: the variance is floored at 1e-8 inside the root, so a batch whose returns are all equal
has advantages of exactly 0, and exponents are clamped so that no gradient overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.errors import ConfigError, nearest

Population = Literal["tokens", "sequences"]

GROUP_SCALE_FLOOR = 1e-4
VARIANCE_FLOOR = 1e-8


# --- rewards and returns --------------------------------------------------------------------------------------------


def clip_rewards(rewards_B: Tensor, limit: float | None) -> Tensor:
    """Raw rewards cut to [-limit, limit]; ``None`` leaves them. Comes before any centring."""
    return rewards_B if limit is None else rewards_B.clamp(-limit, limit)


def token_rewards(rewards_B: Tensor, kl_BT: Tensor | None, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """r_t = 1[t is the last sampled token] · R - kl_coef · kl_t, zero where masked. [v9 Eq. 4] -> (B, T)"""
    mask_BT = mask_BT.bool()
    after_BT = mask_BT.flip(-1).cumsum(-1).flip(-1)
    last_BT = mask_BT & (after_BT == 1)
    rewards_BT = torch.where(last_BT, rewards_B.float().unsqueeze(-1), 0.0)
    if kl_BT is None or kl_coef == 0:
        return rewards_BT
    return rewards_BT - kl_coef * torch.where(mask_BT, kl_BT.float(), 0.0)


def returns_to_go(rewards_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma · G_{t+1}; masked tokens are skipped, carry the return on and have return 0. -> (B, T)"""
    mask_BT = mask_BT.bool()
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    returns_BT = torch.zeros_like(rewards_BT)
    following_B = rewards_BT.new_zeros(rewards_BT.shape[0])
    for t in reversed(range(rewards_BT.shape[1])):
        returns_BT[:, t] = rewards_BT[:, t] + gamma * following_B
        following_B = torch.where(mask_BT[:, t], returns_BT[:, t], following_B)
    return torch.where(mask_BT, returns_BT, 0.0)


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


# --- global normalisation -------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and population variance over every sampled token of the whole batch, on all ranks."""

    mean: Tensor
    variance: Tensor


def moment_sums(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Count, sum, squared deviations from this part's own mean, and sum · mean; add these up over ranks. -> (4,) float64"""
    mask_BT = mask_BT.bool()
    count = mask_BT.sum().double()
    total = torch.where(mask_BT, values_BT.double(), 0.0).sum()
    mean = total / count.clamp_min(1)
    deviation = torch.where(mask_BT, values_BT.double() - mean, 0.0).square().sum()
    return torch.stack([count, total, deviation, total * mean])


def combine_moments(sums: Tensor) -> Moments:
    """From the sum of all parts' :func:`moment_sums`: the deviations within parts, and those of the parts' means.

    So one exchange is enough, and the variance still is that of two passes. [Chan, Golub and LeVeque 1983]
    """
    count, total, within, squares = sums
    mean = total / count.clamp_min(1)
    between = (squares - total * mean).clamp_min(0)
    return Moments(mean, (within + between) / count.clamp_min(1))


def population_mask(mask_BT: Tensor, over: Population) -> Tensor:
    """Where the values stand that mean and variance are taken over: every token, or the first token of each sequence."""
    if over == "tokens":
        return mask_BT
    return mask_BT.bool() & (mask_BT.bool().cumsum(-1) == 1)


def normalize(values_BT: Tensor, mask_BT: Tensor, moments: Moments) -> Tensor:
    """A = (G - mean) / sqrt(max(variance, 1e-8)), zero where masked. [v9 Eq. 5] -> (B, T) float32"""
    scale = torch.rsqrt(moments.variance.clamp_min(VARIANCE_FLOOR))
    centred_BT = torch.where(mask_BT.bool(), values_BT.double() - moments.mean, 0.0)
    return (centred_BT * scale).float()


def unnormalized_advantages(
    rewards_B: Tensor,
    kl_BT: Tensor | None,
    mask_BT: Tensor,
    *,
    kl_coef: float,
    gamma: float,
    estimator: str,
    group_ids_B: Tensor | None,
    values_BT: Tensor | None = None,
    gae_lambda: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Advantages before any normalisation over the batch, and what a critic is to learn.

    Per token: returns-to-go [v9 Eq. 4], or GAE on the same rewards. Per sequence: R, less the KL of its tokens where
    the estimator has it in the reward, compared within its group [v9 Eq. 6] and given to each token. -> (B, T), (B, T)
    """
    if estimator not in ESTIMATORS:
        raise ConfigError(
            f"unknown estimator {estimator!r}: choose {', '.join(ESTIMATORS)}.{nearest(estimator, ESTIMATORS)}"
        )
    spec = ESTIMATORS[estimator]
    if spec.kl_in_loss and kl_coef != 0:
        raise ConfigError(
            f"{estimator} takes no KL in the reward, but kl_coef is {kl_coef}: pass 0 here and add the k2 KL to the loss."
        )
    if not spec.grouped:
        rewards_BT = token_rewards(rewards_B, kl_BT, mask_BT, kl_coef)
        if not spec.uses_critic:
            returns_BT = returns_to_go(rewards_BT, mask_BT, gamma)
            return returns_BT, returns_BT
        if values_BT is None:
            raise ConfigError(f"{estimator} needs values_BT, a critic's estimates.")
        return compute_gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=gae_lambda)
    if gamma != 1:
        raise ConfigError(f"{estimator} needs gamma 1, not {gamma}.")
    if group_ids_B is None:
        raise ConfigError(f"{estimator} needs group_ids_B, the prompt id of each sequence.")
    sums_B = rewards_B.float()
    if kl_BT is not None and kl_coef != 0:
        sums_B = sums_B - kl_coef * torch.where(mask_BT.bool(), kl_BT.float(), 0.0).sum(-1)
    own_B = group_advantages(sums_B, group_ids_B, spec.baseline, scaled=spec.scale == "group")
    spread_BT = torch.where(mask_BT.bool(), own_B.unsqueeze(-1), 0.0)
    return spread_BT, spread_BT


def compute_advantages(
    rewards_B: Tensor,
    kl_BT: Tensor | None,
    mask_BT: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    estimator: str = "reinforce_plus_plus",
    group_ids_B: Tensor | None = None,
    normalize_over: Population = "tokens",
    values_BT: Tensor | None = None,
    gae_lambda: float = 1.0,
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda part: part,
) -> tuple[Tensor, Tensor]:
    """``(advantages_BT, returns_BT)`` of a whole global batch. [v9 Eq. 4 to 8]

    Args:
        rewards_B: one score per sequence.
        kl_BT: per-token k1 of the sampling policy against the reference; may be None when ``kl_coef`` is 0.
        mask_BT: 1 on sampled tokens.
        kl_coef: weight of the KL in the reward; must be 0 for an estimator that has it in the loss.
        gamma: discount per token; must be 1 for an estimator that compares the samples of a prompt.
        estimator: a name from ``estimators.ESTIMATORS``.
        group_ids_B: prompt id of each sequence, needed to compare the samples of a prompt.
        normalize_over: ``tokens`` (the paper's code) or ``sequences``, each sequence counting once.
        values_BT: a critic's estimates before each token, needed by ppo.
        gae_lambda: ppo's trade between the critic's estimates and what was seen.
        sum_over_ranks: adds up what each rank passes in; by default this batch is all there is.

    Raises:
        ConfigError: for arguments that contradict each other, or a group of one sample.
    """
    raw_BT, returns_BT = unnormalized_advantages(
        rewards_B,
        kl_BT,
        mask_BT,
        kl_coef=kl_coef,
        gamma=gamma,
        estimator=estimator,
        group_ids_B=group_ids_B,
        values_BT=values_BT,
        gae_lambda=gae_lambda,
    )
    if ESTIMATORS[estimator].scale != "batch":
        return raw_BT, returns_BT
    counted_BT = population_mask(mask_BT, normalize_over)
    over_all = combine_moments(sum_over_ranks(moment_sums(raw_BT, counted_BT)))
    return normalize(raw_BT, mask_BT, over_all), returns_BT


def compute_gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """A_t = delta_t + gamma·lam·A_{t+1}, delta_t = r_t + gamma·V_{t+1} - V_t; masked tokens are skipped.

    Returns:
        ``(advantages_BT, returns_BT)``, returns being A + V, what the critic is to learn. [arXiv 1506.02438, Eq. 16]
    """
    mask_BT = mask_BT.bool()
    rewards_BT, values_BT = (torch.where(mask_BT, x, 0.0) for x in (rewards_BT, values_BT))
    advantages_BT = torch.zeros_like(rewards_BT)
    value_B, advantage_B = (rewards_BT.new_zeros(rewards_BT.shape[0]) for _ in range(2))
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * value_B - values_BT[:, t]
        advantages_BT[:, t] = delta_B + gamma * lam * advantage_B
        value_B = torch.where(mask_BT[:, t], values_BT[:, t], value_B)
        advantage_B = torch.where(mask_BT[:, t], advantages_BT[:, t], advantage_B)
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    return advantages_BT, advantages_BT + values_BT
