"""The change of a mean over held-out prompts: the one significance rule that the command line and the report share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal["improved", "regressed", "inconclusive"]


@dataclass(frozen=True)
class Change:
    """A mean before and after. ``error`` is the standard error of the difference of two independent means."""

    name: str
    before: float
    after: float
    error: float

    @property
    def gain(self) -> float:
        """``after - before``."""
        return self.after - self.before

    @property
    def outcome(self) -> Outcome:
        """Direction of a gain of more than two standard errors; a smaller one may be chance."""
        if abs(self.gain) <= 2 * self.error:
            return "inconclusive"
        return "improved" if self.gain > 0 else "regressed"

    @property
    def interval(self) -> str:
        """``+2.431 ± 0.512``, the gain and two standard errors."""
        return f"{self.gain:+.3f} ± {2 * self.error:.3f}"

    def __str__(self) -> str:
        """``reward -0.121 -> +2.310 (+2.431 ± 0.512: improved)``."""
        return f"{self.name} {self.before:+.3f} -> {self.after:+.3f} ({self.interval}: {self.outcome})"


def change_of(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> Change | None:
    """Return the change of the mean ``name`` between two evaluations; None if one of them lacks it.

    Its standard error comes from ``{name}_error`` of both evaluations.
    """
    if name not in before or name not in after:
        return None
    errors = [metrics.get(f"{name}_error", 0.0) for metrics in (before, after)]
    return Change(name, before[name], after[name], (errors[0] ** 2 + errors[1] ** 2) ** 0.5)
