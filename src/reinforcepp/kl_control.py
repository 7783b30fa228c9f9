"""The adaptive KL coefficient of Ziegler et al. 2019 (arXiv:1909.08593), section 2.2."""

from __future__ import annotations

LARGEST_ERROR = 0.2


def adapted(coef: float, kl: float, *, target: float, completions: int, horizon: float) -> float:
    """The coefficient for the next step: coef · (1 + clip(kl / target - 1, ±0.2) · completions / horizon).

    Args:
        coef: the coefficient of this step.
        kl: mean KL to the reference, measured in this step, in nats per token.
        target: the KL to be reached, in the same unit.
        completions: number of completions in this step.
        horizon: completions over which an error of one fifth changes the coefficient by about a fifth.
    """
    error = min(max(kl / target - 1, -LARGEST_ERROR), LARGEST_ERROR)
    return max(0.0, coef * (1 + error * completions / horizon))
