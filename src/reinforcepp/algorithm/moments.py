"""Mean and variance over the batches of all ranks, and normalization with them.

Deviation from the paper: the variance is floored at 1e-8 before its square root, so a batch of equal returns has
advantages of exactly 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Population = Literal["tokens", "sequences"]

VARIANCE_FLOOR = 1e-8


class Moments(NamedTuple):
    """Mean and population variance over the sampled tokens of the global batch. () each"""

    mean: Tensor
    variance: Tensor


def moment_sums(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Return [n, S, sum((x - S/n)²), S²/n] of one part of the batch, to be added up over parts. -> (4,) float64"""
    mask_BT = mask_BT.bool()
    count = mask_BT.sum().double()
    total = torch.where(mask_BT, values_BT.double(), 0.0).sum()
    mean = total / count.clamp_min(1)
    squared_deviations = torch.where(mask_BT, values_BT.double() - mean, 0.0).square().sum()
    return torch.stack([count, total, squared_deviations, total * mean])


def combine_moments(sums: Tensor) -> Moments:
    """Return the moments of the global batch from the sum of its parts' :func:`moment_sums`.

    One all-reduce is enough, and the variance is as accurate as with two passes. [Chan, Golub and LeVeque 1983]
    """
    count, total, within, squares = sums
    mean = total / count.clamp_min(1)
    between = (squares - total * mean).clamp_min(0)
    return Moments(mean, (within + between) / count.clamp_min(1))


def population_mask(mask_BT: Tensor, over: Population) -> Tensor:
    """Return the mask of values in mean and variance: every sampled token, or each sequence's first. -> (B, T)"""
    if over == "tokens":
        return mask_BT
    return mask_BT.bool() & (mask_BT.bool().cumsum(-1) == 1)


def normalize(values_BT: Tensor, mask_BT: Tensor, moments: Moments) -> Tensor:
    """Return A = (G - mean) / sqrt(max(variance, 1e-8)), 0 where masked. [v9 Eq. 5] -> (B, T) float32"""
    scale = torch.rsqrt(moments.variance.clamp_min(VARIANCE_FLOOR))
    centered_BT = torch.where(mask_BT.bool(), values_BT.double() - moments.mean, 0.0)
    return (centered_BT * scale).float()
