"""The policy ratio, and the bounded objective of each token that follows from it.

Dimensions: B sequences, T response tokens. A ratio has one column per token, or a single one (1) for the whole sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import MAX_EXPONENT
from reinforcepp.algorithm.loss_types import Mean, Objective
from reinforcepp.algorithm.means import StepSize, mean_loss


def policy_ratio(log_ratio_BT: Tensor, mask_BT: Tensor, objective: Objective) -> Tensor:
    """Return s = exp(logp - logp_old) of tokens, or of sequences: their product, or their geometric mean. -> (B, T) or (B, 1)

    The log-ratios must be 0 where masked. The exponent is clamped so that no gradient overflows.
    """
    exponent = log_ratio_BT
    if objective.spec.whole_sequences:
        exponent = log_ratio_BT.sum(-1, keepdim=True)
    elif objective.importance_sampling_level == "sequence":
        exponent = log_ratio_BT.sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True).clamp_min(1)
    return torch.exp(exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT))


def surrogate(ratio: Tensor, logprobs_BT: Tensor, advantages_BT: Tensor, objective: Objective) -> Tensor:
    """Return the objective of each token, which is to be maximized. -> (B, T)

    ``clip``: min(s · A, clip(s, 1 - clip_low, 1 + clip_high) · A), and at least dual_clip · A if A < 0. [arXiv 1707.06347;
    dual clip: 1912.09729] ``cispo``: min(s, clip_high) · A · logp, the first factor detached. [2506.13585] ``sapo``:
    sigmoid(τ · (s - 1)) · 4 / τ · A, where the temperature τ depends on the sign of A. [2511.20347]
    """
    kind = objective.spec.surrogate
    if kind == "cispo":
        return ratio.clamp(max=objective.clip_high).detach() * advantages_BT * logprobs_BT
    if kind == "sapo":
        temperatures = objective.sapo_temperature_pos, objective.sapo_temperature_neg
        temperature_BT = torch.where(advantages_BT > 0, *temperatures)
        return torch.sigmoid(temperature_BT * (ratio - 1)) * 4 / temperature_BT * advantages_BT
    clipped_BT = ratio.clamp(1 - objective.clip_low, 1 + objective.clip_high) * advantages_BT
    objective_BT = torch.minimum(ratio * advantages_BT, clipped_BT)
    if objective.dual_clip is None:
        return objective_BT
    bounded_BT = torch.maximum(objective_BT, objective.dual_clip * advantages_BT)
    return torch.where(advantages_BT < 0, bounded_BT, objective_BT)


def clip_shares(
    ratio: Tensor, advantages_BT: Tensor, mask_BT: Tensor, objective: Objective, size: StepSize
) -> dict[str, Tensor]:
    """Return, under TRL's keys, the shares of tokens, or of sequences if they have one ratio, whose ratio is clipped.

    ``clip_ratio/low_min`` and ``clip_ratio/high_max`` are the extremes over sequences; the others add up over micro-batches.
    """
    kind = objective.spec.surrogate
    if kind == "sapo":
        return {}
    low, high = (0.0, objective.clip_high) if kind == "cispo" else (1 - objective.clip_low, 1 + objective.clip_high)
    low_BT = (mask_BT & (ratio < low) & (advantages_BT < 0)).float()
    high_BT = (mask_BT & (ratio > high) & (advantages_BT > 0)).float()
    mean: Mean = "tokens" if ratio.shape == mask_BT.shape else "sequence_means"
    low_mean, high_mean = (mean_loss(clipped_BT, mask_BT, mean, size) for clipped_BT in (low_BT, high_BT))
    if kind == "cispo":
        return {"cispo_clip_ratio": high_mean}
    lengths_B = mask_BT.sum(-1)
    low_B, high_B = (clipped_BT.sum(-1) / lengths_B.clamp_min(1) for clipped_BT in (low_BT, high_BT))
    return {
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/low_min": torch.where(lengths_B > 0, low_B, 1.0).min(),
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/high_max": high_B.max(),
        "clip_ratio/region_mean": low_mean + high_mean,
    }
