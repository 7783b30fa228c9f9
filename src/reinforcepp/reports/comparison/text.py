"""The comparison in words and as a table, for the terminal and for the page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from reinforcepp.monitoring import printable
from reinforcepp.reports.comparison.result import Figures, ModelComparison
from reinforcepp.reports.comparison.statistics import FEWEST_DECIDED, Outcome, Rate, Winner

RARE = 0.05
"""Share of comparisons under which a sign of the length difference hardly occurs."""


class Line(NamedTuple):
    """A line of the table: what is told, for A and for B."""

    name: str
    a: str
    b: str


# --- in words -------------------------------------------------------------------------------------------------------


def verdict(comparison: ModelComparison) -> str:
    """``Verdict: B is better (win rate of B 0.750, 95 % interval 0.690 to 0.810), at equal length, too (...).``"""
    outcome = comparison.outcome
    raw, equal = outcome.winner, outcome.length_controlled_winner
    told = f"Verdict: {_shown(raw)} ({_too_few(outcome)}win rate of B {_rate(outcome.win_rate)})"
    alike = ", nor at equal length" if raw is None else ", at equal length, too"
    joint = alike if raw == equal else f"; at equal length {_shown(equal)}"
    return f"{told}{joint} ({_rate(outcome.length_controlled, brief=True)})."


def _too_few(outcome: Outcome) -> str:
    """Why nothing is shown whatever the interval says, where so few prompts can show nothing."""
    if outcome.decided == 0:
        return "the models tie on every prompt; "
    if outcome.decided < FEWEST_DECIDED:
        return f"the models differ on {outcome.decided} of {outcome.prompts} prompts, which is too few to tell; "
    return ""


def wins(comparison: ModelComparison) -> str:
    """``B wins 71, ties 40 and loses 11 of 122 comparisons ...``"""
    outcome = comparison.outcome
    total = outcome.wins + outcome.ties + outcome.losses
    of_prompts = "" if total == outcome.prompts else f" on {outcome.prompts} prompts"
    return (
        f"By {comparison.judge}, B wins {outcome.wins}, ties {outcome.ties} and loses {outcome.losses} of "
        f"{total} comparisons{of_prompts}; a tie counts half. ± is the standard error over prompts."
    )


def limits(outcome: Outcome) -> list[str]:
    """What keeps the figures from saying more."""
    told = []
    if min(outcome.longer, outcome.shorter) < RARE < max(outcome.longer, outcome.shorter):
        which = ("longer", outcome.longer) if outcome.longer > outcome.shorter else ("shorter", outcome.shorter)
        told.append(
            f"B's answer is the {which[0]} one in {which[1]:.0%} of the comparisons, so the rate at equal length is a guess "
            "beyond what was seen."
        )
    return told


def _shown(winner: Winner | None) -> str:
    return "no difference shown" if winner is None else f"{winner} is better"


def _rate(rate: Rate, *, brief: bool = False) -> str:
    return f"{rate.value:.3f}, {'' if brief else '95 % interval '}{rate.low:.3f} to {rate.high:.3f}"


# --- the table ------------------------------------------------------------------------------------------------------


def lines(comparison: ModelComparison) -> list[Line]:
    """The figures that there are, side by side."""
    a, b = comparison.figures["A"], comparison.figures["B"]

    def line(name: str, told: Callable[[Figures], str]) -> Line:
        return Line(name, told(a), told(b))

    listed = [
        line("judge's score", lambda own: f"{own.judge:.3f} ± {own.judge_error:.3f}"),
        line("length, tokens", lambda own: f"{own.length:.1f}"),
        line("length, characters", lambda own: f"{own.characters:.1f}"),
        line("cut off at the length limit", lambda own: f"{own.truncated:.0%}"),
        line("different answers", lambda own: f"{own.distinct:.0%}"),
        line("different words (distinct-1)", lambda own: f"{own.distinct_1:.3f}"),
        line("different word pairs (distinct-2)", lambda own: f"{own.distinct_2:.3f}"),
        line(f"KL to {comparison.reference}, nats per token", _kl),
        line("perplexity on the chosen answers", _perplexity),
    ]
    return [each for each in listed if (each.a, each.b) != ("-", "-")]


def rates(comparison: ModelComparison) -> list[tuple[str, str]]:
    """The win rates with their intervals."""
    outcome = comparison.outcome
    return [
        ("win rate of B over A", _rate(outcome.win_rate)),
        ("the same at equal length", _rate(outcome.length_controlled)),
    ]


def _kl(own: Figures) -> str:
    return "-" if own.kl is None else f"{own.kl:.3f} ± {own.kl_error:.3f}"


def _perplexity(own: Figures) -> str:
    if own.perplexity is None:
        return "-"
    return format(own.perplexity, ".3g" if own.perplexity < 1000 else ",.0f")


def show(comparison: ModelComparison) -> None:
    """Table, rates, notes and, as the last line, the verdict, on standard output."""
    terminal = Console(highlight=False)
    with terminal.capture() as shown:  # rich would end the process by itself where the reader has gone
        for side, name in (("A", comparison.settings["model_a"]), ("B", comparison.settings["model_b"])):
            terminal.print(printable(f"{side}: {name}"), markup=False, soft_wrap=True)
        table = Table("", *(Column(side, justify="right") for side in "AB"))
        for line in lines(comparison):
            table.add_row(*(Text(printable(cell)) for cell in line))
        terminal.print(table)
        for text in (wins(comparison), *(f"{name}: {rate}" for name, rate in rates(comparison))):
            terminal.print(printable(text), markup=False, soft_wrap=True)
        for note in comparison.notes:
            terminal.print(printable(f"Note: {note}"), style="yellow", markup=False, soft_wrap=True)
        terminal.print(printable(verdict(comparison)), style="bold", markup=False, soft_wrap=True)
    sys.stdout.write(shown.get())
    sys.stdout.flush()  # so that a reader that has gone shows here, not when Python ends
