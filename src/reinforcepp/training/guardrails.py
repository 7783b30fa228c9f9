"""Rules that stop a run, or leave an update out, before it goes where it can't come back from.

update not usable        loss, gradient, reward or log-probability not finite; a policy ratio over ratio_limit
-> left out and counted; after max_skipped_updates in a row the run stops
KL over kl_limit         -> stop, or back to the last checkpoint at half the learning rate, as kl_action says
collapse                 length, entropy or variety of the completions below a share of what they were at first,
for PATIENCE steps in a row -> stop
weights that stay        an optimiser step that changes nothing -> stop
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.errors import TrainingDiverged, UnusableUpdate
from reinforcepp.monitoring import echo

PATIENCE = 5
MOST_ROLLBACKS = 3


class RollBack(Exception):
    """The run is to go back to its last checkpoint and on with smaller steps."""


@dataclass
class GuardState:
    """What the rules remember; part of a checkpoint."""

    in_a_row: int = 0
    """Updates left out since the last one that was made."""
    at_first: dict[str, float] = field(default_factory=dict)
    """Figures of the first step."""
    low: dict[str, int] = field(default_factory=dict)
    """For each figure, steps in a row for which it has been too low."""
    rollbacks: int = 0


class Guardrails:
    """The rules with their settings."""

    def __init__(self, config: ReinforceConfig, tell: Callable[[str], None] = echo) -> None:
        self.config = config
        self.tell = tell
        self.state = GuardState()
        self.shares = {
            "completions/mean_length": ("length", config.collapse_length),
            "entropy": ("entropy", config.collapse_entropy),
            "completions/distinct_ratio": ("share of distinct completions", config.collapse_distinct),
        }

    def check_update(self, loss: float, log_ratio: float, norms: Mapping[str, float]) -> None:
        """Before an optimiser step: are its loss, its largest log-ratio and its gradients usable?

        Raises:
            UnusableUpdate: if not.
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
        """Count an update that is not made.

        Raises:
            TrainingDiverged: if there were too many in a row.
        """
        self.state.in_a_row += 1
        limit = self.config.max_skipped_updates
        if self.state.in_a_row > limit:
            raise TrainingDiverged(
                f"Step {step}: {problem}, and the {limit} updates before could not be used either. Lower learning_rate or raise "
                "kl_coef; if it is the reward that isn't finite, mend the reward function."
            )
        self.tell(f"Step {step}: {problem}; this update is left out ({self.state.in_a_row} in a row, {limit} allowed).")

    def update_made(self) -> None:
        """An update was made."""
        self.state.in_a_row = 0

    def check_step(self, metrics: Mapping[str, float]) -> None:
        """After a step: has the policy run off or collapsed?

        Raises:
            TrainingDiverged: if the run is to stop.
            RollBack: if it is to go back.
        """
        step = int(metrics["step"])
        kl, limit = metrics.get("kl", 0.0), self.config.kl_limit
        if limit is not None and kl > limit:
            told = f"The KL to the start is {kl:.3g} nats per token in step {step}, over kl_limit {limit:g}"
            if self.config.kl_action == "stop" or self.state.rollbacks == MOST_ROLLBACKS:
                often = f", after going back {MOST_ROLLBACKS} times" if self.state.rollbacks else ""
                raise TrainingDiverged(f"{told}{often}: the policy has run off. Lower learning_rate or raise kl_coef.")
            self.state.rollbacks += 1
            raise RollBack(told)
        for name, (what, share) in self.shares.items():
            if name not in metrics:
                continue
            first = self.state.at_first.setdefault(name, metrics[name])
            self.state.low[name] = self.state.low.get(name, 0) + 1 if metrics[name] < share * first else 0
            if self.state.low[name] == PATIENCE:
                raise TrainingDiverged(
                    f"The {what} has been below {share:g} of its first value for {PATIENCE} steps ({metrics[name]:.3g} now, "
                    f"{first:.3g} at first, step {step}): the policy has collapsed. Lower learning_rate, raise kl_coef, or look "
                    "at what the reward favours."
                )

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self.state)

    def load(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint."""
        self.state = GuardState(**state)
