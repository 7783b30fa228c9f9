"""KL estimates per token, and the adaptive KL coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from reinforcepp.errors import ConfigError, nearest

KlKind = Literal["k1", "k2", "k3"]

MAX_EXPONENT = 20.0
"""Bound on exponents, so that no ratio or gradient overflows."""
MAX_RELATIVE_ERROR = 0.2


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KlKind) -> Tensor:
    """Return a per-token estimate of KL(policy || reference) from d = logprobs - ref_logprobs. -> shape of the inputs

    ``k1`` = d: unbiased, for the reward. ``k2`` = d² / 2: for the loss, because its gradient is that of the reverse KL.
    ``k3`` = exp(-d) - 1 + d: unbiased and never negative, for metrics.
    [arXiv 2501.03262v9 section 2.3; Schulman 2020, "Approximating KL Divergence"]

    Raises:
        ConfigError: ``kind`` isn't one of these.
    """
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.exp((-d).clamp(-MAX_EXPONENT, MAX_EXPONENT)) - 1 + d
    raise ConfigError(f"KL estimator: {kind!r} isn't valid. Choose k1, k2 or k3.{nearest(kind, ['k1', 'k2', 'k3'])}")


def next_kl_coef(coef: float, kl: float, *, target: float | None, completions: int, horizon: float) -> float:
    """Return the next step's coefficient, coef · (1 + clip(kl / target - 1, ±0.2) · completions / horizon), at least 0.

    [Ziegler et al., arXiv 1909.08593 section 2.2]

    Args:
        coef: coefficient of this step.
        kl: mean KL to the reference policy in this step, in nats/token.
        target: target KL, in nats/token; None keeps the coefficient.
        completions: number of completions in this step.
        horizon: number of completions after which a relative error of 0.2 has changed the coefficient by about 20%.
    """
    if target is None:
        return coef
    error = min(max(kl / target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return max(0.0, coef * (1 + error * completions / horizon))
