"""Interactive charts for pages that open offline: plain data in, HTML out.

A page with charts passes ``STYLE`` and ``SCRIPTS`` to :func:`reinforcepp.reports.html.render` and prints ``controls()`` once,
where the smoothing slider belongs. Every text in a chart is shown as text. uPlot draws the charts, see ``vendor``.
"""

from __future__ import annotations

from reinforcepp.reports.charts.chart import (
    Bars,
    Bin,
    Line,
    Points,
    bar_chart,
    calibration_chart,
    controls,
    histogram,
    line_chart,
    scatter_chart,
)
from reinforcepp.reports.charts.downsample import MAX_POINTS, downsample
from reinforcepp.reports.charts.palette import VARIABLES
from reinforcepp.reports.html import asset, themed

_UPLOT = "vendor/uplot/uPlot"
_OWN = "".join(asset(f"charts/{name}.js") for name in ("numbers", "kinds", "chart"))

STYLE = asset(f"{_UPLOT}.min.css") + themed(VARIABLES) + asset("charts/charts.css")
SCRIPTS = (asset(f"{_UPLOT}.iife.min.js"), f'(() => {{\n"use strict";\n{_OWN}}})();\n')

__all__ = [
    "MAX_POINTS",
    "SCRIPTS",
    "STYLE",
    "Bars",
    "Bin",
    "Line",
    "Points",
    "bar_chart",
    "calibration_chart",
    "controls",
    "downsample",
    "histogram",
    "line_chart",
    "scatter_chart",
]
