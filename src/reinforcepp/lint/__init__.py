"""Checking a data file before anything is trained on it: rules, reports and a cleaned copy."""

from reinforcepp.lint.findings import Finding, Report

__all__ = ["Finding", "Report"]
