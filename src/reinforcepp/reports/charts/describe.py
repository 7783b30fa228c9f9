"""Charts as sentences and as small tables, for readers who can't see them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from reinforcepp.reports.charts.downsample import Values
from reinforcepp.reports.numbers import number

DESCRIBED_SERIES = 8
TABLE_ROWS = 12


def line(name: str, x: Sequence[float], y: Values, x_name: str) -> str:
    """Return ``reward from -1.2 to 2.4, lowest -1.3 at step 2, highest 2.6 at step 118``."""
    known = [(position, value) for position, value in zip(x, y, strict=True) if value is not None]
    if not known:
        return f"{name} has no values"
    lowest, highest = min(known, key=lambda point: point[1]), max(known, key=lambda point: point[1])
    if lowest[1] == highest[1]:
        return f"{name} is {number(lowest[1])} throughout"
    return (
        f"{name} from {number(known[0][1])} to {number(known[-1][1])}, "
        f"lowest {number(lowest[1])} at {x_name} {number(lowest[0])}, "
        f"highest {number(highest[1])} at {x_name} {number(highest[0])}"
    )


def points(name: str, x: Sequence[float], y: Sequence[float], x_name: str, y_name: str) -> str:
    """Return ``early: 600 points, reward from -2 to 3, length from 4 to 64``."""
    if not x:
        return f"{name} has no points"
    return (
        f"{name}: {len(x)} points, {y_name} from {number(min(y))} to {number(max(y))}, "
        f"{x_name} from {number(min(x))} to {number(max(x))}"
    )


def joined(parts: Sequence[str]) -> str:
    """Return the descriptions of the first ``DESCRIBED_SERIES`` series as one sentence."""
    more = f"; and {len(parts) - DESCRIBED_SERIES} more" if len(parts) > DESCRIBED_SERIES else ""
    return "; ".join(parts[:DESCRIBED_SERIES]) + more + "."


def table_rows(curves: Sequence[tuple[Sequence[float], Values]]) -> list[list[str]]:
    """Return rows at up to 12 positions: the position, then the value of each curve there or before."""
    positions = sorted({position for x, _ in curves for position in x})
    last = len(positions) - 1
    chosen = (
        positions
        if len(positions) <= TABLE_ROWS
        else [positions[round(i * last / (TABLE_ROWS - 1))] for i in range(TABLE_ROWS)]
    )
    return [[number(position), *(number(_value(x, y, position)) for x, y in curves)] for position in chosen]


def _value(x: Sequence[float], y: Values, position: float) -> float | None:
    if not x or position > x[-1]:
        return None
    before = bisect.bisect_right(x, position) - 1
    return y[before] if before >= 0 else None
