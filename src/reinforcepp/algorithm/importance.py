"""Importance weights of tokens that another engine, or an older policy, sampled."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reinforcepp.algorithm.kl import MAX_EXPONENT
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
