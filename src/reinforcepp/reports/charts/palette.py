"""Colors of the series, in light and dark.

The first four, drawn as solid lines, and the last four, drawn as dashed lines, are distinguishable with every common kind of
color blindness. Each color has a contrast of at least 3 to the ground.
"""

from __future__ import annotations

SERIES: tuple[tuple[str, str], ...] = (
    ("#0a66c2", "#5ab0ff"),
    ("#c8500a", "#ff9a4d"),
    ("#4a1657", "#d0559a"),
    ("#1c9a80", "#3fe0c0"),
    ("#b8327f", "#f2e58a"),
    ("#33317a", "#7f86ff"),
    ("#8a7400", "#ef8fb0"),
    ("#338ddf", "#4fd6e6"),
)
SOLID_LINES = 4

VARIABLES = {f"series-{index}": pair for index, pair in enumerate(SERIES)}


def color_and_dash(index: int) -> tuple[int, int]:
    """Return the color and the dash of series ``index``. They repeat after 16 series."""
    color = index % len(SERIES)
    return color, (color >= SOLID_LINES) + 2 * (index // len(SERIES) % 2)
