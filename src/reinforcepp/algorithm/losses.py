"""The losses of the policy and of a reward model, as pure functions over tensors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import MAX_EXPONENT
from reinforcepp.errors import ConfigError

Correction = Literal["tis", "icepop", "off"]


def masked_mean(values_BT: Tensor, mask_BT: Tensor, denominator: Tensor | float | None = None) -> Tensor:
    """Sum over unmasked slots divided by ``denominator``, or by their number; 0 where there are none. -> ()"""
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
    """Token mean of -min(s·A, clip(s, 1-clip_low, 1+clip_high)·A), s = exp(logprobs - old). [v9 Eq. 1]

    Args:
        logprobs_BT: of the policy being trained, with gradient.
        old_logprobs_BT: of the policy that made the batch.
        advantages_BT: from :func:`reinforcepp.algorithm.advantages.compute_advantages`.
        mask_BT: 1 on sampled tokens.
        clip_low: how far the ratio may fall below 1 before it stops counting.
        clip_high: how far it may rise above 1.
        dual_clip: upper bound, in units of -A, of a negative-advantage token's loss; above 1, or None for off.
        weights_BT: detached weights for tokens sampled by another engine, see :func:`importance_weights`.
        denominator: number of tokens in the whole optimiser step, over micro-batches and ranks; default this batch's.

    Returns:
        The loss, and ``clip_fraction`` and ``approx_kl`` (k3 of old against new), detached. With a common
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


def importance_weights(
    old_logprobs_BT: Tensor, rollout_logprobs_BT: Tensor, mask_BT: Tensor, *, mode: Correction, low: float, high: float
) -> Tensor | None:
    """W = exp(logp_old - logp_rollout) for tokens that another engine sampled, detached; None when ``off``. -> (B, T)

    ``tis`` clamps w to [low, high]; ``icepop`` sets it to 0 outside.
    """
    if mode == "off":
        return None
    gap_BT = torch.where(mask_BT.bool(), old_logprobs_BT - rollout_logprobs_BT, 0.0).detach()
    weights_BT = torch.exp(gap_BT.clamp(-MAX_EXPONENT, MAX_EXPONENT))
    if mode == "tis":
        return weights_BT.clamp(low, high)
    if mode == "icepop":
        return torch.where((weights_BT >= low) & (weights_BT <= high), weights_BT, 0.0)
    raise ConfigError(f"unknown correction {mode!r}: choose tis, icepop or off.")


def bradley_terry_loss(
    chosen_B: Tensor, rejected_B: Tensor, *, margin: Tensor | float = 0.0, centering: float = 0.0
) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin), plus centering · mean of (chosen + rejected)². -> ()"""
    loss = -torch.nn.functional.logsigmoid(chosen_B - rejected_B - margin).mean()
    return loss + centering * (chosen_B + rejected_B).square().mean()
