"""Colours of the series, in light and dark.

The first four, which are drawn as whole lines, and the last four, drawn dashed, can be told from each other with every
common kind of colour blindness; each has a contrast of at least 3 to the ground.
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
WHOLE_LINES = 4

VARIABLES = {f"series-{place}": pair for place, pair in enumerate(SERIES)}


def look(place: int) -> tuple[int, int]:
    """The colour and the dash of the series that comes ``place``-th; after sixteen they begin again."""
    color = place % len(SERIES)
    return color, (color >= WHOLE_LINES) + 2 * (place // len(SERIES) % 2)
