"""Long curves made short, spikes and all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

POINTS = 1500
DIGITS, PLACES = 6, 12  # of a value, and of where it is

Values = Sequence[float | None]


@dataclass(frozen=True)
class Thinned:
    """A curve of few points.

    ``mean`` is what smoothing starts from where points were left out: the mean of all values that one point, or a pair of
    lowest and highest, stands for, beside the last of them. None where nothing was left out.
    """

    x: Values
    y: list[float | None]
    mean: list[float | None] | None
    low: list[float | None] | None
    high: list[float | None] | None


def thin(
    x: Sequence[float], y: Values, low: Values | None = None, high: Values | None = None, *, limit: int
) -> Thinned:
    """At most about ``limit`` points of a curve, ``x`` ascending: of each stretch the lowest and the highest.

    So a single spike in a million steps stays as high as it is. The first and the last point stay, too. A value that is
    None or not finite is a gap. ``low`` and ``high`` are a band around the curve, of which a stretch keeps the mean.
    """
    y = [_clean(value) for value in y]
    lows, highs = ([_clean(v) for v in band] if band is not None else None for band in (low, high))
    if len(x) <= limit:
        return Thinned(_short(x, PLACES), _short(y), None, _short_band(lows), _short_band(highs))
    kept: list[int] = []
    means: list[float | None] = []
    bands: tuple[list[float | None], list[float | None]] = ([], [])
    for stretch in _stretches(len(x), max(1, limit // 2)):
        held = [(value, i) for i in stretch if (value := y[i]) is not None]
        pair = sorted({min(held)[1], max(held)[1]}) if held else [stretch[0]]
        kept += pair
        means += [None] * (len(pair) - 1) + [_mean(y, stretch)]
        for shown, band in zip(bands, (lows, highs), strict=True):
            shown += [_mean(band, stretch) if band is not None else None] * len(pair)
    return Thinned(
        _short([x[i] for i in kept], PLACES),
        _short([y[i] for i in kept]),
        _short(means),
        _short(bands[0]) if low is not None else None,
        _short(bands[1]) if high is not None else None,
    )


def _stretches(length: int, count: int) -> list[range]:
    """The first point, ``count`` stretches of about the same length, the last point."""
    inner = length - 2
    ends = [1 + inner * i // count for i in range(count + 1)]
    return [range(1), *(range(a, b) for a, b in pairwise(ends) if b > a), range(length - 1, length)]


def _clean(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _mean(values: Values, places: range) -> float | None:
    held = [value for i in places if (value := values[i]) is not None]
    return fmean(held) if held else None


def _short(values: Values, digits: int = DIGITS) -> list[float | None]:
    """Numbers with the digits that a picture shows, whole ones without a point: a quarter of the page's size."""
    rounded = [None if v is None else float(f"{v:.{digits}g}") for v in values]
    return [int(v) if v is not None and v.is_integer() else v for v in rounded]


def _short_band(values: Values | None) -> list[float | None] | None:
    return None if values is None else _short(values)
