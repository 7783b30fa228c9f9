"""Charts as HTML: a figure with a description, a table of its values, and the data that ``chart.js`` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from markupsafe import Markup

from reinforcepp.reports.charts import describe
from reinforcepp.reports.charts.downsample import MAX_POINTS, Downsampled, Values, downsample
from reinforcepp.reports.charts.palette import color_and_dash
from reinforcepp.reports.html import embedded, macro
from reinforcepp.reports.numbers import number

KEYS = "Arrow keys move the cursor, plus and minus zoom, 0 resets."
BINS = 24


@dataclass(frozen=True)
class Line:
    """A curve, ``x`` ascending; None is a gap. ``low`` and ``high`` are a band around it.

    ``style`` chooses color and dash; the default is the position of the line in its chart.
    """

    name: str
    x: Sequence[float]
    y: Values
    low: Values | None = None
    high: Values | None = None
    style: int | None = None


@dataclass(frozen=True)
class Points:
    """Points of one color; ``labels`` describes each of them in a few words."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] | None = None
    style: int | None = None


@dataclass(frozen=True)
class Bars:
    """Heights, one for each name or bin of the chart; None draws no bar."""

    name: str
    y: Values
    style: int | None = None


@dataclass(frozen=True)
class Bin:
    """``count`` predictions of about the probability ``predicted``, and the share ``observed`` that came true."""

    predicted: float
    observed: float
    count: int


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    note: str = "",
    x_name: str = "step",
    smooth: bool = True,
    log: Literal["never", "offered", "on"] = "never",
    limits: Mapping[str, float] | None = None,
    points: int = MAX_POINTS,
) -> Markup:
    """Return curves over a common axis.

    Args:
        title: name of the metric.
        lines: one or several. A line of more than ``points`` points is downsampled, but keeps its spikes.
        note: definition and unit of the metric.
        x_name: name of the axis. Charts with the same name share cursor and zoom.
        smooth: whether the page's slider applies.
        log: logarithmic axis: never, by a button (if all values are positive), or from the start.
        limits: horizontal lines by name.
        points: most points to draw of a line.
    """
    positive = all(value is None or value > 0 for line in lines for value in line.y)
    description = describe.joined([describe.line(line.name, line.x, line.y, x_name) for line in lines])
    bounds = "".join(f" {name} is {number(value)}." for name, value in (limits or {}).items())
    spec = {
        "kind": "line",
        "x_name": x_name,
        "sync": x_name,
        "smooth": smooth,
        "log": log if positive else "never",
        "limits": [{"name": name, "y": value} for name, value in (limits or {}).items()],
        "series": [
            _styled(line.name, index, line.style)
            | _columns(downsample(line.x, line.y, line.low, line.high, limit=points))
            for index, line in enumerate(lines)
        ],
    }
    rows = describe.table_rows([(line.x, line.y) for line in lines])
    return _figure(
        title, note, f"Line chart. {description}{bounds}", spec, [x_name, *(line.name for line in lines)], rows
    )


def scatter_chart(
    title: str, clouds: Sequence[Points], *, x_name: str, y_name: str, note: str = "", connected: bool = False
) -> Markup:
    """Return points in one or several colors, up to a few thousand.

    Args:
        title: names of the metrics.
        clouds: the points, by color.
        x_name: name of the horizontal axis.
        y_name: name of the vertical axis.
        note: definitions and units of the metrics.
        connected: whether a line joins the points of a color in their order.
    """
    description = describe.joined([describe.points(cloud.name, cloud.x, cloud.y, x_name, y_name) for cloud in clouds])
    series = [
        _styled(cloud.name, index, cloud.style)
        | {"x": list(cloud.x), "y": list(cloud.y)}
        | ({"labels": list(cloud.labels)} if cloud.labels is not None else {})
        for index, cloud in enumerate(clouds)
    ]
    spec = {
        "kind": "points",
        "connected": connected,
        "x_name": x_name,
        "y_name": y_name,
        "log": "never",
        "series": series,
    }
    rows = [[cloud.name, *_summary(cloud.x), *_summary(cloud.y)] for cloud in clouds]
    titles = ["points", *(f"{part} {name}" for name in (x_name, y_name) for part in ("lowest", "mean", "highest"))]
    return _figure(title, note, f"Scatter chart of {y_name} against {x_name}. {description}", spec, titles, rows)


def bar_chart(title: str, names: Sequence[str], bars: Sequence[Bars], *, y_name: str = "", note: str = "") -> Markup:
    """Return a group of bars for each of ``names``."""
    rows = [[name, *(number(series.y[i]) for series in bars)] for i, name in enumerate(names)]
    description = describe.joined(
        [
            f"{series.name}: " + ", ".join(f"{n} {number(v)}" for n, v in zip(names, series.y, strict=True))
            for series in bars
        ]
    )
    edges = [float(i) for i in range(len(names) + 1)]
    spec = _bars(bars, edges) | {"names": list(names), "x_name": "", "y_name": y_name}
    return _figure(title, note, f"Bar chart. {description}", spec, ["", *(series.name for series in bars)], rows)


def histogram(
    title: str, values: Mapping[str, Sequence[float]], *, x_name: str, note: str = "", bins: int = BINS
) -> Markup:
    """Return the distribution of each series of values, as shares of its values in equal bins."""
    known = [value for series in values.values() for value in series]
    lowest, highest = (min(known), max(known)) if known else (0.0, 1.0)
    width = (highest - lowest) / bins or 1.0 / bins
    edges = [lowest + i * width for i in range(bins + 1)]
    bars = [Bars(name, _shares(series, lowest, width, bins)) for name, series in values.items()]
    spec = _bars(bars, edges) | {"names": None, "x_name": x_name, "y_name": "share"}
    description = describe.joined(
        [
            f"{name}: {len(series)} values" + (" from {}, mean {}, to {}".format(*_summary(series)) if series else "")
            for name, series in values.items()
        ]
    )
    rows = [
        [f"{number(a)} to {number(b)}", *(number(series.y[i]) for series in bars)]
        for i, (a, b) in enumerate(pairwise(edges))
    ]
    titles = [x_name, *(series.name for series in bars)]
    return _figure(title, note, f"Histogram of {x_name}. {description}", spec, titles, rows)


def calibration_chart(
    title: str,
    curves: Mapping[str, Sequence[Bin]],
    *,
    x_name: str = "predicted",
    y_name: str = "observed",
    note: str = "on the diagonal, predictions come true as often as predicted",
) -> Markup:
    """Return the observed share against the predicted probability, with the diagonal."""
    series = [
        _styled(name, index, None)
        | {
            key: [getattr(each, attribute) for each in bins]
            for key, attribute in (("x", "predicted"), ("y", "observed"), ("n", "count"))
        }
        for index, (name, bins) in enumerate(curves.items())
    ]
    spec = {
        "kind": "points",
        "connected": True,
        "diagonal": True,
        "x_name": x_name,
        "y_name": y_name,
        "log": "never",
        "series": series,
    }
    rows = [
        [name, number(each.predicted), number(each.observed), str(each.count)]
        for name, bins in curves.items()
        for each in bins
    ]
    description = describe.joined(
        [
            f"{name}: " + ", ".join(f"{number(b.observed)} observed at {number(b.predicted)} predicted" for b in bins)
            for name, bins in curves.items()
        ]
    )
    return _figure(title, note, f"Calibration chart. {description}", spec, ["", x_name, y_name, "cases"], rows)


def controls(smoothing: int = 30) -> Markup:
    """Return the slider and the button for all charts of the page; ``smoothing``, 0 to 100, is the initial position."""
    return macro("macros.html", "chart_controls")(smoothing)


def _figure(
    title: str,
    note: str,
    description: str,
    spec: Mapping[str, Any],
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> Markup:
    return macro("macros.html", "chart")(title, note, description, KEYS, embedded("", spec), titles, rows)


def _styled(name: str, index: int, style: int | None) -> dict[str, Any]:
    color, dash = color_and_dash(index if style is None else style)
    return {"name": name, "color": color, "dash": dash}


def _columns(curve: Downsampled) -> dict[str, Any]:
    optional = {"mean": curve.mean, "low": curve.low, "high": curve.high}
    return {"x": curve.x, "y": curve.y} | {key: values for key, values in optional.items() if values is not None}


def _bars(bars: Sequence[Bars], edges: Sequence[float]) -> dict[str, Any]:
    series = [_styled(each.name, index, each.style) | {"y": list(each.y)} for index, each in enumerate(bars)]
    return {"kind": "bars", "log": "never", "edges": edges, "series": series}


def _shares(values: Sequence[float], lowest: float, width: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - lowest) / width))] += 1
    return [count / len(values) if values else 0.0 for count in counts]


def _summary(values: Sequence[float]) -> list[str]:
    if not values:
        return ["-"] * 3
    return [number(value) for value in (min(values), sum(values) / len(values), max(values))]
