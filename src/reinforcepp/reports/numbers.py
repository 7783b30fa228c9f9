"""Numbers on report pages: how they are formatted, and how two series correlate."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def number(value: float | None) -> str:
    """Return ``value`` with four significant digits, or a dash for None."""
    if value is None:
        return "-"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "0" if text == "-0" else text


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return Pearson's correlation, or None if one side is constant."""
    try:
        return statistics.correlation(x, y)
    except statistics.StatisticsError:
        return None
