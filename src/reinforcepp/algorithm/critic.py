"""The critic of PPO: generalized advantage estimation and the value loss."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcepp.algorithm.losses import masked_mean


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


def value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | None,
    denominator: Tensor | float | None = None,
) -> Tensor:
    """Token mean of half the larger of (V - R)² and (V' - R)², V' being V within ``clip`` of the old value. -> ()"""
    error_BT = (values_BT - returns_BT).square()
    if clip is not None:
        clipped_BT = old_values_BT + (values_BT - old_values_BT).clamp(-clip, clip)
        error_BT = torch.maximum(error_BT, (clipped_BT - returns_BT).square())
    return masked_mean(error_BT / 2, mask_BT, denominator)
