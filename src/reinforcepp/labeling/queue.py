"""The queue: which unit a labeler gets next, and what happens to votes.

A labeler holds at most one unit, as a lease: other labelers don't get it until the lease expires. After that, the vote still
counts unless somebody else got the unit. Hidden among the units are gold units, whose answer is known, and repeats of the
labeler's own earlier units with the responses in another order.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from reinforcepp.data.feedback.records import Unit, add_assignment, count_votes, put_vote, units_by_id
from reinforcepp.data.feedback.schema import assignments as a
from reinforcepp.data.feedback.schema import labelers, unit_answers, votes
from reinforcepp.data.feedback.schema import units as u
from reinforcepp.data.feedback.store import Store
from reinforcepp.data.feedback.votes import Skip, Vote

LEASE_SECONDS = 1800.0
GOLD_EVERY, REPEAT_EVERY = 10, 20
"""One of this many units of a labeler is a gold unit, and one is a repeat; 0 for none."""
REPEAT_AFTER = 5
"""Units between a unit and its repeat, at least."""
RECENT_VOTES = 20
"""Votes from which the time per unit is computed."""

HAS_VOTE = sa.exists().where(votes.c.assignment_id == a.c.id, votes.c.undone.is_(None))

COUNTS = sa.exists().where(votes.c.assignment_id == a.c.id, votes.c.undone.is_(None), ~votes.c.skipped)
"""Another labeler gets a unit that was skipped."""


class UnitGone(Exception):
    """The unit isn't the labeler's: it never was, or the lease expired and somebody else got it."""


@dataclass(frozen=True)
class Assigned:
    """A unit as a labeler gets it.

    Attributes:
        token: Name of the assignment for the page. It reveals nothing.
        unit: The unit.
        order: Positions of the answers in the order in which the page shows them.
        started: When the labeler first got it.
        previous: The vote that the labeler took back, as JSON.
    """

    token: str
    unit: Unit
    order: tuple[int, ...]
    started: float
    previous: Any = None


@dataclass(frozen=True)
class Progress:
    """A labeler's progress.

    Attributes:
        done: Votes.
        left: Units that are left, with the gold units and repeats to come, so that the number doesn't reveal which these are.
        seconds: Median time per unit; None before the first vote.
        last: Token of the last vote's unit, for ``undo``; empty before the first vote.
    """

    done: int
    left: int
    seconds: float | None
    last: str = ""

    @property
    def minutes_left(self) -> float | None:
        """Minutes until no unit is left, if nobody else labels."""
        return None if self.seconds is None else self.seconds * self.left / 60


class Queue:
    """The queue of a store.

    Args:
        store: The database.
        lease_seconds: How long a labeler has a unit for sure.
        gold_every: One of this many units is a gold unit; 0 for none.
        repeat_every: One of this many units is a repeat; 0 for none.
        clock: Function that returns the time, in seconds since 1970.
    """

    def __init__(
        self,
        store: Store,
        *,
        lease_seconds: float = LEASE_SECONDS,
        gold_every: int = GOLD_EVERY,
        repeat_every: int = REPEAT_EVERY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store, self.lease_seconds, self.clock = store, lease_seconds, clock
        self.gold_every, self.repeat_every = gold_every, repeat_every

    def next(self, labeler: int) -> Assigned | None:
        """Return the labeler's open unit, or lease another one; None if there is none left."""
        now = self.clock()
        with self.store.write() as db:
            found = self._open(db, labeler, now)
            if found is None and (chosen := self._choose(db, labeler, now)) is not None:
                unit_id, repeat = chosen
                order = self._order(db, unit_id, labeler, repeat)
                lease = {"now": now, "leased_until": now + self.lease_seconds}
                add_assignment(db, unit_id, labeler, order=order, repeat=repeat, **lease)
                found = self._open(db, labeler, now)
            if found is None:
                return None
            taken_back = sa.select(votes.c.value).where(votes.c.assignment_id == found.id).order_by(votes.c.id.desc())
            previous = db.execute(taken_back.limit(1)).scalar()
            unit = units_by_id(db, [found.unit_id])[found.unit_id]
        return Assigned(found.token, unit, _order_of(found, unit), found.started, previous)

    def held(self, labeler: int, token: str) -> Assigned:
        """Return a unit that the labeler has or had.

        Raises:
            UnitGone: It isn't the labeler's.
        """
        with self.store.read() as db:
            found = _held(db, labeler, token)
            unit = units_by_id(db, [found.unit_id])[found.unit_id]
        return Assigned(token, unit, _order_of(found, unit), found.started)

    def vote(self, labeler: int, token: str, vote: Vote, seconds: float) -> None:
        """Store a vote; it is on the disk afterwards. The same vote again changes nothing, a different one replaces it.

        Args:
            labeler: The labeler.
            token: That of the assignment.
            vote: The vote, by positions in the unit.
            seconds: What the page measured; never more than the time since the unit was leased.

        Raises:
            UnitGone: The unit isn't the labeler's.
        """
        now = self.clock()
        with self.store.write() as db:
            found = _held(db, labeler, token)
            counts = sa.and_(votes.c.assignment_id == found.id, votes.c.undone.is_(None))
            if db.execute(sa.select(votes.c.value).where(counts)).scalar() == vote.value():
                return  # sent again, because the response was lost
            if not self._keeps(db, found, now):
                raise UnitGone
            put_vote(db, found.id, vote, seconds=min(max(seconds, 0.0), max(now - found.started, 0.0)), now=now)
            if isinstance(vote, Skip):  # Somebody else can have the unit now.
                db.execute(a.update().where(a.c.id == found.id).values(leased_until=0.0))

    def undo(self, labeler: int, token: str) -> bool:
        """Take the labeler's last vote back if it is on the unit ``token``, and return whether it is.

        Its unit is the next one then. So a request that is sent again takes back one vote. A skipped unit that somebody else
        has got by now isn't shown again.
        """
        now = self.clock()
        last = (
            sa.select(votes.c.id, votes.c.assignment_id, a.c.token)
            .join(a, a.c.id == votes.c.assignment_id)
            .where(a.c.labeler_id == labeler, votes.c.undone.is_(None))
            .order_by(votes.c.id.desc())
        )
        with self.store.write() as db:
            found = db.execute(last.limit(1)).first()
            if found is None or found.token != token:
                return False
            db.execute(votes.update().where(votes.c.id == found.id).values(undone=now))
            count_votes(db, found.assignment_id)
            held = db.execute(sa.select(a).where(a.c.id == found.assignment_id)).one()
            if self._keeps(db, held, now):
                extended = {"leased_until": now + self.lease_seconds}
                db.execute(a.update().where(a.c.id == held.id).values(extended))
        return True

    def progress(self, labeler: int) -> Progress:
        """Return the labeler's progress."""
        now = self.clock()
        mine = sa.select(votes.c.seconds, a.c.token).join(a, a.c.id == votes.c.assignment_id)
        mine = mine.where(a.c.labeler_id == labeler, votes.c.undone.is_(None))
        opened = sa.select(a).where(a.c.labeler_id == labeler, ~HAS_VOTE)
        with self.store.read() as db:
            done = _count(db, mine)
            left = sum(self._keeps(db, each, now) for each in db.execute(opened).all())
            left += self._with_hidden(db, labeler, _count(db, self._fresh(labeler, now)))
            recent = db.execute(mine.order_by(votes.c.id.desc()).limit(RECENT_VOTES)).all()
        if not recent:
            return Progress(done, left, None)
        return Progress(done, left, median(each.seconds for each in recent), recent[0].token)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _open(self, db: Connection, labeler: int, now: float) -> Row[Any] | None:
        """Return the oldest assignment of the labeler without a vote, after extending its lease."""
        mine = sa.select(a).where(a.c.labeler_id == labeler, ~HAS_VOTE).order_by(a.c.started, a.c.id)
        for found in db.execute(mine).all():
            if self._keeps(db, found, now):
                db.execute(a.update().where(a.c.id == found.id).values(leased_until=now + self.lease_seconds))
                return found
            if not db.execute(sa.select(votes.c.id).where(votes.c.assignment_id == found.id)).first():
                db.execute(a.delete().where(a.c.id == found.id))
        return None

    def _keeps(self, db: Connection, found: Row[Any], now: float) -> bool:
        """Return whether an assignment still counts: its lease is valid, or nobody else got the unit."""
        if found.leased_until >= now or found.repeat:
            return True
        gold, overlap = db.execute(sa.select(u.c.gold, u.c.overlap).where(u.c.id == found.unit_id)).one()
        others = sa.select(sa.func.count()).select_from(
            _taken(now).where(a.c.id != found.id, a.c.unit_id == found.unit_id).subquery()
        )
        return gold is not None or bool(db.execute(others).scalar_one() < overlap)

    def _choose(self, db: Connection, labeler: int, now: float) -> tuple[int, bool] | None:
        """Return the unit to lease, and whether it is a repeat."""
        number = _count(db, sa.select(a.c.id).where(a.c.labeler_id == labeler))
        if _is_due(self.gold_every, number, labeler, "gold"):
            gold = _gold(labeler).order_by(u.c.priority, u.c.id).limit(1)
            if (found := db.execute(gold).scalar()) is not None:
                return found, False
        if _is_due(self.repeat_every, number, labeler, "repeat") and (found := self._repeatable(db, labeler)):
            return found, True
        found = db.execute(self._fresh(labeler, now).order_by(u.c.priority, u.c.id).limit(1)).scalar()
        return None if found is None else (found, False)

    def _with_hidden(self, db: Connection, labeler: int, fresh: int) -> int:
        """Return how many units ``fresh`` ones are with the gold units and the repeats that come among them."""
        number = _count(db, sa.select(a.c.id).where(a.c.labeler_id == labeler))
        gold_left = _count(db, _gold(labeler)) if self.gold_every else 0
        total = fresh
        while fresh:
            gold = _num_due(self.gold_every, number, total, labeler, "gold")
            repeats = _num_due(self.repeat_every, number, total, labeler, "repeat")
            if (more := fresh + min(gold, gold_left) + min(repeats, fresh)) == total:
                break
            total = more
        return total

    def _repeatable(self, db: Connection, labeler: int) -> int | None:
        """Return the labeler's oldest unit without a repeat that was voted on some units ago."""
        again = a.alias()
        repeated = sa.exists().where(again.c.unit_id == a.c.unit_id, again.c.labeler_id == labeler, again.c.repeat)
        mine = (
            sa.select(a.c.unit_id)
            .join(u, u.c.id == a.c.unit_id)
            .where(a.c.labeler_id == labeler, ~a.c.repeat, COUNTS, u.c.gold.is_(None))
            .order_by(a.c.id.desc())
        )
        recent = set(db.execute(mine.limit(REPEAT_AFTER)).scalars())
        return next((each for each in db.execute(mine.where(~repeated)).scalars() if each not in recent), None)

    def _fresh(self, labeler: int, now: float) -> sa.Select[Any]:
        """Return the query for the units that the labeler can get."""
        held = sa.select(a.c.unit_id, sa.func.count().label("number")).where(
            ~a.c.repeat, ~HAS_VOTE, a.c.leased_until >= now
        )
        leases = held.group_by(a.c.unit_id).subquery()
        return (
            sa.select(u.c.id)
            .outerjoin(leases, leases.c.unit_id == u.c.id)
            .where(
                u.c.gold.is_(None),
                u.c.votes + sa.func.coalesce(leases.c.number, 0) < u.c.overlap,
                u.c.id.not_in(_seen(labeler)),
            )
        )

    def _order(self, db: Connection, unit_id: int, labeler: int, repeat: bool) -> list[int]:
        """Return a random order of the answers; a repeat has another one than the first time."""
        number = _count(db, sa.select(unit_answers.c.position).where(unit_answers.c.unit_id == unit_id))
        if repeat:
            first = sa.select(a.c.order).where(a.c.unit_id == unit_id, a.c.labeler_id == labeler)
            return list(reversed(db.execute(first).scalar_one() or range(number)))
        return random.Random(f"{unit_id}/{labeler}").sample(range(number), number)


def _is_due(every: int, number: int, labeler: int, kind: str) -> bool:
    """Return whether the labeler's unit ``number`` is the random one of its block of ``every`` units."""
    return bool(_num_due(every, number, 1, labeler, kind))


def _num_due(every: int, number: int, count: int, labeler: int, kind: str) -> int:
    """Return how many of ``count`` units of the labeler, from unit ``number`` on, are the random ones of their blocks."""

    def due_before(end: int) -> int:
        block, place = divmod(end, every)
        return block + (place > random.Random(f"{kind}/{labeler}/{block}").randrange(every))

    return due_before(number + count) - due_before(number) if every else 0


def _count(db: Connection, query: sa.Select[Any]) -> int:
    return int(db.execute(sa.select(sa.func.count()).select_from(query.subquery())).scalar_one())


def _seen(labeler: int) -> sa.Select[Any]:
    return sa.select(a.c.unit_id).where(a.c.labeler_id == labeler)


def _gold(labeler: int) -> sa.Select[Any]:
    """Return the query for the gold units that the labeler hasn't seen."""
    return sa.select(u.c.id).where(u.c.gold.is_not(None), u.c.id.not_in(_seen(labeler)))


def _order_of(assignment: Row[Any], unit: Unit) -> tuple[int, ...]:
    """Return the order of the answers; an assignment from an imported vote has none."""
    return tuple(assignment.order) or tuple(range(len(unit.answers)))


def _taken(now: float) -> sa.Select[Any]:
    """Return the query for the assignments of people that count towards the overlap of their units."""
    return (
        sa.select(a.c.unit_id)
        .join(labelers, labelers.c.id == a.c.labeler_id)
        .where(labelers.c.kind == "human", ~a.c.repeat, sa.or_(COUNTS, sa.and_(~HAS_VOTE, a.c.leased_until >= now)))
    )


def _held(db: Connection, labeler: int, token: str) -> Row[Any]:
    found = db.execute(sa.select(a).where(a.c.token == token, a.c.labeler_id == labeler)).first()
    if found is None:
        raise UnitGone
    return found
