"""How good the votes are: speed, gold units, repeats, and agreement of labelers and judges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from statistics import fmean, median
from typing import Any

import sqlalchemy as sa

from reinforcepp.data.feedback import Choice, Skip, Store, Unit, parse_vote, schema
from reinforcepp.data.feedback.preferences import Cast, all_votes
from reinforcepp.labeling.agreement import krippendorff_alpha

ALL, NO_TOPIC = "all", "without a topic"
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
        first: Better responses that the page showed first; half, without a bias of position.
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
        times: Times of the votes of people, ascending, in seconds since 1970.
    """

    labelers: tuple[LabelerQuality, ...]
    alpha: Mapping[str, float | None]
    judges: Mapping[str, Share]
    units: Share
    times: Sequence[float] = field(repr=False, default=())

    def record(self) -> dict[str, Any]:
        """Return the measurements as JSON."""
        values = asdict(self)
        del values["times"]
        return values


def measure(store: Store) -> Quality:
    """Return the measurements of all votes so far."""
    cases: list[tuple[str, dict[str, int]]] = []
    casts: dict[str, list[tuple[Unit, Cast]]] = defaultdict(list)
    kinds, times = dict[str, str](), list[float]()
    for unit, votes in all_votes(store):
        for each in votes:
            casts[each.labeler].append((unit, each))
            kinds[each.labeler] = each.kind
            times += [each.created] if each.kind == "human" else []
        if unit.gold is None:
            cases += [(unit.topic or NO_TOPIC, case) for case in _cases(votes)]
    people = {name for name, kind in kinds.items() if kind == "human"}
    topics = sorted({topic for topic, _ in cases} - {NO_TOPIC})
    by_topic = {topic: [case for each, case in cases if each == topic] for topic in topics}
    return Quality(
        tuple(_labeler(name, kinds[name], casts[name], cases, people) for name in sorted(casts)),
        {ALL: _alpha((case for _, case in cases), people)}
        | {name: _alpha(each, people) for name, each in by_topic.items()},
        {name: _judge(name, cases, people) for name in sorted(kinds.keys() - people)},
        _progress(store),
        sorted(times),
    )


def _cases(votes: Sequence[Cast]) -> list[dict[str, int]]:
    """Return the signs by labeler for each pair of answers of a unit, repeats not included."""
    found: dict[tuple[int, int], dict[str, int]] = defaultdict(dict)
    for each in votes:
        if not each.repeat:
            for pair, sign in _signs(each).items():
                found[pair][each.labeler] = sign
    return list(found.values())


def _signs(cast: Cast) -> Signs:
    return {(i, j): (margin > 0) - (margin < 0) for i, j, margin in cast.vote.preferences()}


def _alpha(cases: Iterable[Mapping[str, int]], labelers: set[str]) -> float | None:
    return krippendorff_alpha([[sign for name, sign in case.items() if name in labelers] for case in cases])


def _labeler(
    name: str,
    kind: str,
    casts: Sequence[tuple[Unit, Cast]],
    cases: Sequence[tuple[str, Mapping[str, int]]],
    people: set[str],
) -> LabelerQuality:
    voted = [(unit, each) for unit, each in casts if not isinstance(each.vote, Skip)]
    gold = [
        _signs(each) == {(i, j): (m > 0) - (m < 0) for i, j, m in parse_vote("pair", 2, unit.gold).preferences()}
        for unit, each in voted
        if unit.gold is not None
    ]
    by_unit = [list(group) for _, group in groupby((each for _, each in voted), key=lambda each: each.unit_id)]
    repeats = [
        _signs(group[0]) == _signs(group[-1]) for group in by_unit if {each.repeat for each in group} == {False, True}
    ]
    first = [
        each.vote.better == each.order[0]
        for _, each in voted
        if isinstance(each.vote, Choice) and each.vote.better is not None and each.order
    ]
    return LabelerQuality(
        name,
        kind,
        votes=len(voted),
        skipped=len(casts) - len(voted),
        seconds=median(each.seconds for _, each in voted) if voted else None,
        gold=Share(sum(gold), len(gold)),
        repeats=Share(sum(repeats), len(repeats)),
        first=Share(sum(first), len(first)),
        alpha=_alpha((case for _, case in cases if name in case), people | {name}),
    )


def _judge(name: str, cases: Sequence[tuple[str, Mapping[str, int]]], people: set[str]) -> Share:
    """Return the cases with votes of people in which a judge has the sign of their mean."""
    same = []
    for _, case in cases:
        signs = [sign for each, sign in case.items() if each in people]
        if name in case and signs:
            mean = fmean(signs)
            same.append(case[name] == (mean > 0) - (mean < 0))
    return Share(sum(same), len(same))


def _progress(store: Store) -> Share:
    a, v, u, people = schema.assignments, schema.votes, schema.units, schema.labelers
    number = (
        sa.select(sa.func.count())
        .select_from(a)
        .join(v, sa.and_(v.c.assignment_id == a.c.id, v.c.undone.is_(None), ~v.c.skipped))
        .join(people, sa.and_(people.c.id == a.c.labeler_id, people.c.kind == "human"))
        .where(a.c.unit_id == u.c.id, ~a.c.repeat)
        .scalar_subquery()
    )
    normal = sa.select(sa.func.count()).select_from(u).where(u.c.gold.is_(None))
    with store.read() as db:
        return Share(db.execute(normal.where(number >= u.c.overlap)).scalar_one(), db.execute(normal).scalar_one())
