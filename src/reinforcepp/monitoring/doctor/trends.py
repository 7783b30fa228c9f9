"""How a training's figures are read: its beginning against its present, and what is more than chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from reinforcepp.monitoring.metric_delta import Change, change_of

EARLY, LATE = (3, 20), (3, 50)  # steps, at least and at most; between them a fifth of the run
FEWEST = 8
"""Steps before anything is said about a course."""


@dataclass(frozen=True)
class Course:
    """What a metric was at the beginning of a run and is at its end, as means over a few steps."""

    early: float
    late: float

    @property
    def change(self) -> float:
        """How much it has risen."""
        return self.late - self.early

    @property
    def factor(self) -> float:
        """By how much it has been multiplied."""
        return self.late / self.early if self.early else math.inf if self.late else 1.0


def course(metrics: Sequence[Mapping[str, float]], name: str) -> Course | None:
    """The course of a metric; None where it isn't measured, or too few steps are done to tell."""
    values = [m[name] for m in metrics if name in m]
    if len(values) < FEWEST:
        return None
    return Course(fmean(values[: _steps(len(values), EARLY)]), fmean(values[-_steps(len(values), LATE) :]))


def surely_rises(metrics: Sequence[Mapping[str, float]], completions: int) -> bool:
    """Whether the training reward has risen by more than twice the standard error of the rise."""
    reward, spread = course(metrics, "reward"), course(metrics, "reward_std")
    if reward is None or spread is None:
        return False
    steps = sum("reward" in m for m in metrics)
    counted = [completions * _steps(steps, window) for window in (EARLY, LATE)]
    error = math.sqrt(spread.early**2 / counted[0] + spread.late**2 / counted[1])
    return reward.change > 2 * error


def since_start(evaluations: Mapping[str, Mapping[str, float]], name: str) -> Change | None:
    """What became of a held-out mean since ``before``: until the end or, while the training runs, the last evaluation."""
    names = list(evaluations)
    if "before" not in names or len(names) < 2:
        return None
    return change_of(name, evaluations["before"], evaluations["after" if "after" in names else names[-1]])


def _steps(total: int, window: tuple[int, int]) -> int:
    least, most = window
    return max(least, min(most, total // 5))
