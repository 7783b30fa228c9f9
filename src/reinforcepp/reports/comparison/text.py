"""The comparison as sentences and as a table, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from rich.table import Column, Table
from rich.text import Text

from reinforcepp.reports.comparison.result import ModelComparison, ModelMetrics
from reinforcepp.reports.comparison.statistics import MIN_DECIDED, Outcome, Rate, Winner
from reinforcepp.runtime.terminal import Console

RARE = 0.05
"""Share of comparisons below which a sign of the length difference is rare."""


class Line(NamedTuple):
    """A row of the table: the metric, its value for A, and its value for B."""

    name: str
    a: str
    b: str


# --- sentences ------------------------------------------------------------------------------------------------------


def verdict(comparison: ModelComparison) -> str:
    """Return ``Verdict: B is better (win rate of B 0.750, 95% interval 0.690 to 0.810); length-controlled: ...``."""
    outcome = comparison.outcome
    return (
        f"Verdict: {_winner(outcome.winner)} ({_too_few(outcome)}win rate of B {_rate(outcome.win_rate)}); "
        f"length-controlled: {_winner(outcome.length_controlled_winner)} ({_rate(outcome.length_controlled, brief=True)})."
    )


def _too_few(outcome: Outcome) -> str:
    """Return why the verdict is inconclusive whatever the interval, if too few prompts differ."""
    if outcome.decided == 0:
        return "the models tie on every prompt; "
    if outcome.decided < MIN_DECIDED:
        return f"the models differ on {outcome.decided} of {outcome.prompts} prompts, which is too few; "
    return ""


def wins(comparison: ModelComparison) -> str:
    """Return ``builtin:judge: B wins 71, ties 40 and loses 11 of 122 comparisons ...``."""
    outcome = comparison.outcome
    total = outcome.wins + outcome.ties + outcome.losses
    of_prompts = "" if total == outcome.prompts else f" on {outcome.prompts} prompts"
    return (
        f"Judge {comparison.judge}: B wins {outcome.wins}, ties {outcome.ties} and loses {outcome.losses} of "
        f"{total} comparisons{of_prompts}. A tie counts as half a win. ± is the standard error over prompts."
    )


def limits(outcome: Outcome) -> list[str]:
    """Return the limitations of the metrics."""
    if not min(outcome.longer, outcome.shorter) < RARE < max(outcome.longer, outcome.shorter):
        return []
    word, share = ("longer", outcome.longer) if outcome.longer > outcome.shorter else ("shorter", outcome.shorter)
    return [
        f"B's response is the {word} one in {share:.0%} of the comparisons, so the length-controlled win rate is an "
        "extrapolation."
    ]


def _winner(winner: Winner | None) -> str:
    return "inconclusive" if winner is None else f"{winner} is better"


def _rate(rate: Rate, *, brief: bool = False) -> str:
    return f"{rate.value:.3f}, {'' if brief else '95% interval '}{rate.low:.3f} to {rate.high:.3f}"


# --- the table ------------------------------------------------------------------------------------------------------


def lines(comparison: ModelComparison) -> list[Line]:
    """Return the available metrics of both models."""
    a, b = comparison.metrics["A"], comparison.metrics["B"]

    def line(name: str, shown: Callable[[ModelMetrics], str]) -> Line:
        return Line(name, shown(a), shown(b))

    listed = [
        line("judge score", lambda metrics: f"{metrics.judge:.3f} ± {metrics.judge_error:.3f}"),
        line("length (tokens)", lambda metrics: f"{metrics.length:.1f}"),
        line("length (characters)", lambda metrics: f"{metrics.characters:.1f}"),
        line("truncated at the length limit", lambda metrics: f"{metrics.truncated:.0%}"),
        line("distinct responses", lambda metrics: f"{metrics.distinct:.0%}"),
        line("distinct words (distinct-1)", lambda metrics: f"{metrics.distinct_1:.3f}"),
        line("distinct word pairs (distinct-2)", lambda metrics: f"{metrics.distinct_2:.3f}"),
        line(f"KL to {comparison.reference} (nats/token)", _kl),
        line("perplexity on chosen responses", _perplexity),
    ]
    return [each for each in listed if (each.a, each.b) != ("-", "-")]


def rates(comparison: ModelComparison) -> list[tuple[str, str]]:
    """Return the win rates with their intervals."""
    outcome = comparison.outcome
    return [
        ("win rate of B over A", _rate(outcome.win_rate)),
        ("length-controlled win rate", _rate(outcome.length_controlled)),
    ]


def _kl(metrics: ModelMetrics) -> str:
    return "-" if metrics.kl is None else f"{metrics.kl:.3f} ± {metrics.kl_error:.3f}"


def _perplexity(metrics: ModelMetrics) -> str:
    if metrics.perplexity is None:
        return "-"
    return format(metrics.perplexity, ".3g" if metrics.perplexity < 1000 else ",.0f")


def show(comparison: ModelComparison) -> None:
    """Print table, win rates, notes and, on the last line, the verdict to standard output."""
    terminal = Console()
    for side, name in (("A", comparison.settings["model_a"]), ("B", comparison.settings["model_b"])):
        terminal.print(f"{side}: {name}", soft_wrap=True)
    table = Table("", *(Column(side, justify="right") for side in "AB"))
    for line in lines(comparison):
        table.add_row(*map(Text, line))
    terminal.print(table)
    for text in (wins(comparison), *(f"{name}: {rate}" for name, rate in rates(comparison))):
        terminal.print(text, soft_wrap=True)
    for note in comparison.notes:
        terminal.print(f"Note: {note}", style="yellow", soft_wrap=True)
    terminal.print(verdict(comparison), style="bold", soft_wrap=True)
