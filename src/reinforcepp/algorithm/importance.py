"""Importance weights of tokens that another engine, or an older policy, sampled."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import MAX_EXPONENT
from reinforcepp.algorithm.means import masked_mean
from reinforcepp.errors import ConfigError

Correction = Literal["tis", "icepop", "sequence_truncate", "sequence_mask", "binary_kl", "off"]

PROBABILITY_FLOOR = 1e-6
"""Probabilities in a KL are clipped to [floor, 1 - floor], as in OpenRLHF."""


def importance_weights(
    old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, *, mode: Correction, low: float, high: float
) -> Tensor | None:
    """Return w = exp(logp_old - logp_rollout), the correction for tokens that another engine sampled. -> (B, T)

    ``tis`` clips w to [low, high], ``icepop`` sets w to 0 outside of it. ``sequence_truncate`` and ``sequence_mask`` do the same
    with one weight per sequence, the product of its tokens' (TRL's modes with these names). ``binary_kl`` leaves w as it is,
    because :func:`trust_region` drops sequences. ``off`` returns None. w carries no gradient.

    Raises:
        ConfigError: ``mode`` isn't one of these.
    """
    if mode == "off":
        return None
    log_ratio_BT = torch.where(mask_BT.bool(), old_logprobs_BT - rollout_logprobs_BT, 0.0).detach()
    if mode in ("sequence_truncate", "sequence_mask"):
        log_ratio_BT = log_ratio_BT.sum(-1, keepdim=True).expand_as(log_ratio_BT)
    weights_BT = torch.exp(log_ratio_BT.clamp(-MAX_EXPONENT, MAX_EXPONENT))
    if mode in ("tis", "sequence_truncate"):
        return weights_BT.clamp(low, high)
    if mode in ("icepop", "sequence_mask"):
        return torch.where((weights_BT >= low) & (weights_BT <= high), weights_BT, 0.0)
    if mode == "binary_kl":
        return weights_BT
    raise ConfigError(f"rollout correction: {mode!r} isn't valid. Choose {', '.join(get_args(Correction))}.")


def trust_region(logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, max_kl: float) -> Tensor:
    """Return 1 on sequences whose mean KL between engine and current policy is at most ``max_kl``, else 0. -> (B, T)

    The KL of a token is that of two events, "this token" or "another one": p · log(p / q) + (1 - p) · log((1 - p) / (1 - q)) with
    the probabilities p of the engine and q of the policy. [FlashREINFORCE, Hu et al. 2026; OpenRLHF 0.11.2, ``binary_kl``]
    """
    known_BT = mask_BT.bool()
    p_BT, q_BT = (
        torch.where(known_BT, x.detach(), 0.0).double().exp().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
        for x in (rollout_logprobs_BT, logprobs_BT)
    )
    kl_BT = p_BT * (p_BT / q_BT).log() + (1 - p_BT) * ((1 - p_BT) / (1 - q_BT)).log()
    mean_B1 = kl_BT.sum(-1, keepdim=True) / known_BT.sum(-1, keepdim=True).clamp_min(1)  # p = q where masked
    return (mean_B1 <= max_kl).float().expand_as(logprobs_BT)


def negative_token_mask(old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, fraction: float) -> Tensor:
    """Return 0 on the likelier tokens with a negative advantage, else 1. -> (B, T)

    Of each sequence's n tokens with a negative advantage, the ceil(fraction · n) that the sampling policy found least likely
    stay, in the order of the tokens if they are equally likely. [negative token filtering, arXiv 2606.17250]
    """
    negative_BT = mask_BT.bool() & (advantages_BT < 0)
    surest_last_BT = torch.where(negative_BT, old_logprobs_BT, math.inf).argsort(dim=-1, stable=True)
    rank_BT = surest_last_BT.argsort(-1)
    kept_B1 = (fraction * negative_BT.sum(-1, keepdim=True).double() - 1e-9).ceil()
    return (~negative_BT | (rank_BT < kept_B1)).float()


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
