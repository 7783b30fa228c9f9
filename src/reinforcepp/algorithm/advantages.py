"""From rewards to advantages, as pure functions over tensors: REINFORCE++, and the estimators it is compared with.

Source: Hu et al., "REINFORCE++: Stabilizing Critic-Free Policy Optimization", arXiv 2501.03262v9, cited as [v9].
``estimators`` defines each estimator by its parts; ``groups`` and ``critic`` hold the baselines.

A batch is B sequences of T response tokens. ``mask_BT`` is 1 on tokens the policy sampled, EOS included, and 0
elsewhere (padding, tool output); the values in masked slots, NaN included, never influence a result.
Nothing here communicates: sums over ranks are arguments, so the caller adds them up and a test can split a batch at will.

Deviations from the paper: the variance is floored at 1e-8 inside the root, so a batch with equal returns has advantages of
exactly 0, and exponents are clamped so that no gradient overflows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.critic import compute_gae
from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.algorithm.groups import group_token_advantages
from reinforcepp.errors import ConfigError, nearest

Population = Literal["tokens", "sequences"]

VARIANCE_FLOOR = 1e-8


# --- rewards and returns --------------------------------------------------------------------------------------------


def clip_rewards(rewards_B: Tensor, limit: float | None) -> Tensor:
    """Return raw rewards clipped to [-limit, limit], before any centering; None disables clipping."""
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
    """G_t = r_t + gamma · G_{t+1}; masked tokens are skipped and have return 0. -> (B, T)"""
    mask_BT = mask_BT.bool()
    rewards_BT = torch.where(mask_BT, rewards_BT, 0.0)
    returns_BT = torch.zeros_like(rewards_BT)
    following_B = rewards_BT.new_zeros(rewards_BT.shape[0])
    for t in reversed(range(rewards_BT.shape[1])):
        returns_BT[:, t] = rewards_BT[:, t] + gamma * following_B
        following_B = torch.where(mask_BT[:, t], returns_BT[:, t], following_B)
    return torch.where(mask_BT, returns_BT, 0.0)


# --- global normalization -------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """Mean and population variance over every sampled token of the whole batch, on all ranks."""

    mean: Tensor
    variance: Tensor


def moment_sums(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return count, sum, squared deviations from this part's mean, and sum · mean, to add up over ranks. -> (4,) float64"""
    mask_BT = mask_BT.bool()
    count = mask_BT.sum().double()
    total = torch.where(mask_BT, values_BT.double(), 0.0).sum()
    mean = total / count.clamp_min(1)
    deviation = torch.where(mask_BT, values_BT.double() - mean, 0.0).square().sum()
    return torch.stack([count, total, deviation, total * mean])


def combine_moments(sums: Tensor) -> Moments:
    """Return mean and variance from the sum of all parts' :func:`moment_sums`.

    One reduction over ranks is enough, and the variance is that of a two-pass algorithm. [Chan, Golub and LeVeque 1983]
    """
    count, total, within, squares = sums
    mean = total / count.clamp_min(1)
    between = (squares - total * mean).clamp_min(0)
    return Moments(mean, (within + between) / count.clamp_min(1))


def population_mask(mask_BT: Tensor, over: Population) -> Tensor:
    """Return the mask of the values that mean and variance are taken over: all tokens, or the first of each sequence."""
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
    """Return the advantages before normalization over the batch, and the critic's targets. -> (B, T), (B, T)

    Per token: returns-to-go [v9 Eq. 4], or GAE on the same rewards. Per group: see ``groups``.
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
    advantages_BT = group_token_advantages(rewards_B, kl_BT, mask_BT, group_ids_B, spec, kl_coef=kl_coef)
    return advantages_BT, advantages_BT


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
    """Return ``(advantages_BT, returns_BT)`` of a global batch. [v9 Eq. 4 to 8]

    Args:
        rewards_B: one score per sequence.
        kl_BT: per-token k1 of the sampling policy against the reference; may be None when ``kl_coef`` is 0.
        mask_BT: 1 on sampled tokens.
        kl_coef: weight of the KL in the reward; must be 0 for an estimator with the KL in the loss.
        gamma: discount per token; must be 1 for an estimator with group baselines.
        estimator: a name from ``estimators.ESTIMATORS``.
        group_ids_B: prompt id of each sequence, needed by group baselines.
        normalize_over: ``tokens`` (the paper's code) or ``sequences``, each sequence counting once.
        values_BT: a critic's estimates before each token, needed by ppo.
        gae_lambda: ppo's trade-off between the critic's estimates and observed returns.
        sum_over_ranks: adds up the sums of all ranks; default: this batch is the whole batch.

    Raises:
        ConfigError: the arguments contradict each other, or a group has a single sample.
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
