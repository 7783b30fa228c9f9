"""From the fields of a labeler's form to a vote: the page numbers responses from 1 in its own order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from reinforcepp.data.feedback.votes import Vote, parse_vote, reordered
from reinforcepp.errors import DataError

MAX_SECONDS = 86_400.0


def vote_of(task: str, order: Sequence[int], fields: Mapping[str, str], criteria: Sequence[str] = ()) -> Vote:
    """Return the vote in a form.

    Args:
        task: The unit's task.
        order: Positions of the answers in the order of the page.
        fields: ``choice`` is ``skip``; for a pair ``1``, ``1+`` (much better), ``2``, ``2+``, ``good`` or ``bad``; when
            editing, the number of the better response, whose text is ``text_1`` or ``text_2``. Further, ``rank_1`` and
            so on, and ``rating_1_helpful`` and so on.
        criteria: Those of a rating.

    Raises:
        DataError: The form isn't complete.
    """
    choice = fields.get("choice", "")
    numbers = range(1, len(order) + 1)
    try:
        if choice == "skip":
            value: dict[str, object] = {"skip": True}
        elif task == "pair" and choice in ("good", "bad"):
            value = {"tie": choice}
        elif task == "pair":
            value = {"better": int(choice.removesuffix("+")) - 1, "strength": 1 + choice.endswith("+")}
        elif task == "edit":
            value = {"better": int(choice) - 1, "text": fields[f"text_{choice}"].replace("\r\n", "\n")}
        elif task == "rank":
            value = {"ranks": [int(fields[f"rank_{number}"]) for number in numbers]}
        else:
            value = {
                "ratings": [{name: int(fields[f"rating_{number}_{name}"]) for name in criteria} for number in numbers]
            }
    except (KeyError, ValueError):
        raise DataError(MISSING[task]) from None
    return reordered(parse_vote(task, len(order), value, criteria), order)


MISSING = {
    "pair": "The choice is missing. Choose the better response, a tie, or skip.",
    "edit": "The edited text is missing. Choose the better response and edit it, or skip.",
    "rank": "A rank is missing. Give each response a rank, or skip.",
    "rate": "A rating is missing. Rate each response by each criterion, or skip.",
}


def seconds_of(fields: Mapping[str, str]) -> float:
    """Return the time that the page measured, in seconds; without a measurement, the most possible."""
    try:
        seconds = float(fields.get("seconds", ""))
    except ValueError:
        return MAX_SECONDS
    return seconds if math.isfinite(seconds) and seconds > 0 else MAX_SECONDS
