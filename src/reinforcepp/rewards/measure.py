"""How good a reward model is on pairs it never saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.tokens import encode_answer
from reinforcepp.types import Preference

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class RewardFigures:
    """Figures over ``pairs`` held-out pairs.

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


def measure(reward: TrainedReward, pairs: Sequence[Preference]) -> RewardFigures:
    """Score both answers of every pair and sum up; needs at least one pair."""
    chosen_rows = [encode_answer(reward.tokenizer, p.prompt, p.chosen) for p in pairs]
    rejected_rows = [encode_answer(reward.tokenizer, p.prompt, p.rejected) for p in pairs]
    chosen, rejected = reward.score_rows(chosen_rows), reward.score_rows(rejected_rows)
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    lengths = [float(len(row)) for row in chosen_rows + rejected_rows]
    scores = chosen + rejected
    mean_score = fmean(scores)
    return RewardFigures(
        pairs=len(pairs),
        accuracy=fmean(_order(m) for m in margins),
        ties=sum(m == 0 for m in margins),
        mean_margin=fmean(margins),
        calibration_error=calibration_error(margins),
        length_correlation=correlation(scores, lengths),
        longer_wins=fmean(_order(len(a) - len(b)) for a, b in zip(chosen_rows, rejected_rows, strict=True)),
        mean_score=mean_score,
        score_std=math.sqrt(fmean((s - mean_score) ** 2 for s in scores)),
    )


def _order(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def calibration_error(margins: Sequence[float]) -> float:
    """Count-weighted gap between confidence and accuracy over bins of confidence in [0.5, 1]."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(CALIBRATION_BINS)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 50.0)))
        place = min(int((confidence - 0.5) * 2 * CALIBRATION_BINS), CALIBRATION_BINS - 1)
        bins[place].append((confidence, _order(margin)))
    gaps = (len(b) * abs(fmean(c for c, _ in b) - fmean(right for _, right in b)) for b in bins if b)
    return sum(gaps) / len(margins)


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side doesn't vary."""
    mean_x, mean_y = fmean(xs), fmean(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    spread = math.sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))
    return covariance / spread if spread else 0.0
