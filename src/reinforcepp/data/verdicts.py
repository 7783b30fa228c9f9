"""Files in which a row holds several answers and says which one is better: by a verdict, by scores, or by ranks.

Each format of this kind is an entry of ``VERDICTS`` or ``RANKINGS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reinforcepp.data.messages import UnusableCell


class Choice(NamedTuple):
    """The better and the worse answer of a row, or its problem; in a ``tie``, the order means nothing."""

    chosen: Any = None
    rejected: Any = None
    tie: bool = False
    problem: str | None = None


class Verdict(NamedTuple):
    """Two answers, and a column that says which one is better.

    Attributes:
        answers: Columns of the two answers.
        column: Column of the verdict.
        first: Verdicts for the first answer, as text.
        second: Verdicts for the second answer.
        tie: Verdicts for neither.
        prompt: Column of the prompt, if the usual names don't include it.
    """

    answers: tuple[str, str]
    column: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    tie: tuple[str, ...] = ()
    prompt: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the choice needs."""
        return (*self.answers, self.column)

    @property
    def note(self) -> str:
        """Remark for the user."""
        return f"chosen and rejected from {self.answers[0]!r} and {self.answers[1]!r} by the column {self.column!r}"

    def fits(self, cells: Mapping[str, Any]) -> bool:
        """Return whether a row has the format."""
        return True

    def choose(self, cells: Mapping[str, Any]) -> Choice:
        """Return the two answers of a row in order.

        Raises:
            UnusableCell: The verdict is unknown.
        """
        one, other = (cells.get(name) for name in self.answers)
        verdict = _as_text(cells.get(self.column))
        if verdict in self.second:
            return Choice(other, one)
        if verdict in self.first or verdict in self.tie:
            return Choice(one, other, verdict in self.tie)
        known = ", ".join((*self.first, *self.second, *self.tie))
        raise UnusableCell(
            f"without a verdict in {self.column!r}",
            f"{self.column!r} holds {str(cells.get(self.column))[:40]!r}, expected one of {known}",
        )


class Ranking(NamedTuple):
    """A list of answers with scores or ranks, of which the best and the worst form a pair.

    Attributes:
        answers: Column of the answers.
        text: Key of an answer's text, if the answers are objects.
        scores: Keys of an answer's score, the first that is present counts; for answers that are texts, columns.
        lowest_is_best: Whether the scores are ranks.
    """

    answers: str
    text: str | None
    scores: tuple[str, ...]
    lowest_is_best: bool = False

    @property
    def prompt(self) -> None:
        """The prompt is in a column with a usual name."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the choice needs."""
        return (self.answers,)

    @property
    def note(self) -> str:
        """Remark for the user."""
        return f"chosen and rejected are the best and the worst answer in {self.answers!r} by {self.scores[0]!r}"

    def fits(self, cells: Mapping[str, Any]) -> bool:
        """Return whether a row has the format."""
        answers = cells.get(self.answers)
        if not isinstance(answers, list) or not answers:
            return False
        if self.text is None:
            return isinstance(answers[0], str) and any(isinstance(cells.get(name), list) for name in self.scores)
        return isinstance(answers[0], Mapping) and self.text in answers[0] and bool(answers[0].keys() & {*self.scores})

    def choose(self, cells: Mapping[str, Any]) -> Choice:
        """Return the best and the worst answer of a row, the first of equal ones.

        Raises:
            UnusableCell: The answers aren't a list.
        """
        answers = cells.get(self.answers)
        if not isinstance(answers, list | None):
            problem = f"{self.answers!r} holds {str(answers)[:40]!r}, expected a list of answers"
            raise UnusableCell(f"without a list in {self.answers!r}", problem)
        rated = self._rated(answers or [], cells)
        if len(rated) < 2:
            return Choice(problem=f"with fewer than two rated answers in {self.answers!r}")
        best, worst = max(rated, key=lambda each: each[0]), min(rated, key=lambda each: each[0])
        return Choice(best[1], worst[1]) if best[0] > worst[0] else Choice(problem="with equally rated answers")

    def _rated(self, answers: Sequence[Any], cells: Mapping[str, Any]) -> list[tuple[float, Any]]:
        """Return the answers with scores, of which higher ones are better; answers without a score don't count."""
        if self.text is None:
            found = (cells.get(name) for name in self.scores)
            scores: Sequence[Any] = next((each for each in found if isinstance(each, list)), [])
            texts: Sequence[Any] = answers
        else:
            objects = [each for each in answers if isinstance(each, Mapping)]
            scores = [next((each[key] for key in self.scores if each.get(key) is not None), None) for each in objects]
            texts = [each.get(self.text) for each in objects]
        numbers = map(_as_number, scores)
        sign = -1 if self.lowest_is_best else 1
        return [(sign * score, text) for score, text in zip(numbers, texts, strict=False) if not math.isnan(score)]


VERDICTS = (
    Verdict(("response_0", "response_1"), "better_response_id", ("0",), ("1",)),
    Verdict(("human_ref_A", "human_ref_B"), "labels", ("1",), ("0",), prompt="history"),
    Verdict(("response1", "response2"), "overall_preference", ("-3", "-2", "-1"), ("1", "2", "3"), ("0",), "context"),
    Verdict(("conversation_a", "conversation_b"), "winner", ("model_a",), ("model_b",), ("tie", "tie (bothbad)")),
    Verdict(("response_a", "response_b"), "winner", ("model_a", "a"), ("model_b", "b"), ("tie", "tie (bothbad)")),
)
"""PKU-SafeRLHF, Stanford Human Preferences, HelpSteer3, LMSYS Chatbot Arena with conversations and with answers."""
RANKINGS = (
    Ranking("completions", "response", ("fine-grained_score", "overall_score")),
    Ranking("generations", None, ("ratings", "rating")),
    Ranking("answers", "answer", ("rank",), lowest_is_best=True),
)
"""UltraFeedback, distilabel, Nectar. The mean of UltraFeedback's criteria is more reliable than its overall score."""
Judged = Verdict | Ranking


def find_judged(names: Sequence[str], cells: Mapping[str, Any]) -> Judged | None:
    """Return the format of a file with these columns and this first row, if it is one of this kind."""
    formats: tuple[Judged, ...] = (*VERDICTS, *RANKINGS)
    return next((each for each in formats if {*each.columns} <= {*names} and each.fits(cells)), None)


def _as_text(cell: Any) -> str:
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, bool):
        cell = int(cell)
    return str(cell).strip().lower()


def _as_number(cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan
