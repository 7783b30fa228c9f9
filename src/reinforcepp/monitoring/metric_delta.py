"""Whether a mean over held-out prompts has changed: the one rule that the command line and the report share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Shown = Literal["better", "worse", "no difference shown"]


@dataclass(frozen=True)
class Change:
    """A mean before and after. ``error`` is the standard error of the difference of two independent means."""

    name: str
    before: float
    after: float
    error: float

    @property
    def gain(self) -> float:
        """After less before."""
        return self.after - self.before

    @property
    def shown(self) -> Shown:
        """A gain of more than twice its standard error counts, less may be chance."""
        return (
            "better"
            if self.gain > 2 * self.error
            else "worse"
            if self.gain < -2 * self.error
            else "no difference shown"
        )

    def __str__(self) -> str:
        """``reward -0.121 -> +2.310 (+2.431 ± 0.512: better)``."""
        return (
            f"{self.name} {self.before:+.3f} -> {self.after:+.3f} "
            f"({self.gain:+.3f} ± {2 * self.error:.3f}: {self.shown})"
        )


def change_of(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> Change | None:
    """What became of the mean ``name`` between two evaluations' figures, with ``name_error`` beside; None if one lacks it."""
    if name not in before or name not in after:
        return None
    errors = [figures.get(f"{name}_error", 0.0) for figures in (before, after)]
    return Change(name, before[name], after[name], (errors[0] ** 2 + errors[1] ** 2) ** 0.5)
