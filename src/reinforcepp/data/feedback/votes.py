"""What a labeler can decide about a unit, and the preferences that follow from it.

Answers are numbered from 0 by their position in the unit, whatever the order on the labeler's page.

    task   value in JSON
    pair   {"better": 0, "strength": 2} or {"tie": "good"} or {"tie": "bad"}
    rank   {"ranks": [2, 1, 3]}, one rank per answer, 1 is best, equal ranks are ties
    rate   {"ratings": [{"helpful": 4}, {"helpful": 2}]}, 1 to 5 by criterion, for each answer
    edit   {"better": 0, "text": "The corrected answer."}
    any    {"skip": true}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import fmean
from typing import Any, Literal, NamedTuple, TypeVar

from reinforcepp.errors import DataError, shown

T = TypeVar("T")
MAX_STRENGTH = 2
"""1 is better, 2 is much better."""
MAX_RATING = 5
MAX_EDITED_CHARACTERS = 200_000


class Compared(NamedTuple):
    """The first answer compared with the second.

    ``margin`` is positive if ``first`` is better, negative if ``second`` is, and 0 for a tie: at most 1 in size, which is much
    better, the best rank against the last, or the best rating against the worst.
    """

    first: int
    second: int
    margin: float


@dataclass(frozen=True)
class Skip:
    """The labeler decided nothing."""

    def preferences(self) -> list[Compared]:
        """Return no preference."""
        return []

    def value(self) -> dict[str, Any]:
        """Return the vote as JSON."""
        return {"skip": True}


@dataclass(frozen=True)
class Choice:
    """The better one of two answers, or a tie.

    Attributes:
        better: Position of the better answer; None for a tie.
        strength: How much better it is, from 1 to ``MAX_STRENGTH``.
        tie: For a tie, whether both answers are good or bad.
    """

    better: int | None
    strength: int = 1
    tie: Literal["good", "bad"] | None = None

    def preferences(self) -> list[Compared]:
        """Return the preference."""
        sign = 0.0 if self.better is None else 1.0 - 2.0 * self.better
        return [Compared(0, 1, sign * self.strength / MAX_STRENGTH)]

    def value(self) -> dict[str, Any]:
        """Return the vote as JSON."""
        return {"tie": self.tie} if self.better is None else {"better": self.better, "strength": self.strength}


@dataclass(frozen=True)
class Ranking:
    """A rank per answer; 1 is best, and equal ranks are ties."""

    ranks: tuple[int, ...]

    def preferences(self) -> list[Compared]:
        """Return a preference for every pair of answers."""
        most = max(len(self.ranks) - 1, 1)
        return [
            Compared(i, j, (self.ranks[j] - self.ranks[i]) / most) for i, j in combinations(range(len(self.ranks)), 2)
        ]

    def value(self) -> dict[str, Any]:
        """Return the vote as JSON."""
        return {"ranks": list(self.ranks)}


@dataclass(frozen=True)
class Ratings:
    """Ratings of each answer, from 1 to ``MAX_RATING`` by criterion."""

    ratings: tuple[Mapping[str, int], ...]

    def preferences(self) -> list[Compared]:
        """Return a preference for every pair of answers, by the means over the criteria."""
        means = [fmean(each.values()) for each in self.ratings]
        return [Compared(i, j, (means[i] - means[j]) / (MAX_RATING - 1)) for i, j in combinations(range(len(means)), 2)]

    def value(self) -> dict[str, Any]:
        """Return the vote as JSON."""
        return {"ratings": [dict(each) for each in self.ratings]}


@dataclass(frozen=True)
class Edit:
    """The better answer as the labeler corrected it: ``text`` is better than the original at ``better``."""

    better: int
    text: str
    num_answers: int = 1

    def preferences(self) -> list[Compared]:
        """Return the preference of the original over each other answer; the corrected text isn't one of the unit's answers."""
        others = (each for each in range(self.num_answers) if each != self.better)
        signed = ((min(self.better, other), max(self.better, other), other > self.better) for other in others)
        return [Compared(i, j, (1 if first else -1) / MAX_STRENGTH) for i, j, first in signed]

    def value(self) -> dict[str, Any]:
        """Return the vote as JSON."""
        return {"better": self.better, "text": self.text}


Vote = Skip | Choice | Ranking | Ratings | Edit


def parse_vote(task: str, num_answers: int, value: Any, criteria: Sequence[str] = ()) -> Vote:
    """Return the vote in a JSON value; ``criteria`` are those that a rating must have, if given.

    Raises:
        DataError: The value isn't a vote on such a unit.
    """
    try:
        vote = _parse(task, num_answers, value, criteria)
    except (AttributeError, KeyError, TypeError, ValueError):  # of another shape
        vote = None
    if vote is None:
        raise DataError(f"vote: {shown(value)} isn't a vote for the task {task!r} on {num_answers} answers.")
    return vote


def reordered(vote: Vote, positions: Sequence[int]) -> Vote:
    """Return a vote on answers in another order: ``positions`` holds the new position of each answer."""

    def moved(values: Sequence[T]) -> tuple[T, ...]:
        return tuple(value for _, value in sorted(zip(positions, values, strict=True), key=lambda each: each[0]))

    if isinstance(vote, Choice) and vote.better is not None:
        return replace(vote, better=positions[vote.better])
    if isinstance(vote, Edit):
        return replace(vote, better=positions[vote.better])
    if isinstance(vote, Ranking):
        return Ranking(moved(vote.ranks))
    return Ratings(moved(vote.ratings)) if isinstance(vote, Ratings) else vote


def _parse(task: str, num_answers: int, value: Any, criteria: Sequence[str]) -> Vote | None:
    if value.get("skip") is True:
        return Skip()
    if task == "pair" and "tie" in value:
        return Choice(None, tie=value["tie"]) if value["tie"] in ("good", "bad") else None
    if task == "pair" and num_answers == 2:
        strength = value.get("strength", 1)
        return Choice(_at(value["better"], num_answers), _at(strength, MAX_STRENGTH + 1, least=1))
    if task == "rank" and len(value["ranks"]) == num_answers:
        return Ranking(tuple(_at(rank, num_answers + 1, least=1) for rank in value["ranks"]))
    if task == "rate" and len(value["ratings"]) == num_answers:
        ratings = tuple(
            {str(name): _at(number, MAX_RATING + 1, least=1) for name, number in each.items()}
            for each in value["ratings"]
        )
        same = all(each and each.keys() == (set(criteria) or ratings[0].keys()) for each in ratings)
        return Ratings(ratings) if same else None
    if task == "edit":
        text = value["text"]
        usable = isinstance(text, str) and text.strip() and len(text) <= MAX_EDITED_CHARACTERS
        return Edit(_at(value["better"], num_answers), text, num_answers) if usable else None
    return None


def _at(number: Any, end: int, *, least: int = 0) -> int:
    if type(number) is not int or not least <= number < end:
        raise ValueError("out of range")
    return number
