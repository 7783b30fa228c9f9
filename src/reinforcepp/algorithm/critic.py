"""The critic of PPO: generalized advantage estimation and the value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcepp.algorithm.discount import discounted_sums, next_values
from reinforcepp.algorithm.means import masked_mean
from reinforcepp.errors import ConfigError


def compute_gae(
    rewards_BT: Tensor, values_BT: Tensor | None, mask_BT: Tensor, *, gamma: Tensor | float, lam: float
) -> tuple[Tensor, Tensor]:
    """Return A_t = delta_t + gamma · lam · A_{t+1} with delta_t = r_t + gamma · V_{t+1} - V_t. [arXiv 1506.02438 Eq. 16]

    t + 1 is the next sampled token; values are 0 where masked. gamma is one number, or the discount after each token.

    Returns:
        ``(advantages_BT, returns_BT)``; the returns A + V are the critic's targets.

    Raises:
        ConfigError: the values are missing.
    """
    if values_BT is None:
        raise ConfigError("values_BT: missing, but ppo needs the critic's values. Pass them.")
    mask_BT = mask_BT.bool()
    rewards_BT, values_BT = (torch.where(mask_BT, x, 0.0) for x in (rewards_BT, values_BT))
    deltas_BT = rewards_BT + (gamma * next_values(values_BT, mask_BT)).to(values_BT.dtype) - values_BT
    advantages_BT = torch.where(mask_BT, discounted_sums(deltas_BT, mask_BT, gamma * lam), 0.0)
    return advantages_BT, advantages_BT + values_BT


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Return the token mean of max((V - R)², (V' - R)²) / 2, where V' = old + clip(V - old, -clip, clip). -> ()

    None for ``clip`` disables the second term. R is the return. [arXiv 2203.02155; value clipping: arXiv 2005.12729]
    """
    error_BT = (values_BT - returns_BT).square()
    if clip is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        error_BT = torch.maximum(error_BT, (clipped_BT - returns_BT).square())
    return masked_mean(error_BT / 2, mask_BT, denominator)
