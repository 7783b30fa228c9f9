"""The report as lines for a terminal, as JSON, and as an HTML page that works offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from reinforcepp.commands.lint.findings import LintReport
from reinforcepp.config.inspection import FIXABLE
from reinforcepp.data import count
from reinforcepp.errors import option
from reinforcepp.reports.html import asset, render

COLORS = {"error": "bold red", "warning": "yellow", "info": "cyan"}


class Line(NamedTuple):
    """A line of the report and its style in a terminal."""

    text: str
    style: str = ""


def as_lines(report: LintReport) -> list[Line]:
    """Return the report as text."""
    lines = [Line(text) for text in _sizes(report)]
    for finding in report.findings:
        file = f"{finding.file}: " if len(report.files) > 1 else ""
        lines.append(Line(f"{finding.severity}: {finding.rule}: {file}{finding}", COLORS[finding.severity]))
        lines += [Line("    " + example.replace("\n", "\n      "), "dim") for example in finding.examples]
    return [*lines, Line(summary(report), "green" if not any(report.counts.values()) else "bold")]


def as_json(report: LintReport) -> str:
    """Return the report as JSON with all rows; non-ASCII characters are escaped."""
    return json.dumps(report.as_dict(), indent=2) + "\n"


def as_page(report: LintReport) -> str:
    """Return the report as a page that opens offline."""
    return render(
        "lint.html",
        title=f"Data check of {report.data}",
        style=asset("static/lint.css"),
        lines=[*_sizes(report), summary(report)],
        findings=report.findings,
        rows=[[f"{row} ({other})" for row, other in f.pairs] or [str(row) for row in f.rows] for f in report.findings],
    )


def summary(report: LintReport) -> str:
    """Return, for example, ``2 errors, 1 warning. --fix OUT.csv writes a cleaned copy without 2 of them.``"""
    if not report.findings:
        return "No problems found."
    counted = ", ".join(count(number, severity) for severity, number in report.counts.items() if number)
    fixable = sum(finding.fixable for finding in report.findings)
    suffix = Path(report.data).suffix.lower()
    offers_fix = fixable and suffix in FIXABLE
    return f"{counted}." + (
        f" {option('fix', f'OUT{suffix}')} writes a cleaned copy without {fixable} of them." if offers_fix else ""
    )


def _sizes(report: LintReport) -> list[str]:
    return [
        f"{file.file}: {count(file.rows, 'row')}, {count(file.usable, f'usable {file.noun}')}" for file in report.files
    ]
