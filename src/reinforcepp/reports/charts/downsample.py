"""Long curves reduced to a few points, with their spikes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

MAX_POINTS = 1500
VALUE_DIGITS, POSITION_DIGITS = 6, 12

Values = Sequence[float | None]


@dataclass(frozen=True)
class Downsampled:
    """A curve of few points.

    ``mean`` is the input of smoothing: the mean of all values that one point, or a pair of minimum and maximum, stands for,
    stored at the last point of the pair. None if no points were dropped.
    """

    x: Values
    y: list[float | None]
    mean: list[float | None] | None
    low: list[float | None] | None
    high: list[float | None] | None


def downsample(
    x: Sequence[float], y: Values, low: Values | None = None, high: Values | None = None, *, limit: int
) -> Downsampled:
    """Return about ``limit`` points of a curve, ``x`` ascending: the minimum and the maximum of each stretch.

    So a single spike in a million steps keeps its height. The first and the last point stay, too. A value that is None or
    not finite is a gap. ``low`` and ``high`` are a band around the curve, whose mean is kept for each stretch.
    """
    y = [_clean(value) for value in y]
    lows, highs = ([_clean(v) for v in band] if band is not None else None for band in (low, high))
    if len(x) <= limit:
        return Downsampled(_rounded(x, POSITION_DIGITS), _rounded(y), None, _rounded_band(lows), _rounded_band(highs))
    kept: list[int] = []
    means: list[float | None] = []
    bands: tuple[list[float | None], list[float | None]] = ([], [])
    for stretch in _stretches(len(x), max(1, limit // 2)):
        known = [(value, i) for i in stretch if (value := y[i]) is not None]
        pair = sorted({min(known)[1], max(known)[1]}) if known else [stretch[0]]
        kept += pair
        means += [None] * (len(pair) - 1) + [_mean(y, stretch)]
        for output, band in zip(bands, (lows, highs), strict=True):
            output += [_mean(band, stretch) if band is not None else None] * len(pair)
    return Downsampled(
        _rounded([x[i] for i in kept], POSITION_DIGITS),
        _rounded([y[i] for i in kept]),
        _rounded(means),
        _rounded(bands[0]) if low is not None else None,
        _rounded(bands[1]) if high is not None else None,
    )


def _stretches(length: int, count: int) -> list[range]:
    """Return the first point, ``count`` stretches of about equal length, and the last point."""
    inner = length - 2
    ends = [1 + inner * i // count for i in range(count + 1)]
    return [range(1), *(range(a, b) for a, b in pairwise(ends) if b > a), range(length - 1, length)]


def _clean(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _mean(values: Values, indices: range) -> float | None:
    known = [value for i in indices if (value := values[i]) is not None]
    return fmean(known) if known else None


def _rounded(values: Values, digits: int = VALUE_DIGITS) -> list[float | None]:
    """Return numbers with as many digits as a chart can show, integers without a point: a quarter of the page's size."""
    rounded = [None if v is None else float(f"{v:.{digits}g}") for v in values]
    return [int(v) if v is not None and v.is_integer() else v for v in rounded]


def _rounded_band(values: Values | None) -> list[float | None] | None:
    return None if values is None else _rounded(values)
