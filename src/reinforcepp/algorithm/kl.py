"""KL estimates per token, and the adaptive KL coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reinforcepp.errors import ConfigError, nearest

KlKind = Literal["k1", "k2", "k3"]

MAX_EXPONENT = 20.0
MAX_RELATIVE_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """Per-token estimate of KL(policy || reference), same shape as the inputs, with d = logprobs - ref_logprobs.

    ``k1`` = d, unbiased, for the reward; ``k2`` = d²/2, for the loss (its gradient is the reverse KL's);
    ``k3`` = exp(-d) - 1 + d, unbiased and never negative, for watching. [v9 section 2.3; Schulman 2020]
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.exp((-d).clamp(-MAX_EXPONENT, MAX_EXPONENT)) - 1 + d
    raise ConfigError(f"unknown KL estimator {kind!r}: choose k1, k2 or k3.{nearest(kind, ['k1', 'k2', 'k3'])}")


def next_kl_coef(coef: float, kl: float, *, target: float | None, completions: int, horizon: float) -> float:
    """The coefficient for the next step: coef · (1 + clip(kl / target - 1, ±0.2) · completions / horizon).

    Args:
        coef: the coefficient of this step.
        kl: mean KL to the reference, measured in this step, in nats per token.
        target: the KL to be reached, in the same unit; None keeps the coefficient.
        completions: number of completions in this step.
        horizon: completions over which an error of one fifth changes the coefficient by about a fifth.
    """
    if target is None:
        return coef
    error = min(max(kl / target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return max(0.0, coef * (1 + error * completions / horizon))
