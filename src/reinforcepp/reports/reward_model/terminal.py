"""A summary of a reward model on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from reinforcepp.reports.reward_model.metrics import Analysis, Bucket
from reinforcepp.reports.reward_model.verdict import is_sound, verdict
from reinforcepp.rewards.card import RewardCard
from reinforcepp.runtime.terminal import console, echo

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


def print_criteria(card: RewardCard, analyses: Mapping[str, Analysis]) -> None:
    """Print a table of the criteria on the held-out pairs, the correlations of their scores, and a verdict on each."""
    table = Table("criterion", "pairs", "ties", "accuracy", "95% interval", "length-only", "training")
    for column in table.columns[1:]:
        column.justify = "right"
    for criterion in card.criteria:
        cells = [str(criterion.heldout_pairs), str(criterion.heldout_ties)]
        train = "-" if criterion.train_accuracy is None else f"{criterion.train_accuracy:.2f}"
        if (analysis := analyses.get(criterion.name)) is None:
            table.add_row(criterion.name, *cells, "-", "-", "-", train)
            continue
        right, longer = analysis.right, analysis.metrics.longer_wins
        interval = f"{right.low:.2f} to {right.high:.2f}"
        table.add_row(criterion.name, *cells, f"{right.value:.2f}", interval, f"{longer:.2f}", train)
    console.print(table)
    names = [criterion.name for criterion in card.criteria]
    if len(names) > 1 and card.correlations:
        found = [
            f"{one} and {other} {card.correlations[i][j]:+.2f}"
            for i, one in enumerate(names)
            for j, other in enumerate(names)
            if i < j
        ]
        echo(f"Correlation of held-out scores: {'; '.join(found)}")
    for name in names:
        if (analysis := analyses.get(name)) is None:
            echo(f"{name}: no held-out pair has a judgment, so its quality is unknown.", "yellow")
            continue
        accuracy = next(criterion.train_accuracy for criterion in card.criteria if criterion.name == name)
        echo(f"{name}: {verdict(analysis, accuracy)}", "green" if is_sound(analysis) else "yellow")


def bucket_table(title: str, buckets: Sequence[Bucket]) -> Table:
    """Return a table with one row per bucket. The labels never contain text of the data."""
    table = Table(title, "pairs", "accuracy", "95% interval")
    for column in table.columns[1:]:
        column.justify = "right"
    for bucket in buckets:
        right = bucket.right
        table.add_row(bucket.label, str(right.count), f"{right.value:.2f}", f"{right.low:.2f} to {right.high:.2f}")
    return table
