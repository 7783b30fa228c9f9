"""How far a run has come, beside the weights: the part of a checkpoint that is plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reinforcepp.errors import ConfigError, nearest


@dataclass
class RunState:
    """Changes with every step; each field is JSON."""

    step: int = 0
    """Finished training steps."""
    num_tokens: float = 0.0
    """Tokens of prompts and completions so far."""
    kl_coef: float = 0.0
    """The coefficient in force."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guardrails remember."""
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    """Figures of the evaluations so far."""
    best: dict[str, Any] = field(default_factory=dict)
    """The best checkpoint so far: its name, and the value of the metric."""
    random: dict[str, Any] = field(default_factory=dict)
    """The global random generators at the beginning of the unfinished step."""


def better(best: dict[str, Any], metric: str | None, metrics: Mapping[str, float], checkpoint: str) -> dict[str, Any]:
    """The better one of the best checkpoint so far and a new one, by a metric that keep_best names.

    Raises:
        ConfigError: if the run doesn't measure that metric.
    """
    if metric is None:
        return best
    sign, name = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    if name not in metrics:
        if metrics.get("skipped_updates"):
            return best
        raise ConfigError(f"keep_best names {name!r}, which is not among the metrics.{nearest(name, metrics)}")
    value = metrics[name]
    if best and sign * best["value"] >= sign * value:
        return best
    return {"metric": metric, "value": value, "checkpoint": checkpoint}
