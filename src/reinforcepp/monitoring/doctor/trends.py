"""Trends of a run's metrics: the beginning compared with the present, and which changes are significant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from reinforcepp.monitoring.metric_delta import Change, change_of

EARLY, LATE = (3, 20), (3, 50)  # minimum and maximum steps; within these bounds, a fifth of the run
MIN_STEPS = 8
"""Steps that a trend needs."""


@dataclass(frozen=True)
class Trend:
    """A metric at the beginning of a run and at its end, as means over a few steps."""

    early: float
    late: float

    @property
    def change(self) -> float:
        """``late - early``."""
        return self.late - self.early

    @property
    def factor(self) -> float:
        """``late / early``."""
        return self.late / self.early if self.early else math.inf if self.late else 1.0


def trend_of(metrics: Sequence[Mapping[str, float]], name: str) -> Trend | None:
    """Return the trend of a metric; None if the metric isn't logged or too few steps are done."""
    values = [m[name] for m in metrics if name in m]
    if len(values) < MIN_STEPS:
        return None
    return Trend(fmean(values[: _steps(len(values), EARLY)]), fmean(values[-_steps(len(values), LATE) :]))


def reward_rises(metrics: Sequence[Mapping[str, float]], completions: int) -> bool:
    """Return whether the training reward has risen by more than two standard errors of the rise."""
    reward, spread = trend_of(metrics, "reward"), trend_of(metrics, "reward_std")
    if reward is None or spread is None:
        return False
    steps = sum("reward" in m for m in metrics)
    counts = [completions * _steps(steps, window) for window in (EARLY, LATE)]
    error = math.sqrt(spread.early**2 / counts[0] + spread.late**2 / counts[1])
    return reward.change > 2 * error


def heldout_change(evaluations: Mapping[str, Mapping[str, float]], name: str) -> Change | None:
    """Return the change of a held-out mean from ``before`` to the end or, in a running training, to the last evaluation."""
    names = list(evaluations)
    if "before" not in names or len(names) < 2:
        return None
    return change_of(name, evaluations["before"], evaluations["after" if "after" in names else names[-1]])


def _steps(total: int, window: tuple[int, int]) -> int:
    lowest, highest = window
    return max(lowest, min(highest, total // 5))
