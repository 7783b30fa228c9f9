"""The loss of the policy, as pure functions over tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import MAX_EXPONENT


def masked_mean(values_BT: Tensor, mask_BT: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Return sum(x · mask) / denominator; by default the denominator is the number of unmasked tokens, at least 1. -> ()"""
    mask_BT = mask_BT.bool()
    if denominator is None:
        denominator = mask_BT.sum().clamp_min(1)
    return torch.where(mask_BT, values_BT, 0.0).sum() / denominator


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights_BT: Tensor | None = None,
    denominator: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the token mean of -w · min(s · A, clip(s, 1 - clip_low, 1 + clip_high) · A), s = exp(logprobs - old).

    [arXiv 2501.03262v9 Eq. 1; dual clip: arXiv 1912.09729] The exponent is clamped so that no gradient overflows.

    Args:
        logprobs_BT: of the policy in training, with gradient.
        old_logprobs_BT: of the policy that sampled the batch.
        advantages_BT: from :func:`reinforcepp.algorithm.advantages.compute_advantages`.
        mask_BT: 1 on sampled tokens.
        clip_low: the ratio s is clipped below 1 - clip_low.
        clip_high: the ratio s is clipped above 1 + clip_high.
        dual_clip: bound c > 1 of the loss, c · |A|, if A < 0; None disables it.
        weights_BT: the detached weights w, see :func:`reinforcepp.algorithm.importance.importance_weights`; 1 by default.
        denominator: number of tokens in the optimizer step over all micro-batches and ranks; by default in this batch.

    Returns:
        The loss, and the detached metrics ``clip_fraction`` and ``approx_kl`` (k3 of old against new). With a common
        ``denominator`` all three add up over micro-batches.
    """
    mask_BT = mask_BT.bool()
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    log_ratio_BT = torch.where(mask_BT, logprobs_BT, 0.0) - torch.where(mask_BT, old_logprobs_BT, 0.0)
    ratio_BT = torch.exp(log_ratio_BT.clamp(-MAX_EXPONENT, MAX_EXPONENT))
    plain_BT = ratio_BT * advantages_BT
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high) * advantages_BT
    objective_BT = torch.minimum(plain_BT, clipped_BT)
    if dual_clip is not None:
        bounded_BT = torch.maximum(objective_BT, dual_clip * advantages_BT)
        objective_BT = torch.where(advantages_BT < 0, bounded_BT, objective_BT)
    if weights_BT is not None:
        objective_BT = torch.where(mask_BT, weights_BT.detach(), 0.0) * objective_BT
    loss = masked_mean(-objective_BT, mask_BT, denominator)
    with torch.no_grad():
        stats = {
            "clip_fraction": masked_mean((clipped_BT < plain_BT).float(), mask_BT, denominator),
            "approx_kl": masked_mean(ratio_BT - 1 - log_ratio_BT, mask_BT, denominator),
        }
    return loss, stats
