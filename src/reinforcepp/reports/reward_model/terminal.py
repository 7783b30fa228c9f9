"""A summary of a reward model on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from reinforcepp.monitoring import console, echo
from reinforcepp.reports.reward_model.metrics import Analysis, Bucket
from reinforcepp.reports.reward_model.verdict import is_sound, verdict
from reinforcepp.rewards.card import RewardCard

MIN_PAIRS_FOR_TABLES = 40


def print_summary(card: RewardCard, analysis: Analysis | None) -> None:
    """Print metrics, verdict and, for enough pairs, accuracy by margin and by length difference."""
    if analysis is None:
        echo("No pairs were held out, so the quality of this reward model is unknown.", "yellow")
        return
    m = analysis.metrics
    ties = f", {m.ties} ties" if m.ties else ""
    echo(
        f"{m.pairs} held-out pairs: accuracy {m.accuracy:.2f}{ties} (length-only baseline {m.longer_wins:.2f}), "
        f"mean margin {m.mean_margin:.2f}, calibration error {m.calibration_error:.2f}, "
        f"correlation of score and length {m.length_correlation:+.2f}"
    )
    if m.pairs >= MIN_PAIRS_FOR_TABLES:
        console.print(bucket_table("margin", analysis.by_margin))
        console.print(bucket_table("chosen response", analysis.by_length_difference))
    echo(verdict(analysis, card.train_accuracy), "green" if is_sound(analysis) else "yellow")


def bucket_table(title: str, buckets: Sequence[Bucket]) -> Table:
    """Return a table with one row per bucket. The labels never contain text of the data."""
    table = Table(title, "pairs", "accuracy", "95% interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for bucket in buckets:
        right = bucket.right
        table.add_row(bucket.label, str(right.count), f"{right.value:.2f}", f"{right.low:.2f} to {right.high:.2f}")
    return table
