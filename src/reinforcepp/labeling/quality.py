"""How good the votes are: speed, gold units, repeats, and agreement of labelers and judges."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import groupby
from statistics import fmean, median
from typing import Any, NamedTuple

import sqlalchemy as sa

from reinforcepp.data.feedback import Choice, Skip, Store, Vote, parse_vote, schema
from reinforcepp.labeling.agreement import krippendorff_alpha

ALL, NO_TOPIC = "all", "without a topic"
CACHED = 4096
"""Parsed votes that are kept."""
Signs = dict[tuple[int, int], int]
"""For two answers of a unit: 1 if the first is better, -1 if the second is, 0 for a tie."""


@dataclass(frozen=True)
class Share:
    """A count of a total."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share, or None of nothing."""
        return self.count / self.total if self.total else None


@dataclass(frozen=True)
class LabelerQuality:
    """Measurements of one labeler.

    Attributes:
        name: The labeler.
        kind: Whether it is a person or a judge.
        votes: Votes that count, skipped units not included.
        skipped: Skipped units.
        seconds: Median time per vote.
        gold: Right answers of gold units.
        repeats: Repeats with the same answer as before.
        first: Better responses that were shown first; half, without a bias of position.
        alpha: Krippendorff's alpha over the units of this labeler and others; for a judge, with the people.
    """

    name: str
    kind: str
    votes: int
    skipped: int
    seconds: float | None
    gold: Share
    repeats: Share
    first: Share
    alpha: float | None


@dataclass(frozen=True)
class Quality:
    """Measurements of a database.

    Attributes:
        labelers: Those of each labeler.
        alpha: Krippendorff's alpha of people by topic; that of ``all`` first.
        judges: Agreement of each judge with the majority of people: units with the same preference.
        units: Units without gold, and those of them with enough votes.
        votes_left: Votes that the other units need.
        times: Times of the votes of people, ascending, in seconds since 1970.
    """

    labelers: tuple[LabelerQuality, ...]
    alpha: Mapping[str, float | None]
    judges: Mapping[str, Share]
    units: Share
    votes_left: int
    times: Sequence[float] = field(repr=False, default=())

    def record(self) -> dict[str, Any]:
        """Return the measurements as JSON."""
        values = asdict(self)
        del values["times"]
        return values


class _Cast(NamedTuple):
    """A vote that counts, without the texts of its unit."""

    unit_id: int
    topic: str | None
    gold: Any
    labeler: str
    kind: str
    order: Sequence[int]
    repeat: bool
    vote: Vote
    signs: Signs
    seconds: float
    created: float
    details: Mapping[str, Any]


def _casts(store: Store) -> Iterator[_Cast]:
    """Yield all votes that count, in the order of their units."""
    a, v, u = schema.assignments, schema.votes, schema.units
    p, people, ua = schema.prompts, schema.labelers, schema.unit_answers
    sizes = sa.select(ua.c.unit_id, sa.func.count().label("size")).group_by(ua.c.unit_id).subquery()
    query = (
        sa.select(u.c.id, u.c.task, u.c.gold, sizes.c.size, p.c.topic, people.c.name, people.c.kind)
        .add_columns(sa.cast(a.c.order, sa.Text), a.c.repeat, sa.cast(v.c.value, sa.Text), v.c.seconds, v.c.created)
        .add_columns(sa.case((people.c.kind == "judge", v.c.details)))
        .select_from(v)
        .join(a, a.c.id == v.c.assignment_id)
        .join(people, people.c.id == a.c.labeler_id)
        .join(u, u.c.id == a.c.unit_id)
        .join(p, p.c.id == u.c.prompt_id)
        .join(sizes, sizes.c.unit_id == u.c.id)
        .where(v.c.undone.is_(None))
        .order_by(u.c.id, v.c.id)
    )
    with store.read() as db:
        for unit_id, task, gold, size, topic, name, kind, order, repeat, value, *more in db.execute(query):
            vote, signs = _parsed(task, size, value)
            seconds, created, details = more
            own = (_order(order), repeat, vote, signs, seconds, created, details or {})
            yield _Cast(unit_id, topic, gold, name, kind, *own)


@lru_cache(maxsize=CACHED)
def _parsed(task: str, size: int, value: str) -> tuple[Vote, Signs]:
    """Return a vote and its signs; most of many votes are the same few."""
    vote = parse_vote(task, size, json.loads(value))
    return vote, {(i, j): (margin > 0) - (margin < 0) for i, j, margin in vote.preferences()}


@lru_cache(maxsize=CACHED)
def _order(value: str) -> tuple[int, ...]:
    return tuple(json.loads(value))


def measure(store: Store) -> Quality:
    """Return the measurements of all votes so far."""
    topics: dict[str, list[dict[str, int]]] = defaultdict(list)
    casts: dict[str, list[_Cast]] = defaultdict(list)
    for _, group in groupby(_casts(store), key=lambda each: each.unit_id):
        votes = list(group)
        for each in votes:
            casts[each.labeler].append(each)
        if votes[0].gold is None:
            topics[votes[0].topic or NO_TOPIC] += _cases(votes)
    kinds = {name: own[0].kind for name, own in casts.items()}
    people = {name for name, kind in kinds.items() if kind == "human"}
    cases = [case for own in topics.values() for case in own]
    units, votes_left = _progress(store)
    return Quality(
        tuple(_labeler(name, kinds[name], casts[name], cases, people) for name in sorted(casts)),
        {ALL: _alpha(cases, people)}
        | {name: _alpha(topics[name], people) for name in sorted(topics.keys() - {NO_TOPIC})},
        {name: _judge(name, cases, people) for name in sorted(kinds.keys() - people)},
        units,
        votes_left,
        sorted(each.created for name in people for each in casts[name]),
    )


def _cases(votes: Sequence[_Cast]) -> list[dict[str, int]]:
    """Return the signs by labeler for each pair of answers of a unit, repeats not included."""
    found: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for each in votes:
        if not each.repeat:
            for pair, sign in each.signs.items():
                found[pair][each.labeler] = sign
    return list(found.values())


def _alpha(cases: Iterable[Mapping[str, int]], labelers: set[str]) -> float | None:
    units = ([sign for name, sign in case.items() if name in labelers] for case in cases)
    return krippendorff_alpha(units, mirrored=True)


def _labeler(
    name: str,
    kind: str,
    casts: Sequence[_Cast],
    cases: Sequence[Mapping[str, int]],
    people: set[str],
) -> LabelerQuality:
    voted = [each for each in casts if not isinstance(each.vote, Skip)]
    gold = [each.signs == _parsed("pair", 2, json.dumps(each.gold))[1] for each in voted if each.gold is not None]
    by_unit = [list(group) for _, group in groupby(voted, key=lambda each: each.unit_id)]
    repeats = [
        group[0].signs == group[-1].signs for group in by_unit if {each.repeat for each in group} == {False, True}
    ]
    first = [won for each in voted for won in _shown_first(each)]
    return LabelerQuality(
        name,
        kind,
        votes=len(voted),
        skipped=len(casts) - len(voted),
        seconds=median(each.seconds for each in voted) if voted else None,
        gold=Share(sum(gold), len(gold)),
        repeats=Share(sum(repeats), len(repeats)),
        first=Share(sum(first), len(first)),
        alpha=_alpha((case for case in cases if name in case), people | {name}),
    )


def _shown_first(cast: _Cast) -> list[bool]:
    """Return whether the better response was shown first; a judge, who sees a pair in both orders, has up to two such votes."""
    if cast.order:
        better = cast.vote.better if isinstance(cast.vote, Choice) else None
        return [] if better is None else [better == cast.order[0]]
    votes = zip(cast.details.get("votes", ()), ("first", "second"), strict=False)
    return [vote == shown for vote, shown in votes if vote != "tie"]


def _judge(name: str, cases: Sequence[Mapping[str, int]], people: set[str]) -> Share:
    """Return the cases with votes of people in which a judge has the sign of their mean."""
    same = []
    for case in cases:
        signs = [sign for each, sign in case.items() if each in people]
        if name in case and signs:
            mean = fmean(signs)
            same.append(case[name] == (mean > 0) - (mean < 0))
    return Share(sum(same), len(same))


def _progress(store: Store) -> tuple[Share, int]:
    """Return the units with enough votes of all units without gold, and how many votes the other ones need."""
    u = schema.units
    missing = sa.case((u.c.votes < u.c.overlap, u.c.overlap - u.c.votes), else_=0)
    wanted = sa.select(
        sa.func.count(), sa.func.sum(sa.case((u.c.votes < u.c.overlap, 0), else_=1)), sa.func.sum(missing)
    )
    with store.read() as db:
        total, done, left = db.execute(wanted.where(u.c.gold.is_(None))).one()
    return Share(done or 0, total), left or 0
