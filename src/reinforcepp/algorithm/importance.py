"""Importance weights of tokens that another engine, or an older policy, sampled."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import MAX_EXPONENT
from reinforcepp.algorithm.means import masked_mean
from reinforcepp.errors import ConfigError

Correction = Literal["tis", "icepop", "off"]


def importance_weights(
    old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, *, mode: Correction, low: float, high: float
) -> Tensor | None:
    """Return w = exp(logp_old - logp_rollout), the correction for tokens that another engine sampled. -> (B, T)

    ``tis`` clips w to [low, high], ``icepop`` sets w to 0 outside of it, ``off`` returns None. w carries no gradient.

    Raises:
        ConfigError: ``mode`` isn't one of these.
    """
    if mode == "off":
        return None
    log_ratio_BT = torch.where(mask_BT.bool(), old_logprobs_BT - rollout_logprobs_BT, 0.0).detach()
    weights_BT = torch.exp(log_ratio_BT.clamp(-MAX_EXPONENT, MAX_EXPONENT))
    if mode == "tis":
        return weights_BT.clamp(low, high)
    if mode == "icepop":
        return torch.where((weights_BT >= low) & (weights_BT <= high), weights_BT, 0.0)
    raise ConfigError(f"rollout correction: {mode!r} isn't valid. Choose tis, icepop or off.")


def off_policy_mask(
    logprobs_BT: Tensor, sampling_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, threshold: float
) -> Tensor:
    """Return 0 at negative advantages of sequences whose mean of logp_sampling - logp is over ``threshold``, else 1. -> (B, T)

    [arXiv 2512.02556 Eq. 9]
    """
    gap_BT = torch.where(mask_BT.bool(), sampling_logprobs_BT - logprobs_BT.detach(), 0.0)
    gap_B1 = gap_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    return ((advantages_BT >= 0) | (gap_B1 <= threshold)).float()


def high_entropy_mask(entropy_BT: Tensor, mask_BT: Tensor, quantile: float) -> Tensor:
    """Return 1 on the share ``quantile`` of unmasked tokens that have the highest entropy. [arXiv 2506.01939] -> (B, T)"""
    known_BT = mask_BT.bool()
    if not bool(known_BT.any()):
        return torch.zeros_like(mask_BT)
    threshold = torch.quantile(entropy_BT[known_BT].float(), 1 - quantile)
    return (known_BT & (entropy_BT >= threshold)).float()


def weight_stats(weights_BT: Tensor, mask_BT: Tensor, tokens: Tensor | float) -> dict[str, Tensor]:
    """Return mean and extremes of the weights under TRL's keys; ``tokens`` is the number of those in the optimizer step."""
    known_BT = mask_BT.bool()
    return {
        "sampling/importance_sampling_ratio/mean": masked_mean(weights_BT, mask_BT, tokens),
        "sampling/importance_sampling_ratio/min": torch.where(known_BT, weights_BT, math.inf).min(),
        "sampling/importance_sampling_ratio/max": torch.where(known_BT, weights_BT, 0.0).max(),
    }
