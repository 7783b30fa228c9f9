"""Win rates with ties and with length held equal, and what the prompts at hand leave open; numbers in, numbers out.

Suffixes of array names: ``P`` prompts, ``S`` samples of a prompt, ``N`` comparisons (P times S), ``R`` resamples.

The samples of one prompt resemble each other, so a resample draws whole prompts: the intervals tell what other prompts
of the same kind could have said (percentile bootstrap; Efron and Tibshirani 1993, chapter 13).
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
"""Percentiles of the resamples between which the 95 % interval lies."""
CHUNK_CELLS = 1 << 20
"""Comparisons of all resamples that are worked on at a time."""
RIDGE = 0.01
"""Weight of the penalty on squared parameters: next to nothing, but it keeps them finite where one side always wins."""
LONGEST_STEP = 2**-0.5
"""A Newton step of a logistic fit whose inputs are no longer than sqrt 2 can't overshoot if it is no longer than this:
the curvature changes by less than e along it (Bach 2010, Self-concordant analysis for logistic regression)."""
STEPS, CONVERGED = 100, 1e-10
FEWEST_DECIDED = 6
"""Prompts on which two models must differ before anything is shown: of five, all go one way in 1 of 16 cases by chance."""
ROUNDING = 1e-9


@dataclass(frozen=True)
class Rate:
    """The share of comparisons that B wins, a tie counting half, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def winner(self) -> Winner | None:
        """The model that the interval shows to be better, if it leaves out one half."""
        if self.low > 0.5 + ROUNDING:
            return "B"
        return "A" if self.high < 0.5 - ROUNDING else None


@dataclass(frozen=True)
class Outcome:
    """How two models compare.

    ``wins`` and ``losses`` are B's; ``decided`` is the number of prompts on which the two don't tie on the whole;
    ``longer`` and ``shorter`` are the shares of comparisons in which B's answer is longer or shorter than A's.
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
        """The better model, or None: no difference is shown."""
        return self.win_rate.winner if self.decided >= FEWEST_DECIDED else None

    @property
    def length_controlled_winner(self) -> Winner | None:
        """The better model at equal length, or None."""
        return self.length_controlled.winner if self.decided >= FEWEST_DECIDED else None


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
    """Compare sample by sample; ``margin`` is the largest difference of scores that is still a tie."""
    wins_PS = preferences(scores_a_PS, scores_b_PS, margin)
    gaps_PS = lengths_b_PS - lengths_a_PS
    terms_PS = length_terms(gaps_PS)

    def rates(weights_RP: Array) -> Array:
        return np.stack([win_rates(wins_PS, weights_RP), equal_length_rates(wins_PS, terms_PS, weights_RP)], axis=1)

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
    """1 where B's score is higher by more than ``margin``, 0 where A's is, one half else. -> (P, S)"""
    gaps_PS = scores_b_PS - scores_a_PS
    return np.where(np.abs(gaps_PS) <= margin, 0.5, (gaps_PS > 0).astype(np.float64))


def ratio_error(parts_P: Array, sizes_P: Array) -> float:
    """Standard error of sum(parts) / sum(sizes) over prompts, 0 for a single one.

    By linearisation: sqrt(P / (P - 1) · sum(part - ratio · size)²) / sum(sizes). [Cochran 1977, section 6.4]
    """
    number, whole = len(parts_P), sizes_P.sum()
    left_P = parts_P - parts_P.sum() / whole * sizes_P
    return float(np.sqrt(number / max(1, number - 1) * (left_P**2).sum()) / whole) if number > 1 else 0.0


# --- the bootstrap --------------------------------------------------------------------------------------------------


def resampled(rates: Callable[[Array], Array], shape: tuple[int, ...], resamples: int, seed: int) -> Array:
    """``rates`` of as many prompts as there are, drawn with replacement, ``resamples`` times. -> (R, ...)

    ``rates`` is given how often each prompt was drawn, (R, P), of a part of the resamples at a time; ``shape`` is (P, S).
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
    """The mean over prompts of the mean over samples, each prompt counting as often as it was drawn. -> (R,)"""
    return weights_RP @ wins_PS.mean(axis=1) / weights_RP.sum(axis=1)


def length_terms(gaps_PS: Array) -> Array:
    """tanh(gap / deviation of the gaps); not centred, so that 0 is equal length. All 0 where the gaps don't vary. -> (P, S)

    Lengths in characters, as in AlpacaEval: tokens of different tokenizers couldn't be compared.
    """
    deviation = gaps_PS.std(ddof=1) if gaps_PS.size > 1 else 0.0
    return np.tanh(gaps_PS / deviation) if deviation > 0 else np.zeros_like(gaps_PS)


def equal_length_rates(wins_PS: Array, terms_PS: Array, weights_RP: Array) -> Array:
    """What the win rate would be if both answers were of the same length. -> (R,)

    Fits P(B is preferred) = sigmoid(θ + φ · term) and reads it off where the term is 0: sigmoid(θ). This is the length
    control of AlpacaEval 2 for two models (Dubois et al. 2024, Length-Controlled AlpacaEval, arXiv:2404.04475, section 3)
    without its difficulty of instructions, which takes many models to estimate; a tie is a label of one half.
    """
    weights_RN = np.repeat(weights_RP, wins_PS.shape[1], axis=1)
    return _sigmoid(_fit(wins_PS.ravel(), terms_PS.ravel(), weights_RN)[:, 0])


def _fit(labels_N: Array, terms_N: Array, weights_RN: Array) -> Array:
    """θ and φ with the least weighted cross-entropy + RIDGE / 2 · (θ² + φ²), by Newton's method. -> (R, 2)"""
    fitted_R2 = np.zeros((len(weights_RN), 2))
    for _ in range(STEPS):
        chances_RN = _sigmoid(fitted_R2[:, :1] + fitted_R2[:, 1:] * terms_N)
        slopes_RN = weights_RN * (labels_N - chances_RN)
        curves_RN = weights_RN * chances_RN * (1 - chances_RN)
        slope_R2 = np.stack([slopes_RN.sum(axis=1), slopes_RN @ terms_N], axis=1) - RIDGE * fitted_R2
        own, mixed, other = curves_RN.sum(axis=1) + RIDGE, curves_RN @ terms_N, curves_RN @ terms_N**2 + RIDGE
        step_R2 = np.stack(
            [other * slope_R2[:, 0] - mixed * slope_R2[:, 1], own * slope_R2[:, 1] - mixed * slope_R2[:, 0]], axis=1
        ) / (own * other - mixed**2).reshape(-1, 1)
        size_R1 = np.linalg.norm(step_R2, axis=1, keepdims=True)
        fitted_R2 += step_R2 * np.minimum(1, LONGEST_STEP / np.maximum(size_R1, CONVERGED))
        if size_R1.max() < CONVERGED:
            break
    return fitted_R2


def _sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits))
