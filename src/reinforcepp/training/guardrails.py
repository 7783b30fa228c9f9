"""Guardrails: rules that skip an update, roll a run back or stop it before its weights are ruined.

unusable update      loss, gradient, reward or log-probability isn't finite, or a policy ratio exceeds ratio_limit:
skipped and counted; after max_skipped_updates in a row the run stops
KL over kl_limit     stop, or roll back to the last checkpoint at half the learning rate, depending on kl_action
collapse             length, entropy or variety of the completions is below a share of its first value for
PATIENCE_STEPS steps in a row: stop
unchanged weights    an optimizer step changes no weight: stop (see ``Learner.step``)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import TrainingDiverged, UnusableUpdate
from reinforcepp.runtime.terminal import echo

PATIENCE_STEPS = 5
MAX_ROLLBACKS = 3


class RollBack(Exception):
    """Asks the loop to restore the last checkpoint and continue at half the learning rate."""


@dataclass
class GuardState:
    """The state of the rules; part of a checkpoint."""

    in_a_row: int = 0
    """Updates skipped since the last one that was made."""
    at_first: dict[str, float] = field(default_factory=dict)
    """Metrics of the first step."""
    low: dict[str, int] = field(default_factory=dict)
    """Steps in a row for which each metric has been too low."""
    rollbacks: int = 0
    """Rollbacks so far."""


class Guardrails:
    """The rules with their settings; ``report`` records an event."""

    def __init__(self, config: ReinforceConfig, report: Callable[[str], None] = echo) -> None:
        self.config = config
        self.report = report
        self.state = GuardState()
        self.shares = {
            "completions/mean_length": ("length", config.collapse_length),
            "entropy": ("entropy", config.collapse_entropy),
            "completions/distinct_ratio": ("share of distinct completions", config.collapse_distinct),
        }

    def check_update(self, loss: float, log_ratio: float, norms: Mapping[str, float]) -> None:
        """Check the loss, the largest log-ratio and the gradient norms before an optimizer step.

        Raises:
            UnusableUpdate: one of them isn't usable.
        """
        if not math.isfinite(loss):
            raise UnusableUpdate(f"the loss is {loss}")
        for name, norm in norms.items():
            if not math.isfinite(norm):
                raise UnusableUpdate(f"the gradient of the {name} is {norm}")
        if self.config.ratio_limit and not log_ratio <= math.log(self.config.ratio_limit):
            raise UnusableUpdate(
                f"a token's policy ratio is e^{log_ratio:.1f}, over ratio_limit {self.config.ratio_limit:g}"
            )

    def skip(self, problem: UnusableUpdate, step: int) -> None:
        """Count and report a skipped update.

        Raises:
            TrainingDiverged: too many updates were skipped in a row.
        """
        self.state.in_a_row += 1
        limit, reason = self.config.max_skipped_updates, str(problem).rstrip(".")
        if self.state.in_a_row > limit:
            raise TrainingDiverged(
                f"Step {step}: {reason}. The {limit} updates before were skipped too. Lower learning_rate or raise "
                "kl_coef; if the reward isn't finite, fix the reward function."
            )
        self.report(f"Step {step}: skipped update ({reason}). {self.state.in_a_row} of {limit} allowed in a row.")

    def update_made(self) -> None:
        """Reset the count of skipped updates."""
        self.state.in_a_row = 0

    def check_step(self, metrics: Mapping[str, float]) -> None:
        """Check a step's metrics for divergence and collapse.

        Raises:
            TrainingDiverged: the run must stop.
            RollBack: the run must roll back.
        """
        step = int(metrics["step"])
        kl, limit = metrics.get("kl", 0.0), self.config.kl_limit
        if limit is not None and kl > limit:
            problem = f"Step {step}: KL to the reference policy is {kl:.3g} nats/token, over kl_limit {limit:g}"
            if self.config.kl_action == "stop" or self.state.rollbacks == MAX_ROLLBACKS:
                after = f" after {MAX_ROLLBACKS} rollbacks" if self.state.rollbacks else ""
                raise TrainingDiverged(f"{problem}{after}: training diverged. Lower learning_rate or raise kl_coef.")
            self.state.rollbacks += 1
            raise RollBack(problem)
        for name, (quantity, share) in self.shares.items():
            if name not in metrics:
                continue
            first = self.state.at_first.setdefault(name, metrics[name])
            self.state.low[name] = self.state.low.get(name, 0) + 1 if metrics[name] < share * first else 0
            if self.state.low[name] == PATIENCE_STEPS:
                raise TrainingDiverged(
                    f"Step {step}: {quantity} has been below {share:g} of its first value for {PATIENCE_STEPS} steps "
                    f"({metrics[name]:.3g} now, {first:.3g} at first): the policy collapsed. Lower learning_rate, raise kl_coef, "
                    "or check which completions the reward prefers."
                )

    def as_dict(self) -> dict[str, Any]:
        """Return the state, for a checkpoint."""
        return asdict(self.state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.state = GuardState(**state)
