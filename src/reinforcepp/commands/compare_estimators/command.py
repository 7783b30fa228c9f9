"""The command ``compare-algorithms``: train with every estimator, print the results and write the page."""

from __future__ import annotations

from pathlib import Path

from reinforcepp.commands.compare_estimators.run import compare_algorithms, print_summary
from reinforcepp.config import CompareAlgorithmsConfig
from reinforcepp.reports.estimators import verdict, write_page
from reinforcepp.runtime.terminal import echo


def run_compare_estimators(config: CompareAlgorithmsConfig) -> None:
    """Train with every estimator and write the page."""
    comparison = compare_algorithms(config)
    print_summary(comparison)
    page = Path(config.output_dir).expanduser() / "comparison.html"
    write_page(comparison, page)
    echo(f"{verdict(comparison)} Saved the page to {page}.", "green")
