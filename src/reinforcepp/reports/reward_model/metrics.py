"""Metrics of a reward model over held-out pairs, as pure functions: accuracy, length, calibration, worst errors.

A pair is right if the chosen response has the higher score; a tie counts as half. Intervals are Wilson's, 95%, and assume
independent pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from reinforcepp.reports.numbers import correlation
from reinforcepp.types import ScoredPair

CALIBRATION_BINS, PAIRS_PER_POINT = 10, 10
MARGIN_BUCKETS, LENGTH_BUCKETS, PAIRS_PER_BUCKET = 5, 4, 20
WORST = 20
LENGTH_LABELS = ("much shorter", "shorter", "about as long", "longer", "much longer")
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Share:
    """A share of ``count`` cases with its 95% interval."""

    count: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bucket:
    """Pairs with a common property, and the share of them that is right."""

    label: str
    right: Share


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs with about equal confidence, ``confidence`` on average."""

    confidence: float
    right: Share


@dataclass(frozen=True)
class RewardMetrics:
    """Metrics over ``pairs`` held-out pairs, as in the card.

    ``accuracy`` is the share of pairs in the right order, a tie counting as half; ``longer_wins`` is the length-only
    baseline, the accuracy of choosing the response with more tokens. ``calibration_error`` is the expected gap between
    confidence (sigmoid of the absolute margin) and accuracy. ``length_correlation`` is Pearson's correlation of score and
    length over all responses.
    """

    pairs: int
    accuracy: float
    ties: int
    mean_margin: float
    calibration_error: float
    length_correlation: float
    longer_wins: float
    mean_score: float
    score_std: float


@dataclass(frozen=True)
class Analysis:
    """Everything that the report shows.

    ``confidence`` is the mean over the pairs. ``longer`` and ``shorter`` are the accuracies on pairs whose chosen response
    is the longer or the shorter one, None if there are no such pairs. ``rank_correlation`` is Spearman's correlation of
    score and length. ``without_length`` is the accuracy after subtracting the linear regression of the score on length.
    """

    metrics: RewardMetrics
    right: Share
    by_margin: list[Bucket]
    by_length_difference: list[Bucket]
    by_length: list[Bucket]
    calibration: list[CalibrationBin]
    confidence: float
    longer: Share | None
    shorter: Share | None
    rank_correlation: float
    without_length: float
    worst: list[ScoredPair]


def analyze(pairs: Sequence[ScoredPair]) -> Analysis:
    """Return all metrics of at least one pair."""
    scores, lengths = all_responses(pairs)
    return Analysis(
        metrics=summary(pairs),
        right=share_right(pairs),
        by_margin=by_margin(pairs),
        by_length_difference=by_length_difference(pairs),
        by_length=by_length(pairs),
        calibration=calibration([p.margin for p in pairs], PAIRS_PER_POINT),
        confidence=fmean(confidence(p.margin) for p in pairs),
        longer=_share_or_none([p for p in pairs if p.chosen_length > p.rejected_length]),
        shorter=_share_or_none([p for p in pairs if p.chosen_length < p.rejected_length]),
        rank_correlation=correlation(ranks(scores), ranks(lengths)) or 0.0,
        without_length=accuracy_without_length(pairs),
        worst=worst_errors(pairs),
    )


def by_criterion(pairs: Sequence[ScoredPair]) -> dict[str, list[ScoredPair]]:
    """Return the pairs of each criterion, in the order of the first pairs; a model with one output has the criterion ""."""
    found: dict[str, list[ScoredPair]] = {}
    for pair in pairs:
        found.setdefault(pair.criterion, []).append(pair)
    return found


def analyze_by_criterion(pairs: Sequence[ScoredPair]) -> dict[str, Analysis]:
    """Return all metrics by criterion."""
    return {criterion: analyze(group) for criterion, group in by_criterion(pairs).items()}


def summary(pairs: Sequence[ScoredPair]) -> RewardMetrics:
    """Return the card's metrics of at least one pair."""
    margins = [p.margin for p in pairs]
    scores, lengths = all_responses(pairs)
    mean_score = fmean(scores)
    return RewardMetrics(
        pairs=len(pairs),
        accuracy=fmean(map(correctness, margins)),
        ties=sum(m == 0 for m in margins),
        mean_margin=fmean(margins),
        calibration_error=calibration_error(margins),
        length_correlation=correlation(scores, lengths) or 0.0,
        longer_wins=fmean(correctness(p.chosen_length - p.rejected_length) for p in pairs),
        mean_score=mean_score,
        score_std=math.sqrt(fmean((s - mean_score) ** 2 for s in scores)),
    )


def all_responses(pairs: Sequence[ScoredPair]) -> tuple[list[float], list[float]]:
    """Return scores and lengths of all responses, the chosen ones first."""
    scores = [p.chosen_score for p in pairs] + [p.rejected_score for p in pairs]
    lengths = [float(p.chosen_length) for p in pairs] + [float(p.rejected_length) for p in pairs]
    return scores, lengths


# --- accuracy --------------------------------------------------------------------------------------------------------


def correctness(margin: float) -> float:
    """Return 1 for a pair in the right order, 0 for the wrong order, and 0.5 for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def share_right(pairs: Iterable[ScoredPair]) -> Share:
    """Return the share of at least one pair that is right."""
    right = [correctness(p.margin) for p in pairs]
    return share(sum(right), len(right))


def _share_or_none(pairs: Sequence[ScoredPair]) -> Share | None:
    return share_right(pairs) if pairs else None


def share(cases: float, count: int) -> Share:
    """Return ``cases`` / ``count`` with Wilson's score interval (Wilson 1927), which is valid for few cases, too."""
    value, z2 = cases / count, Z_95**2
    center = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(value * (1 - value) / count + z2 / (4 * count**2))
    # At 0 and at 1, one end equals the share up to rounding, so it is clamped.
    return Share(count, value, max(0.0, min(value, center - half)), min(1.0, max(value, center + half)))


def difference(one: Share, other: Share) -> tuple[float, float]:
    """Return the 95% interval of ``one - other`` from their intervals (Newcombe 1998, method 10)."""
    gap = one.value - other.value
    low = gap - math.hypot(one.value - one.low, other.high - other.value)
    high = gap + math.hypot(one.high - one.value, other.value - other.low)
    return low, high


# --- accuracy by property -------------------------------------------------------------------------------------------


def by_margin(pairs: Sequence[ScoredPair]) -> list[Bucket]:
    """Return buckets of about equal size, from the smallest to the largest absolute margin."""
    return _by_quantile(
        pairs, lambda p: abs(p.margin), MARGIN_BUCKETS, lambda low, high: f"{_brief(low)} to {_brief(high)}"
    )


def _brief(margin: float) -> str:
    return f"{margin:.2g}" if 0 < margin < 0.1 else f"{margin:.2f}"


def by_length(pairs: Sequence[ScoredPair]) -> list[Bucket]:
    """Return buckets of about equal size, by the mean length of both responses in tokens."""
    mean = lambda p: (p.chosen_length + p.rejected_length) / 2  # noqa: E731
    return _by_quantile(pairs, mean, LENGTH_BUCKETS, lambda low, high: f"{low:g} to {high:g}")


def by_length_difference(pairs: Sequence[ScoredPair]) -> list[Bucket]:
    """Return buckets by the length of the chosen relative to the rejected response, without empty buckets."""
    groups: dict[str, list[ScoredPair]] = {label: [] for label in LENGTH_LABELS}
    for pair in pairs:
        groups[length_label(pair.chosen_length, pair.rejected_length)].append(pair)
    return [Bucket(label, share_right(group)) for label, group in groups.items() if group]


def length_label(chosen: int, rejected: int) -> str:
    """Return the length of ``chosen`` relative to ``rejected``: within 10% is about as long, beyond 50% is much longer."""
    less, more = sorted((chosen, rejected))
    if 10 * more <= 11 * less:
        return "about as long"
    word = "longer" if chosen > rejected else "shorter"
    return f"much {word}" if 2 * more > 3 * less else word


def _by_quantile(
    pairs: Sequence[ScoredPair],
    key: Callable[[ScoredPair], float],
    most: int,
    label: Callable[[float, float], str],
) -> list[Bucket]:
    values = [key(p) for p in pairs]
    number = max(1, min(most, len(pairs) // PAIRS_PER_BUCKET))
    return [
        Bucket(
            label(min(values[i] for i in indices), max(values[i] for i in indices)),
            share_right(pairs[i] for i in indices),
        )
        for indices in quantiles(values, number)
    ]


def quantiles(values: Sequence[float], number: int) -> list[list[int]]:
    """Return the indices of ``values``, smallest values first, in ``number`` parts of about equal size.

    Equal values stay in one part, so there can be fewer parts.
    """
    ordered = sorted(values)
    edges = sorted({ordered[math.ceil(len(ordered) * k / number) - 1] for k in range(1, number + 1)})
    parts: list[list[int]] = [[] for _ in edges]
    for index, value in enumerate(values):
        parts[next(i for i, edge in enumerate(edges) if value <= edge)].append(index)
    return parts


def worst_errors(pairs: Sequence[ScoredPair], number: int = WORST) -> list[ScoredPair]:
    """Return the pairs in the wrong order with the largest margins, the worst first."""
    wrong = [p for p in pairs if p.margin < 0]
    return sorted(wrong, key=lambda p: (p.margin, p.row))[:number]


# --- calibration ----------------------------------------------------------------------------------------------------


def confidence(margin: float) -> float:
    """Return the model's confidence in its order of a pair: sigmoid(abs(margin)), 0.5 to 1 (Bradley & Terry 1952)."""
    return 1 / (1 + math.exp(-min(abs(margin), 50.0)))


def calibration(margins: Sequence[float], least: int = 1) -> list[CalibrationBin]:
    """Return confidence and accuracy in non-empty bins of equal width over [0.5, 1].

    Neighboring bins are merged, starting at the lowest confidence, until each holds ``least`` margins if there are that
    many, because the accuracy on two or three pairs means nothing.
    """
    bins: list[list[float]] = [[] for _ in range(CALIBRATION_BINS)]
    for margin in margins:
        index = int((confidence(margin) - 0.5) * 2 * CALIBRATION_BINS)
        bins[min(index, CALIBRATION_BINS - 1)].append(margin)
    joined: list[list[float]] = [[]]
    for margins_in_bin in bins:
        joined[-1] += margins_in_bin
        if len(joined[-1]) >= least:
            joined.append([])
    rest = joined.pop()
    if joined:
        joined[-1] += rest
    else:
        joined = [rest]
    return [
        CalibrationBin(fmean(map(confidence, group)), share(sum(map(correctness, group)), len(group)))
        for group in joined
    ]


def calibration_error(margins: Sequence[float]) -> float:
    """Return the expected calibration error: the count-weighted gap between confidence and accuracy over equal bins."""
    gaps = (b.right.count * abs(b.confidence - b.right.value) for b in calibration(margins))
    return sum(gaps) / len(margins)


# --- scores and lengths ---------------------------------------------------------------------------------------------


def ranks(values: Sequence[float]) -> list[float]:
    """Return ranks starting at 1; equal values share the mean of their ranks, as Spearman's correlation requires."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            found[index] = (start + 1 + end) / 2
        start = end
    return found


def length_slope(pairs: Sequence[ScoredPair]) -> float:
    """Return score per token: the slope of the least-squares line through all responses, 0 if all lengths are equal."""
    scores, lengths = all_responses(pairs)
    mean_score, mean_length = fmean(scores), fmean(lengths)
    covariance = sum((n - mean_length) * (s - mean_score) for n, s in zip(lengths, scores, strict=True))
    spread = sum((n - mean_length) ** 2 for n in lengths)
    return covariance / spread if spread else 0.0


def accuracy_without_length(pairs: Sequence[ScoredPair]) -> float:
    """Return the accuracy after subtracting the regression of scores on length; 0.5 for a model that sees only length."""
    slope = length_slope(pairs)

    def residual(pair: ScoredPair) -> float:
        explained = slope * (pair.chosen_length - pair.rejected_length)
        # Scores are float32: if length explains the whole margin, rounding must not decide.
        return 0.0 if math.isclose(pair.margin, explained, rel_tol=1e-5, abs_tol=1e-9) else pair.margin - explained

    return fmean(correctness(residual(p)) for p in pairs)
