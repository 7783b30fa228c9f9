"""What a reward model is worth, in a few lines on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from reinforcepp.monitoring import console, echo
from reinforcepp.reports.reward_model.figures import Analysis, Bucket
from reinforcepp.reports.reward_model.verdict import is_sound, verdict
from reinforcepp.rewards.card import RewardCard

ENOUGH_FOR_TABLES = 40


def tell(card: RewardCard, analysis: Analysis | None) -> None:
    """Figures, verdict and, where there are enough pairs, in which of them the model is right."""
    if analysis is None:
        echo("No pair was held out, so nothing is known about this reward model beyond its training data.", "yellow")
        return
    f = analysis.figures
    ties = f", {f.ties} ties" if f.ties else ""
    echo(
        f"Held out {f.pairs} pairs: accuracy {f.accuracy:.2f}{ties} (the longer one wins: {f.longer_wins:.2f}), "
        f"margin {f.mean_margin:.2f}, calibration error {f.calibration_error:.2f}, "
        f"correlation of score with length {f.length_correlation:+.2f}"
    )
    if f.pairs >= ENOUGH_FOR_TABLES:
        console.print(bucket_table("margin", analysis.by_margin))
        console.print(bucket_table("chosen answer", analysis.by_length_difference))
    echo(verdict(analysis, card.train_accuracy), "green" if is_sound(analysis) else "yellow")


def bucket_table(title: str, buckets: Sequence[Bucket]) -> Table:
    """One row per bucket; its labels are ours, never text of the data."""
    table = Table(title, "pairs", "accuracy", "95 % interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for bucket in buckets:
        right = bucket.right
        table.add_row(bucket.label, str(right.count), f"{right.value:.2f}", f"{right.low:.2f} to {right.high:.2f}")
    return table
