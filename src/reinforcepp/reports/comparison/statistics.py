"""Win rates with ties, length-controlled win rates, and their intervals; numbers in, numbers out.

Suffixes of array names: ``P`` prompts, ``S`` samples of a prompt, ``N`` comparisons (P times S), ``R`` resamples.

Samples of one prompt are correlated, so a resample draws whole prompts: the intervals cover other prompts of the same kind
(percentile bootstrap; Efron and Tibshirani 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Winner = Literal["A", "B"]

TAILS = (2.5, 97.5)
"""Percentiles of the resamples that bound the 95% interval."""
CHUNK_CELLS = 1 << 20
"""Comparisons over all resamples that are processed at once, to bound memory."""
RIDGE = 0.01
"""Weight of the penalty on squared parameters: tiny, but it keeps them finite if one side always wins."""
MAX_STEP_NORM = 2**-0.5
"""A Newton step of a logistic fit whose inputs have norm at most sqrt(2) can't overshoot if its norm is at most this value:
the curvature changes by less than a factor e along it (Bach 2010, Self-concordant analysis for logistic regression)."""
MAX_ITERATIONS, TOLERANCE = 100, 1e-10
MIN_DECIDED = 6
"""Prompts on which two models must differ for a verdict: with five, all favor one side in 1 of 16 cases by chance."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rate:
    """The share of comparisons that B wins, a tie counting as half, with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def winner(self) -> Winner | None:
        """Better model if the interval excludes 0.5, otherwise None."""
        if self.low > 0.5 + ROUNDING:
            return "B"
        return "A" if self.high < 0.5 - ROUNDING else None


@dataclass(frozen=True)
class Outcome:
    """The result of comparing two models.

    ``wins`` and ``losses`` are those of B. ``decided`` is the number of prompts that don't tie over all their samples.
    ``longer`` and ``shorter`` are the shares of comparisons in which B's response is longer or shorter than A's.
    """

    prompts: int
    wins: int
    ties: int
    losses: int
    decided: int
    win_rate: Rate
    length_controlled: Rate
    longer: float
    shorter: float

    @property
    def winner(self) -> Winner | None:
        """Better model, or None if the comparison is inconclusive."""
        return self.win_rate.winner if self.decided >= MIN_DECIDED else None

    @property
    def length_controlled_winner(self) -> Winner | None:
        """Better model at equal length, or None if the comparison is inconclusive."""
        return self.length_controlled.winner if self.decided >= MIN_DECIDED else None


def compare(
    scores_a_PS: Array,
    scores_b_PS: Array,
    lengths_a_PS: Array,
    lengths_b_PS: Array,
    *,
    margin: float,
    resamples: int,
    seed: int,
) -> Outcome:
    """Compare two models sample by sample; ``margin`` is the largest score difference of a tie."""
    wins_PS = preferences(scores_a_PS, scores_b_PS, margin)
    gaps_PS = lengths_b_PS - lengths_a_PS
    terms_PS = length_terms(gaps_PS)

    def rates(weights_RP: Array) -> Array:
        return np.stack(
            [win_rates(wins_PS, weights_RP), length_controlled_rates(wins_PS, terms_PS, weights_RP)], axis=1
        )

    whole = rates(np.ones((1, len(wins_PS))))[0]
    low, high = np.percentile(resampled(rates, wins_PS.shape, resamples, seed), TAILS, axis=0)
    raw, controlled = (Rate(*map(float, numbers)) for numbers in zip(whole, low, high, strict=True))
    return Outcome(
        prompts=len(wins_PS),
        wins=int((wins_PS == 1).sum()),
        ties=int((wins_PS == 0.5).sum()),
        losses=int((wins_PS == 0).sum()),
        decided=int((wins_PS.sum(axis=1) != wins_PS.shape[1] / 2).sum()),
        win_rate=raw,
        length_controlled=controlled,
        longer=float((gaps_PS > 0).mean()),
        shorter=float((gaps_PS < 0).mean()),
    )


def preferences(scores_a_PS: Array, scores_b_PS: Array, margin: float) -> Array:
    """Return 1 if B's score is higher by more than ``margin``, 0 if A's is, otherwise 0.5. -> (P, S)"""
    gaps_PS = scores_b_PS - scores_a_PS
    return np.where(np.abs(gaps_PS) <= margin, 0.5, (gaps_PS > 0).astype(np.float64))


def ratio_error(parts_P: Array, sizes_P: Array) -> float:
    """Return the standard error of sum(parts) / sum(sizes) over prompts, 0 for a single prompt.

    By linearization: sqrt(P / (P - 1) · sum(part - ratio · size)²) / sum(sizes). [Cochran 1977, section 6.4]
    """
    prompts, total = len(parts_P), sizes_P.sum()
    residual_P = parts_P - parts_P.sum() / total * sizes_P
    return float(np.sqrt(prompts / max(1, prompts - 1) * (residual_P**2).sum()) / total) if prompts > 1 else 0.0


# --- the bootstrap --------------------------------------------------------------------------------------------------


def resampled(rates: Callable[[Array], Array], shape: tuple[int, ...], resamples: int, seed: int) -> Array:
    """Return ``rates`` for ``resamples`` draws of P prompts with replacement. -> (R, ...)

    ``rates`` receives how often each prompt was drawn, (R, P), for a chunk of the resamples; ``shape`` is (P, S).
    """
    draw = np.random.default_rng(seed)
    prompts, samples = shape
    rows = max(1, CHUNK_CELLS // (prompts * samples))
    parts = []
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        parts.append(rates(draw.multinomial(prompts, np.full(prompts, 1 / prompts), size=size).astype(np.float64)))
    return np.concatenate(parts)


# --- the two rates --------------------------------------------------------------------------------------------------


def win_rates(wins_PS: Array, weights_RP: Array) -> Array:
    """Return the mean over prompts of the mean over samples, prompts weighted by their draws. -> (R,)"""
    return weights_RP @ wins_PS.mean(axis=1) / weights_RP.sum(axis=1)


def length_terms(gaps_PS: Array) -> Array:
    """Return tanh(gap / standard deviation of the gaps), all 0 if the gaps don't vary. -> (P, S)

    The gaps aren't centered, so that 0 means equal length. Lengths are in characters, as in AlpacaEval, because token counts
    of different tokenizers aren't comparable.
    """
    deviation = gaps_PS.std(ddof=1) if gaps_PS.size > 1 else 0.0
    return np.tanh(gaps_PS / deviation) if deviation > 0 else np.zeros_like(gaps_PS)


def length_controlled_rates(wins_PS: Array, terms_PS: Array, weights_RP: Array) -> Array:
    """Return the predicted win rate for responses of equal length. -> (R,)

    Fits P(B is preferred) = sigmoid(θ + φ · term) and evaluates it at term 0: sigmoid(θ). This is the length control of
    AlpacaEval 2 for two models (Dubois et al. 2024, Length-Controlled AlpacaEval, arXiv:2404.04475, section 3) without its
    difficulty of instructions, which needs many models to estimate. A tie has the label 0.5.
    """
    weights_RN = np.repeat(weights_RP, wins_PS.shape[1], axis=1)
    return _sigmoid(_fit(wins_PS.ravel(), terms_PS.ravel(), weights_RN)[:, 0])


def _fit(labels_N: Array, terms_N: Array, weights_RN: Array) -> Array:
    """Return θ and φ that minimize weighted cross-entropy + RIDGE / 2 · (θ² + φ²), by Newton's method. -> (R, 2)"""
    fitted_R2 = np.zeros((len(weights_RN), 2))
    for _ in range(MAX_ITERATIONS):
        chances_RN = _sigmoid(fitted_R2[:, :1] + fitted_R2[:, 1:] * terms_N)
        slopes_RN = weights_RN * (labels_N - chances_RN)
        curves_RN = weights_RN * chances_RN * (1 - chances_RN)
        slope_R2 = np.stack([slopes_RN.sum(axis=1), slopes_RN @ terms_N], axis=1) - RIDGE * fitted_R2
        theta, mixed, phi = curves_RN.sum(axis=1) + RIDGE, curves_RN @ terms_N, curves_RN @ terms_N**2 + RIDGE
        step_R2 = np.stack(
            [phi * slope_R2[:, 0] - mixed * slope_R2[:, 1], theta * slope_R2[:, 1] - mixed * slope_R2[:, 0]], axis=1
        ) / (theta * phi - mixed**2).reshape(-1, 1)
        size_R1 = np.linalg.norm(step_R2, axis=1, keepdims=True)
        fitted_R2 += step_R2 * np.minimum(1, MAX_STEP_NORM / np.maximum(size_R1, TOLERANCE))
        if size_R1.max() < TOLERANCE:
            break
    return fitted_R2


def _sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))
