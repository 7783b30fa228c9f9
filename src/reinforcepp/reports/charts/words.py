"""What a chart shows, in words and as a small table: for whoever can't see it."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from html import escape

from reinforcepp.reports.charts.thin import Values

DESCRIBED = 8
ROWS = 12


def number(value: float | None) -> str:
    """With four significant digits; a dash for none."""
    if value is None:
        return "-"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "0" if text == "-0" else text


def course(name: str, x: Sequence[float], y: Values, x_name: str) -> str:
    """``reward from -1.2 to 2.4, lowest -1.3 at step 2, highest 2.6 at step 118``."""
    held = [(place, value) for place, value in zip(x, y, strict=True) if value is not None]
    if not held:
        return f"{name} has no values"
    lowest, highest = min(held, key=lambda point: point[1]), max(held, key=lambda point: point[1])
    if lowest[1] == highest[1]:
        return f"{name} is {number(lowest[1])} throughout"
    return (
        f"{name} from {number(held[0][1])} to {number(held[-1][1])}, "
        f"lowest {number(lowest[1])} at {x_name} {number(lowest[0])}, "
        f"highest {number(highest[1])} at {x_name} {number(highest[0])}"
    )


def cloud(name: str, x: Sequence[float], y: Sequence[float], x_name: str, y_name: str) -> str:
    """``early: 600 points, reward from -2 to 3, length from 4 to 64``."""
    if not x:
        return f"{name} has no points"
    return (
        f"{name}: {len(x)} points, {y_name} from {number(min(y))} to {number(max(y))}, "
        f"{x_name} from {number(min(x))} to {number(max(x))}"
    )


def joined(parts: Sequence[str]) -> str:
    """What is said of each series, of so many as one can listen to."""
    more = f"; and {len(parts) - DESCRIBED} more" if len(parts) > DESCRIBED else ""
    return "; ".join(parts[:DESCRIBED]) + more + "."


def table(caption: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The numbers behind a chart, folded away."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    lines = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        '<details class="numbers"><summary>Table<span class="unseen"> of '
        f'{escape(caption)}</span></summary><div class="scroll" role="region" tabindex="0" aria-label="Table of '
        f'{escape(caption)}"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>'
    )


def at_places(curves: Sequence[tuple[Sequence[float], Values]]) -> list[list[str]]:
    """Rows at a dozen places from the first to the last: the place, and of each curve the value there or before it."""
    places = sorted({place for x, _ in curves for place in x})
    chosen = places if len(places) <= ROWS else [places[round(i * (len(places) - 1) / (ROWS - 1))] for i in range(ROWS)]
    return [[number(place), *(number(_value(x, y, place)) for x, y in curves)] for place in chosen]


def _value(x: Sequence[float], y: Values, place: float) -> float | None:
    if not x or place > x[-1]:
        return None
    before = bisect.bisect_right(x, place) - 1
    return y[before] if before >= 0 else None
