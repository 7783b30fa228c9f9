"""Means over an optimizer step whose micro-batches, on all ranks, add up their shares.

Dimensions: B sequences, T response tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reinforcepp.algorithm.loss_types import Mean


class StepSize(NamedTuple):
    """The size of an optimizer step, over all micro-batches and ranks, from which the denominators of the loss follow."""

    tokens: Tensor | float
    """Unmasked tokens, at least 1."""
    sequences: int
    """Completions, including those that are fully masked."""
    max_length: int = 1
    """Tokens of the longest possible completion."""


def masked_mean(values_BT: Tensor, mask_BT: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Return sum(x · mask) / denominator; by default the denominator is the number of unmasked tokens, at least 1. -> ()"""
    mask_BT = mask_BT.bool()
    if denominator is None:
        denominator = mask_BT.sum().clamp_min(1)
    return torch.where(mask_BT, values_BT, 0.0).sum() / denominator


def mean_loss(losses_BT: Tensor, mask_BT: Tensor, mean: Mean, size: StepSize) -> Tensor:
    """Return this batch's share of the mean over an optimizer step of ``size``; see ``LossSpec.mean``. -> ()"""
    if mean == "tokens":
        return masked_mean(losses_BT, mask_BT, size.tokens)
    if mean == "sequence_means":
        losses_BT = losses_BT / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    return masked_mean(losses_BT, mask_BT, size.sequences * (size.max_length if mean == "max_length" else 1))
