"""Interactive charts for pages that open offline: plain data in, HTML out.

A page that shows some puts ``STYLE`` and ``SCRIPTS`` into :func:`reinforcepp.reports.html.page`, and ``controls()``, once, where
the slider for smoothing is to be. Every text given to a chart is shown as text. Drawing is uPlot's, see ``vendor``.
"""

from __future__ import annotations

from pathlib import Path

from reinforcepp.reports.charts.chart import (
    Bars,
    Bin,
    Cloud,
    Line,
    bar_chart,
    calibration_chart,
    controls,
    histogram,
    line_chart,
    scatter_chart,
)
from reinforcepp.reports.charts.palette import VARIABLES
from reinforcepp.reports.charts.thin import POINTS, thin
from reinforcepp.reports.html import themed

_FOLDER = Path(__file__).parent
_UPLOT = _FOLDER.parent / "vendor" / "uplot"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _own_script() -> str:
    parts = "".join(_text(_FOLDER / name) for name in ("numbers.js", "kinds.js", "chart.js"))
    return f'(() => {{\n"use strict";\n{parts}}})();\n'


STYLE = _text(_UPLOT / "uPlot.min.css") + themed(VARIABLES) + _text(_FOLDER / "charts.css")
SCRIPTS = (_text(_UPLOT / "uPlot.iife.min.js"), _own_script())

__all__ = [
    "POINTS",
    "SCRIPTS",
    "STYLE",
    "Bars",
    "Bin",
    "Cloud",
    "Line",
    "bar_chart",
    "calibration_chart",
    "controls",
    "histogram",
    "line_chart",
    "scatter_chart",
    "thin",
]
