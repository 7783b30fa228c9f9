"""Charts as HTML: a figure with its sentence, its numbers as a table, and the data that charts.js draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any, Literal

from reinforcepp.reports.charts import words
from reinforcepp.reports.charts.palette import look
from reinforcepp.reports.charts.thin import POINTS, Thinned, Values, thin
from reinforcepp.reports.html import embedded

KEYS = "Arrow keys move the cursor, plus and minus zoom, 0 resets."
BINS = 24


@dataclass(frozen=True)
class Line:
    """A curve, ``x`` ascending; None is a gap. ``low`` and ``high`` are a band around it.

    ``place`` chooses colour and dash; it defaults to the place of the line in its chart.
    """

    name: str
    x: Sequence[float]
    y: Values
    low: Values | None = None
    high: Values | None = None
    place: int | None = None


@dataclass(frozen=True)
class Cloud:
    """Points; ``labels`` says of each what it is, in a few words."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    labels: Sequence[str] | None = None
    place: int | None = None


@dataclass(frozen=True)
class Bars:
    """Heights, one for each name or bin of the chart; None is none."""

    name: str
    y: Values
    place: int | None = None


@dataclass(frozen=True)
class Bin:
    """What was predicted with about the probability ``predicted``, ``count`` times, and how often it came true."""

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
    points: int = POINTS,
) -> str:
    """Curves over a common axis.

    Args:
        title: what they show.
        lines: one or several; longer ones than ``points`` are thinned, so that spikes stay.
        note: unit and meaning, in a few words.
        x_name: of the axis; charts with the same one share cursor and zoom.
        smooth: whether the page's slider applies.
        log: logarithmic axis: never, by a button (where all values are positive), or from the start.
        limits: horizontal lines by name.
        points: that are drawn of a line at most.
    """
    positive = all(value is None or value > 0 for line in lines for value in line.y)
    told = words.joined([words.course(line.name, line.x, line.y, x_name) for line in lines])
    bounds = "".join(f" {name} is {words.number(value)}." for name, value in (limits or {}).items())
    spec = {
        "kind": "line",
        "x_name": x_name,
        "sync": x_name,
        "smooth": smooth,
        "log": log if positive else "never",
        "limits": [{"name": name, "y": value} for name, value in (limits or {}).items()],
        "series": [
            _styled(line.name, place, line.place) | _columns(thin(line.x, line.y, line.low, line.high, limit=points))
            for place, line in enumerate(lines)
        ],
    }
    rows = words.at_places([(line.x, line.y) for line in lines])
    table = words.table(title, [x_name, *(line.name for line in lines)], rows)
    return _figure(title, note, f"Line chart. {told}{bounds}", spec, table)


def scatter_chart(title: str, clouds: Sequence[Cloud], *, x_name: str, y_name: str, note: str = "") -> str:
    """Points in one or several colours; the caller keeps their number below a few thousand."""
    told = words.joined([words.cloud(cloud.name, cloud.x, cloud.y, x_name, y_name) for cloud in clouds])
    series = [
        _styled(cloud.name, place, cloud.place)
        | {"x": list(cloud.x), "y": list(cloud.y)}
        | ({"labels": list(cloud.labels)} if cloud.labels is not None else {})
        for place, cloud in enumerate(clouds)
    ]
    spec = {"kind": "cloud", "x_name": x_name, "y_name": y_name, "log": "never", "series": series}
    rows = [[cloud.name, *_summary(cloud.x), *_summary(cloud.y)] for cloud in clouds]
    titles = ["points", *(f"{part} {name}" for name in (x_name, y_name) for part in ("least", "mean", "most"))]
    return _figure(
        title, note, f"Scatter chart of {y_name} against {x_name}. {told}", spec, words.table(title, titles, rows)
    )


def bar_chart(title: str, names: Sequence[str], bars: Sequence[Bars], *, y_name: str = "", note: str = "") -> str:
    """Bars side by side over each of ``names``."""
    rows = [[name, *(words.number(own.y[i]) for own in bars)] for i, name in enumerate(names)]
    told = words.joined(
        [
            f"{own.name}: " + ", ".join(f"{n} {words.number(v)}" for n, v in zip(names, own.y, strict=True))
            for own in bars
        ]
    )
    edges = [float(i) for i in range(len(names) + 1)]
    spec = _bars(bars, edges) | {"names": list(names), "x_name": "", "y_name": y_name}
    return _figure(title, note, f"Bar chart. {told}", spec, words.table(title, ["", *(b.name for b in bars)], rows))


def histogram(
    title: str, values: Mapping[str, Sequence[float]], *, x_name: str, note: str = "", bins: int = BINS
) -> str:
    """How often values of each size occur, as shares of all values of their name."""
    known = [value for own in values.values() for value in own]
    least, most = (min(known), max(known)) if known else (0.0, 1.0)
    width = (most - least) / bins or 1.0 / bins
    edges = [least + i * width for i in range(bins + 1)]
    bars = [Bars(name, _shares(own, least, width, bins)) for name, own in values.items()]
    spec = _bars(bars, edges) | {"names": None, "x_name": x_name, "y_name": "share"}
    told = words.joined(
        [
            f"{name}: {len(own)} values" + (" from {}, mean {}, to {}".format(*_summary(own)) if own else "")
            for name, own in values.items()
        ]
    )
    rows = [
        [f"{words.number(a)} to {words.number(b)}", *(words.number(own.y[i]) for own in bars)]
        for i, (a, b) in enumerate(pairwise(edges))
    ]
    titles = [x_name, *(own.name for own in bars)]
    return _figure(title, note, f"Histogram of {x_name}. {told}", spec, words.table(title, titles, rows))


def calibration_chart(
    title: str,
    curves: Mapping[str, Sequence[Bin]],
    *,
    x_name: str = "predicted",
    y_name: str = "observed",
    note: str = "on the diagonal, what was predicted came true as often as it was said to",
) -> str:
    """How often what was predicted with some probability came true, beside the diagonal."""
    series = [
        _styled(name, place, None)
        | {
            key: [getattr(own, of) for own in bins]
            for key, of in (("x", "predicted"), ("y", "observed"), ("n", "count"))
        }
        for place, (name, bins) in enumerate(curves.items())
    ]
    spec = {"kind": "cloud", "diagonal": True, "x_name": x_name, "y_name": y_name, "log": "never", "series": series}
    rows = [
        [name, words.number(own.predicted), words.number(own.observed), str(own.count)]
        for name, bins in curves.items()
        for own in bins
    ]
    told = words.joined(
        [
            f"{name}: "
            + ", ".join(f"{words.number(b.predicted)} came true in {words.number(b.observed)}" for b in bins)
            for name, bins in curves.items()
        ]
    )
    table = words.table(title, ["", x_name, y_name, "cases"], rows)
    return _figure(title, note, f"Calibration chart. {told}", spec, table)


def controls(smoothing: int = 30) -> str:
    """The slider and the button that all charts of the page obey; ``smoothing``, 0 to 100, is where it begins."""
    return (
        '<div class="chart-controls" role="group" aria-label="All charts"><label><span>Smoothing</span> <input type="range" '
        f'min="0" max="100" value="{smoothing}"> <output></output></label> <button type="button">Reset zoom</button> '
        '<span class="hint">Drag to zoom, double-click to reset; a name in a legend switches its curve off. '
        "With the keyboard: arrows, plus, minus, 0.</span></div>"
    )


def _figure(title: str, note: str, sentence: str, spec: Mapping[str, Any], table: str) -> str:
    # The role of an image is the plot's, not the figure's: what is inside an image can't be reached by assistive technology,
    # and legend and table are to be.
    return (
        f'<figure class="chart"><figcaption><span class="chart-title">{escape(title)}</span>'
        f'{f" <span class=note>{escape(note)}</span>" if note else ""}</figcaption><div class="legend"></div>'
        f'<div class="plot" role="img" tabindex="0" aria-label="{escape(f"{title}. {sentence}")}" aria-description="{KEYS}">'
        f"The picture needs JavaScript; its numbers are in the table.</div>{table}{embedded('', spec)}</figure>"
    )


def _styled(name: str, place: int, own: int | None) -> dict[str, Any]:
    color, dash = look(place if own is None else own)
    return {"name": name, "color": color, "dash": dash}


def _columns(curve: Thinned) -> dict[str, Any]:
    optional = {"mean": curve.mean, "low": curve.low, "high": curve.high}
    return {"x": curve.x, "y": curve.y} | {key: values for key, values in optional.items() if values is not None}


def _bars(bars: Sequence[Bars], edges: Sequence[float]) -> dict[str, Any]:
    series = [_styled(own.name, place, own.place) | {"y": list(own.y)} for place, own in enumerate(bars)]
    return {"kind": "bars", "log": "never", "edges": edges, "series": series}


def _shares(values: Sequence[float], least: float, width: float, bins: int) -> list[float]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - least) / width))] += 1
    return [count / len(values) if values else 0.0 for count in counts]


def _summary(values: Sequence[float]) -> list[str]:
    if not values:
        return ["-"] * 3
    return [words.number(value) for value in (min(values), sum(values) / len(values), max(values))]
