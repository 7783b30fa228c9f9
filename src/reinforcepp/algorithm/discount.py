"""Discounted sums over the tokens of sequences, without a loop over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcepp.algorithm.estimators import DiscountPer


def discounted_sums(values_BT: Tensor, mask_BT: Tensor, discount: Tensor | float) -> Tensor:
    """Return S_t = v_t + discount_t · S_{t+1}, where t + 1 is the next sampled token.

    Every step doubles the tokens that a sum covers, so T tokens take log2(T) operations on whole tensors (Hillis and Steele,
    "Data Parallel Algorithms", 1986). Powers of the discount are only multiplied, so a small one becomes 0 and nothing overflows.
    They are computed in float64: 0.9999 rounded to float32 and taken to the power of 32,768 has an error of 0.05%.

    Args:
        values_BT: v; masked values don't count.
        mask_BT: true on sampled tokens.
        discount: from 0 to 1; one number, or one per token (B, T) in float64.

    Returns:
        S of each token; where masked, S of the next sampled token, and 0 after the last one. (B, T)
    """
    sums_BT = torch.where(mask_BT, values_BT, 0.0).double()
    factors_BT = (torch.ones_like(sums_BT) * discount).masked_fill(~mask_BT, 1.0)
    covered = 1
    while covered < sums_BT.shape[1]:
        sums_BT = sums_BT + factors_BT * _later(sums_BT, covered)
        factors_BT = factors_BT * _later(factors_BT, covered)
        covered *= 2
    return sums_BT.to(values_BT.dtype)


def discounts(mask_BT: Tensor, gamma: float, per: DiscountPer) -> Tensor | float:
    """Return the discount between each sampled token and the next one: gamma, or with ``turns`` gamma only between turns.

    A turn is a run of sampled tokens; masked tokens, such as a tool's output, separate it from the next turn. Within a turn the
    discount is 1. -> (B, T) float64 or ()
    """
    if per == "tokens":
        return gamma
    mask_BT = mask_BT.bool()
    ends_turn_BT = mask_BT & ~_later(mask_BT, 1)
    return torch.ones_like(mask_BT, dtype=torch.float64).masked_fill(ends_turn_BT, gamma)


def next_values(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the value at the next sampled token, 0 after the last one. -> (B, T)"""
    return _later(discounted_sums(values_BT, mask_BT, 0.0), 1)


def _later(values_BT: Tensor, tokens: int) -> Tensor:
    """Return the values ``tokens`` later, 0 after the end."""
    return torch.nn.functional.pad(values_BT[:, tokens:], (0, tokens))
