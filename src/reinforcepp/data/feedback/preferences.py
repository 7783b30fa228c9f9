"""From votes to preference pairs: rows in TRL's format for training and export.

Votes of one unit are averaged, so a pair occurs once, with a margin that is smaller if labelers disagree. People come first:
judges count only for units without a vote of a person. Gold units and repeats test labelers and make no rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from reinforcepp.data.feedback import schema
from reinforcepp.data.feedback.records import Answer, Unit, units_by_id
from reinforcepp.data.feedback.store import Store
from reinforcepp.data.feedback.votes import MAX_STRENGTH, Edit, Ratings, Vote, parse_vote
from reinforcepp.types import Conversation

SMALLEST_MARGIN = 1e-9
"""Below it, the votes of a unit are a tie."""
CHUNK_UNITS = 500


@dataclass(frozen=True)
class Cast:
    """A vote that counts, with who made it.

    Attributes:
        unit_id: The unit.
        labeler: Name of the labeler.
        kind: Whether the labeler is a person or a judge.
        vote: The vote, by positions in the unit.
        order: Positions in the order in which the labeler saw them; empty for judges.
        seconds: Time that it took.
        repeat: Whether it repeats an earlier unit of the labeler.
        created: When it was stored.
    """

    unit_id: int
    labeler: str
    kind: str
    vote: Vote
    order: tuple[int, ...]
    seconds: float
    repeat: bool
    created: float


def cast_votes(db: Connection, units: Mapping[int, Unit]) -> list[Cast]:
    """Return the votes on ``units`` that count, skipped ones included, in the order of the units."""
    a, v, people = schema.assignments, schema.votes, schema.labelers
    query = (
        sa.select(a, v.c.value, v.c.seconds, v.c.created, people.c.name, people.c.kind)
        .join(v, sa.and_(v.c.assignment_id == a.c.id, v.c.undone.is_(None)))
        .join(people, people.c.id == a.c.labeler_id)
        .where(a.c.unit_id.in_(list(units)))
        .order_by(a.c.unit_id, v.c.id)
    )
    found = []
    for row in db.execute(query):
        unit = units[row.unit_id]
        vote = parse_vote(unit.task, len(unit.answers), row.value)
        found.append(
            Cast(row.unit_id, row.name, row.kind, vote, tuple(row.order), row.seconds, row.repeat, row.created)
        )
    return found


def all_votes(store: Store) -> Iterator[tuple[Unit, list[Cast]]]:
    """Yield every unit that has votes, with them."""
    u = schema.units
    last = 0
    while True:
        with store.read() as db:
            ids = list(db.execute(sa.select(u.c.id).where(u.c.id > last).order_by(u.c.id).limit(CHUNK_UNITS)).scalars())
            units = units_by_id(db, ids)
            casts = cast_votes(db, units)
        for unit_id, group in groupby(casts, key=lambda each: each.unit_id):
            yield units[unit_id], list(group)
        if not ids:
            return
        last = ids[-1]


def training_rows(store: Store, strength: str = "margin") -> Iterator[dict[str, Any]]:
    """Yield the cells that reward training reads: the pair, its margin, whether it is a tie, and ratings by criterion.

    With the ``strength`` "weight", pairs have no margin, but a weight: 1 for better and ties, 2 for much better.
    """
    for row in preference_rows(store):
        cells = {name: cell for name, cell in row.items() if name not in METADATA}
        if strength == "weight":
            margin = cells.pop("margin")
            cells["weight"] = 1.0 if cells["tie"] else margin * MAX_STRENGTH
        yield cells


METADATA = (
    *("labeler", "votes", "seconds", "topic", "task"),
    *(f"{side}_{name}" for side in ("chosen", "rejected") for name in ("model", "temperature", "truncated")),
)
"""Columns of exported rows that training doesn't read."""


def preference_rows(store: Store) -> Iterator[dict[str, Any]]:
    """Yield a row for every pair of answers that was compared, with metadata columns."""
    for unit, casts in all_votes(store):
        if unit.gold is None:
            kept = [each for each in casts if not each.repeat]
            people = [each for each in kept if each.kind == "human" and each.vote.preferences()]
            yield from _rows_of(unit, people or kept)


def _rows_of(unit: Unit, casts: Sequence[Cast]) -> Iterator[dict[str, Any]]:
    margins: dict[tuple[int, int], list[float]] = defaultdict(list)
    for cast in casts:
        for first, second, margin in cast.vote.preferences():
            margins[first, second].append(margin)
    voters = [each for each in casts if each.vote.preferences()]
    for (first, second), signed in margins.items():
        mean = fmean(signed)
        chosen, rejected = (first, second) if mean >= 0 else (second, first)
        yield {
            **_pair(unit, unit.answers[chosen].text, unit.answers[rejected].text, abs(mean)),
            **_ratings(voters, chosen, rejected),
            **_metadata(unit, voters, unit.answers[chosen], unit.answers[rejected]),
        }
    for cast in casts:
        if isinstance(cast.vote, Edit) and cast.vote.text.strip() != unit.answers[cast.vote.better].text.strip():
            original = unit.answers[cast.vote.better]
            yield {
                **_pair(unit, cast.vote.text, original.text, 1 / MAX_STRENGTH),
                **_metadata(unit, [cast], Answer(cast.vote.text), original),
            }


def _pair(unit: Unit, chosen: str, rejected: str, margin: float) -> dict[str, Any]:
    tie = margin < SMALLEST_MARGIN
    return {
        "prompt": unit.prompt,
        "chosen": _as_cell(unit.prompt, chosen),
        "rejected": _as_cell(unit.prompt, rejected),
        "margin": 0.0 if tie else round(margin, 6),
        "tie": tie,
        **unit.variables,
    }


def _as_cell(prompt: Conversation, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _ratings(casts: Sequence[Cast], chosen: int, rejected: int) -> dict[str, float]:
    rated = [each.vote.ratings for each in casts if isinstance(each.vote, Ratings)]
    criteria = dict.fromkeys(name for ratings in rated for name in ratings[0])
    return {
        f"{side}_{name}": fmean(ratings[position][name] for ratings in rated if name in ratings[position])
        for name in criteria
        for side, position in (("chosen", chosen), ("rejected", rejected))
    }


def _metadata(unit: Unit, casts: Sequence[Cast], chosen: Answer, rejected: Answer) -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        "labeler": ", ".join(dict.fromkeys(each.labeler for each in casts)),
        "votes": len(casts),
        "seconds": round(fmean(each.seconds for each in casts), 2),
        "topic": unit.topic,
        "task": unit.task,
        **{f"{side}_model": each.model for side, each in sides.items()},
        **{f"{side}_temperature": each.sampling.get("temperature") for side, each in sides.items()},
        **{f"{side}_truncated": each.truncated for side, each in sides.items()},
    }
