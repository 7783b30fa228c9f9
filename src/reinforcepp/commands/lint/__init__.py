"""Check a data file before training: rules, reports and a cleaned copy."""

from reinforcepp.commands.lint.check import lint
from reinforcepp.commands.lint.findings import Finding, Report

__all__ = ["Finding", "Report", "lint"]
