"""The report as lines for a terminal, as JSON and as a page that opens offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from reinforcepp.commands.lint.findings import Report
from reinforcepp.config.lint import FIXABLE
from reinforcepp.data import count
from reinforcepp.reports.html import asset, render

COLORS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


class Line(NamedTuple):
    """A line of the report and the style it has on a terminal."""

    text: str
    style: str = ""


def as_lines(report: Report) -> list[Line]:
    """What was found, for people."""
    lines = [Line(text) for text in _sizes(report)]
    for finding in report.findings:
        where = f"{finding.file}: " if len(report.files) > 1 else ""
        lines.append(Line(f"{finding.severity}: {finding.rule}: {where}{finding}", COLORS[finding.severity]))
        lines += [Line(f"    {example}", "dim") for example in finding.examples]
    return [*lines, Line(summary(report), "green" if not any(report.counts.values()) else "bold")]


def as_json(report: Report) -> str:
    """Everything, all rows included, for programs; ASCII alone, whatever the data holds."""
    return json.dumps(report.as_dict(), indent=2) + "\n"


def as_page(report: Report) -> str:
    """Return the report as a page that opens offline."""
    return render(
        "lint.html",
        title=f"Data check of {report.data}",
        style=asset("static/lint.css"),
        lines=[*_sizes(report), summary(report)],
        findings=report.findings,
        rows=[[f"{row} ({other})" for row, other in f.pairs] or [str(row) for row in f.rows] for f in report.findings],
    )


def summary(report: Report) -> str:
    """``2 errors, 1 warning, 0 infos; a cleaned copy (--fix OUT.csv) is without 2 of them.``"""
    if not report.findings:
        return "Nothing is wrong with it."
    counted = ", ".join(count(number, severity) for severity, number in report.counts.items() if number)
    fixable = sum(finding.fixable for finding in report.findings)
    ending = Path(report.data).suffix.lower()
    can_be_fixed = fixable and ending in FIXABLE
    return counted + (f"; a cleaned copy (--fix OUT{ending}) is without {fixable} of them." if can_be_fixed else ".")


def _sizes(report: Report) -> list[str]:
    return [
        f"{file.file}: {count(file.rows, 'row')}, {count(file.usable, f'usable {file.noun}')}" for file in report.files
    ]
