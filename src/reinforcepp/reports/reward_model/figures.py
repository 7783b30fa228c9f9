"""What the scores of held-out pairs tell, as pure functions: order, length, calibration, worst errors.

A pair is right where the chosen answer has the higher score; a tie counts as half. Intervals are Wilson's, 95 %, and
take pairs as independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean

from reinforcepp.types import ScoredPair

CALIBRATION_BINS, PAIRS_PER_POINT = 10, 10
MARGIN_BUCKETS, LENGTH_BUCKETS, PAIRS_PER_BUCKET = 5, 4, 20
WORST = 20
LENGTH_LABELS = ("much shorter", "shorter", "about as long", "longer", "much longer")
Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Share:
    """A share of ``count`` cases, and the 95 % interval of what it would be of many more."""

    count: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bucket:
    """The pairs that have something in common, and the share of them that is right."""

    label: str
    right: Share


@dataclass(frozen=True)
class CalibrationBin:
    """The pairs of whose order the model is about equally sure, ``confidence`` on average."""

    confidence: float
    right: Share


@dataclass(frozen=True)
class RewardFigures:
    """Figures over ``pairs`` held-out pairs, as they stand in the card.

    ``accuracy`` is the share scored in the right order, a tie counting as half; ``longer_wins`` is the accuracy of
    guessing that the longer answer was chosen, in tokens. ``calibration_error`` is the expected gap between how sure
    the model is of an order (sigmoid of the margin) and how often it is right. ``length_correlation`` is Pearson's,
    of score and length over all answers.
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
    """All that the report shows.

    ``confidence`` is the mean over the pairs; ``longer`` and ``shorter`` are the shares that are right of the pairs
    whose chosen answer is the longer or the shorter one, None where there are none; ``rank_correlation`` is Spearman's,
    of score and length; ``without_length`` the accuracy of the scores less what a straight line in length explains.
    """

    figures: RewardFigures
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


def analyse(pairs: Sequence[ScoredPair]) -> Analysis:
    """Every figure, of at least one pair."""
    scores, lengths = answers_of(pairs)
    return Analysis(
        figures=summary(pairs),
        right=share_right(pairs),
        by_margin=by_margin(pairs),
        by_length_difference=by_length_difference(pairs),
        by_length=by_length(pairs),
        calibration=calibration([p.margin for p in pairs], PAIRS_PER_POINT),
        confidence=fmean(confidence(p.margin) for p in pairs),
        longer=_share_or_none([p for p in pairs if p.chosen_length > p.rejected_length]),
        shorter=_share_or_none([p for p in pairs if p.chosen_length < p.rejected_length]),
        rank_correlation=correlation(ranks(scores), ranks(lengths)),
        without_length=accuracy_without_length(pairs),
        worst=worst_errors(pairs),
    )


def summary(pairs: Sequence[ScoredPair]) -> RewardFigures:
    """The card's figures, of at least one pair."""
    margins = [p.margin for p in pairs]
    scores, lengths = answers_of(pairs)
    mean_score = fmean(scores)
    return RewardFigures(
        pairs=len(pairs),
        accuracy=fmean(map(rightness, margins)),
        ties=sum(m == 0 for m in margins),
        mean_margin=fmean(margins),
        calibration_error=calibration_error(margins),
        length_correlation=correlation(scores, lengths),
        longer_wins=fmean(rightness(p.chosen_length - p.rejected_length) for p in pairs),
        mean_score=mean_score,
        score_std=math.sqrt(fmean((s - mean_score) ** 2 for s in scores)),
    )


def answers_of(pairs: Sequence[ScoredPair]) -> tuple[list[float], list[float]]:
    """Scores and lengths of all answers, the chosen ones first."""
    scores = [p.chosen_score for p in pairs] + [p.rejected_score for p in pairs]
    lengths = [float(p.chosen_length) for p in pairs] + [float(p.rejected_length) for p in pairs]
    return scores, lengths


# --- how often it is right ------------------------------------------------------------------------------------------


def rightness(margin: float) -> float:
    """1 for a pair in the right order, 0 for one in the wrong order, a half for a tie."""
    return 0.5 if margin == 0 else float(margin > 0)


def share_right(pairs: Iterable[ScoredPair]) -> Share:
    """The share of the pairs, at least one, that is right."""
    right = [rightness(p.margin) for p in pairs]
    return share(sum(right), len(right))


def _share_or_none(pairs: Sequence[ScoredPair]) -> Share | None:
    return share_right(pairs) if pairs else None


def share(cases: float, count: int) -> Share:
    """``cases`` of ``count`` with Wilson's score interval (Wilson 1927), which holds for few cases, too."""
    value, z2 = cases / count, Z_95**2
    center = (value + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 / (1 + z2 / count) * math.sqrt(value * (1 - value) / count + z2 / (4 * count**2))
    # Of none or all, one end is the share itself but for rounding.
    return Share(count, value, max(0.0, min(value, center - half)), min(1.0, max(value, center + half)))


def difference(one: Share, other: Share) -> tuple[float, float]:
    """The 95 % interval of ``one`` less ``other``, made of their intervals (Newcombe 1998, method 10)."""
    gap = one.value - other.value
    low = gap - math.hypot(one.value - one.low, other.high - other.value)
    high = gap + math.hypot(one.high - one.value, other.value - other.low)
    return low, high


# --- in which pairs -------------------------------------------------------------------------------------------------


def by_margin(pairs: Sequence[ScoredPair]) -> list[Bucket]:
    """Buckets of about as many pairs each, from those the model hardly tells apart to those it is surest of."""
    return _by_quantile(
        pairs, lambda p: abs(p.margin), MARGIN_BUCKETS, lambda low, high: f"{_brief(low)} to {_brief(high)}"
    )


def _brief(margin: float) -> str:
    return f"{margin:.2g}" if 0 < margin < 0.1 else f"{margin:.2f}"


def by_length(pairs: Sequence[ScoredPair]) -> list[Bucket]:
    """Buckets of about as many pairs each, by the mean length of both answers in tokens."""
    mean = lambda p: (p.chosen_length + p.rejected_length) / 2  # noqa: E731
    return _by_quantile(pairs, mean, LENGTH_BUCKETS, lambda low, high: f"{low:g} to {high:g}")


def by_length_difference(pairs: Sequence[ScoredPair]) -> list[Bucket]:
    """Buckets by how long the chosen answer is beside the rejected one; empty ones are left out."""
    groups: dict[str, list[ScoredPair]] = {label: [] for label in LENGTH_LABELS}
    for pair in pairs:
        groups[length_label(pair.chosen_length, pair.rejected_length)].append(pair)
    return [Bucket(label, share_right(group)) for label, group in groups.items() if group]


def length_label(chosen: int, rejected: int) -> str:
    """How long ``chosen`` is beside ``rejected``: up to a tenth more is about as long, over half as much again is much."""
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
            label(min(values[i] for i in places), max(values[i] for i in places)), share_right(pairs[i] for i in places)
        )
        for places in quantiles(values, number)
    ]


def quantiles(values: Sequence[float], number: int) -> list[list[int]]:
    """The places of ``values``, smallest values first, in ``number`` parts of about equal size.

    Equal values stay in one part, whatever their order, so there may be fewer parts.
    """
    ordered = sorted(values)
    edges = sorted({ordered[math.ceil(len(ordered) * k / number) - 1] for k in range(1, number + 1)})
    parts: list[list[int]] = [[] for _ in edges]
    for place, value in enumerate(values):
        parts[next(i for i, edge in enumerate(edges) if value <= edge)].append(place)
    return parts


def worst_errors(pairs: Sequence[ScoredPair], number: int = WORST) -> list[ScoredPair]:
    """The pairs in the wrong order of which the model is surest, the worst first."""
    wrong = [p for p in pairs if p.margin < 0]
    return sorted(wrong, key=lambda p: (p.margin, p.row))[:number]


# --- how sure it is -------------------------------------------------------------------------------------------------


def confidence(margin: float) -> float:
    """How sure the model is of the order it gives a pair: sigmoid(abs(margin)), 0.5 to 1 (Bradley & Terry 1952)."""
    return 1 / (1 + math.exp(-min(abs(margin), 50.0)))


def calibration(margins: Sequence[float], least: int = 1) -> list[CalibrationBin]:
    """Confidence beside the share that is right, in bins of equal width over [0.5, 1], none of them empty.

    Neighbours are joined, from the least sure on, until each holds ``least`` margins, as far as there are so many: the
    share of two or three pairs says nothing.
    """
    bins: list[list[float]] = [[] for _ in range(CALIBRATION_BINS)]
    for margin in margins:
        place = int((confidence(margin) - 0.5) * 2 * CALIBRATION_BINS)
        bins[min(place, CALIBRATION_BINS - 1)].append(margin)
    joined: list[list[float]] = [[]]
    for held in bins:
        joined[-1] += held
        if len(joined[-1]) >= least:
            joined.append([])
    rest = joined.pop()
    if joined:
        joined[-1] += rest
    else:
        joined = [rest]
    return [
        CalibrationBin(fmean(map(confidence, held)), share(sum(map(rightness, held)), len(held))) for held in joined
    ]


def calibration_error(margins: Sequence[float]) -> float:
    """Count-weighted gap between confidence and accuracy over bins of equal width: the expected calibration error."""
    gaps = (b.right.count * abs(b.confidence - b.right.value) for b in calibration(margins))
    return sum(gaps) / len(margins)


# --- scores and lengths ---------------------------------------------------------------------------------------------


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side doesn't vary."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))
    return covariance / spread if spread else 0.0


def ranks(values: Sequence[float]) -> list[float]:
    """1 for the smallest value, and so on; equal values share the mean of their ranks, as Spearman's correlation asks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    found = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            found[place] = (start + 1 + end) / 2
        start = end
    return found


def length_slope(pairs: Sequence[ScoredPair]) -> float:
    """Score per token: the slope of the least-squares line through all answers; 0 where all are equally long."""
    scores, lengths = answers_of(pairs)
    mean_score, mean_length = fmean(scores), fmean(lengths)
    covariance = sum((n - mean_length) * (s - mean_score) for n, s in zip(lengths, scores, strict=True))
    spread = sum((n - mean_length) ** 2 for n in lengths)
    return covariance / spread if spread else 0.0


def accuracy_without_length(pairs: Sequence[ScoredPair]) -> float:
    """The accuracy of scores less what their regression on length says; a half for a model that sees only length."""
    slope = length_slope(pairs)

    def residual(pair: ScoredPair) -> float:
        explained = slope * (pair.chosen_length - pair.rejected_length)
        # Scores are float32: where nothing else is left, their rounding must not decide.
        return 0.0 if math.isclose(pair.margin, explained, rel_tol=1e-5, abs_tol=1e-9) else pair.margin - explained

    return fmean(rightness(residual(p)) for p in pairs)
