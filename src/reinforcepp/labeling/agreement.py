"""Krippendorff's alpha: agreement of any number of labelers, some of whom labeled only some units.

Source: K. Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), whose example is a test.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import product

Distance = Callable[[float, float], float]
"""Squared distance of two values."""


def nominal(a: float, b: float) -> float:
    """Return 0 for equal values and otherwise 1: for values without an order."""
    return float(a != b)


def interval(a: float, b: float) -> float:
    """Return the squared difference: for numbers whose differences mean something, such as signed preferences."""
    return (a - b) ** 2


def krippendorff_alpha(
    units: Iterable[Sequence[float]], distance: Distance = nominal, *, mirrored: bool = False
) -> float | None:
    """Return alpha: 1 for perfect agreement, 0 for that of chance, negative for systematic disagreement.

    Args:
        units: For each unit, the values of the labelers who labeled it. Units with fewer than two don't count.
        distance: Squared distance of two values.
        mirrored: Whether the signs of each unit's values mean nothing compared with those of other units, as those of
            preferences: the order in which a unit holds two answers is arbitrary. Chance then has both signs equally often.

    Returns:
        1 - observed disagreement / expected disagreement; None without two different values, when it isn't defined.
    """
    observed, counts = 0.0, Counter[float]()
    for values, number in Counter(tuple(sorted(each)) for each in units if len(each) > 1).items():
        for value in values:
            counts[value] += number
        observed += number * sum(distance(a, b) for a, b in product(values, repeat=2)) / (len(values) - 1)
    total = sum(counts.values())
    shares: dict[float, float] = dict(counts)
    if mirrored:
        shares = {value: (counts[value] + counts[-value]) / 2 for each in counts for value in (each, -each)}
    expected = sum(n * m * distance(a, b) for (a, n), (b, m) in product(shares.items(), repeat=2))
    return None if expected == 0 else 1 - (total - 1) * observed / expected
