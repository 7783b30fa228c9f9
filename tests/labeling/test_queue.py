"""The queue: leases, overlap, undo, gold units and repeats, from one thread and from several."""

from __future__ import annotations

import random
import threading
from collections import Counter
from contextlib import suppress

import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa

from reinforcepp.data.feedback import Answer, Choice, NewUnit, Skip, Store, schema
from reinforcepp.data.feedback.migrations.versions.votes_of_units import COUNT_VOTES
from reinforcepp.data.feedback.store import MIGRATIONS
from reinforcepp.labeling.queue import LEASE_SECONDS, Queue, UnitGone


class Clock:
    now = 1_000_000.0

    def __call__(self):
        return self.now


def pairs(count, **settings):
    return [
        NewUnit("pair", f"question {i}", [Answer(f"good {i}"), Answer(f"bad {i}")], **settings) for i in range(count)
    ]


@pytest.fixture
def make(tmp_path):
    stores = []

    def queue(units, **settings):
        stores.append(Store(tmp_path / f"{len(stores)}.db"))
        stores[-1].add_units(units)
        settings = {"gold_every": 0, "repeat_every": 0, "clock": Clock()} | settings
        made = Queue(stores[-1], **settings)
        return made, stores[-1].labeler("ann"), stores[-1].labeler("ben")

    yield queue
    for each in stores:
        each.close()


FIRST = Choice(0)


def label(queue, labeler, vote=FIRST, most=1000):
    """Vote on everything that the labeler gets, and return the prompts."""
    prompts = []
    while len(prompts) < most and (assigned := queue.next(labeler)) is not None:
        queue.vote(labeler, assigned.token, vote, 1.0)
        prompts.append(assigned.unit.prompt)
    return prompts


def undo(queue, labeler):
    return queue.undo(labeler, queue.progress(labeler).last)


def test_a_reload_shows_the_same_unit_in_the_same_order(make):
    queue, ann, _ = make(pairs(3))
    assert queue.next(ann) == queue.next(ann)


def test_two_labelers_never_hold_the_same_unit(make):
    queue, ann, ben = make(pairs(2))
    first, second = queue.next(ann), queue.next(ben)
    assert first.unit.id != second.unit.id
    queue.vote(ann, first.token, Choice(0), 1.0)
    assert queue.next(ann) is None, "ben holds the other one"


def test_units_come_by_priority(make):
    units = [NewUnit("pair", str(p), [Answer("a"), Answer("b")], priority=p) for p in (0.5, -2.0, 0.1)]
    queue, ann, _ = make(units)
    assert label(queue, ann) == ["-2.0", "0.1", "0.5"]


@pytest.mark.parametrize("overlap", [1, 2])
def test_each_unit_gets_as_many_labelers_as_asked(make, overlap):
    queue, ann, ben = make(pairs(6, overlap=overlap))
    got = Counter(label(queue, ann) + label(queue, ben) + label(queue, queue.store.labeler("cem")))
    assert set(got.values()) == {overlap}
    assert len(got) == 6


def test_an_expired_lease_goes_to_somebody_else_and_the_late_vote_is_refused(make):
    queue, ann, ben = make(pairs(1))
    late = queue.next(ann)
    assert queue.next(ben) is None
    queue.clock.now += LEASE_SECONDS + 1
    assert queue.next(ben).unit.id == late.unit.id
    with pytest.raises(UnitGone):
        queue.vote(ann, late.token, Choice(0), 1.0)
    assert queue.next(ann) is None


def test_a_late_vote_counts_if_nobody_else_got_the_unit(make):
    queue, ann, ben = make(pairs(1))
    late = queue.next(ann)
    queue.clock.now += LEASE_SECONDS + 1
    queue.vote(ann, late.token, Choice(1), 1.0)
    assert queue.next(ben) is None
    assert queue.progress(ann).done == 1


def test_a_skipped_unit_goes_to_somebody_else(make):
    queue, ann, ben = make(pairs(1))
    label(queue, ann, Skip())
    assert queue.next(ann) is None
    assert queue.next(ben) is not None


def test_a_skipped_unit_that_somebody_else_got_is_not_taken_back(make):
    """Neither by undo, nor by a vote from a page that is still open."""
    queue, ann, ben = make(pairs(1))
    token = queue.next(ann).token
    queue.vote(ann, token, Skip(), 1.0)
    other = queue.next(ben)
    assert undo(queue, ann)
    assert queue.next(ann) is None
    assert queue.progress(ann).left == 0
    with pytest.raises(UnitGone):
        queue.vote(ann, token, Choice(0), 1.0)
    queue.vote(ben, other.token, Choice(0), 1.0)
    assert sum(each.undone is None for each in votes_of(queue)) == 1


def test_undo_shows_a_skipped_unit_again_if_nobody_else_got_it(make):
    queue, ann, ben = make(pairs(1))
    token = queue.next(ann).token
    queue.vote(ann, token, Skip(), 1.0)
    assert undo(queue, ann)
    assert queue.next(ann).token == token
    assert queue.next(ben) is None


def test_nobody_votes_for_others(make):
    queue, ann, ben = make(pairs(1))
    with pytest.raises(UnitGone):
        queue.vote(ben, queue.next(ann).token, Choice(0), 1.0)


def votes_of(queue):
    with queue.store.read() as db:
        return db.execute(sa.select(schema.votes).order_by(schema.votes.c.id)).all()


def test_a_vote_that_is_sent_twice_counts_once_and_another_one_replaces_it(make):
    queue, ann, _ = make(pairs(1))
    token = queue.next(ann).token
    for better in (0, 0, 1):
        queue.vote(ann, token, Choice(better), 1.0)
    assert [(v.value["better"], v.undone is None) for v in votes_of(queue)] == [(0, False), (1, True)]
    with pytest.raises(sa.exc.IntegrityError), queue.store.write() as db:
        db.execute(schema.votes.update().values(undone=None))


def test_undo_shows_the_unit_again_with_the_vote_and_keeps_the_open_unit(make):
    queue, ann, ben = make(pairs(3))
    first = queue.next(ann)
    queue.vote(ann, first.token, Choice(1), 1.0)
    second = queue.next(ann)
    assert queue.undo(ann, first.token)
    again = queue.next(ann)
    assert (again.token, again.order, again.previous) == (first.token, first.order, Choice(1).value())
    assert queue.progress(ann).done == 0
    assert not queue.undo(ann, first.token)
    queue.vote(ann, again.token, Choice(0), 1.0)
    assert queue.next(ann).token == second.token
    assert queue.next(ben).unit.id not in (first.unit.id, second.unit.id)


def test_an_undo_that_is_sent_twice_takes_one_vote_back(make):
    queue, ann, _ = make(pairs(3))
    label(queue, ann, most=2)
    last = queue.progress(ann).last
    assert queue.undo(ann, last)
    assert not queue.undo(ann, last)
    assert queue.progress(ann).done == 1


def test_a_skip_that_is_sent_twice_is_stored_although_somebody_else_got_the_unit(make):
    queue, ann, ben = make(pairs(1))
    token = queue.next(ann).token
    for _ in range(2):
        queue.vote(ann, token, Skip(), 1.0)
        assert queue.next(ben) is not None


def test_an_imported_vote_has_no_order_but_its_unit_can_come_again(make):
    """As a repeat, and after undo."""
    queue, ann, _ = make(pairs(10), repeat_every=1)
    queue.store.add_votes([(each, "ann", Choice(0), 1.0) for each in pairs(6)])
    assert undo(queue, ann)
    again = queue.next(ann)
    assert (again.order, again.previous) == ((0, 1), Choice(0).value())
    queue.vote(ann, again.token, Choice(1), 1.0)
    assert queue.next(ann).order == (1, 0)


def test_seconds_are_never_more_than_the_time_that_passed(make):
    queue, ann, _ = make(pairs(3))
    for passed, sent in ((10, 4.0), (10, 1e9), (10, -1.0)):
        token = queue.next(ann).token
        queue.clock.now += passed
        queue.vote(ann, token, Choice(0), sent)
    assert [each.seconds for each in votes_of(queue)] == [4.0, 10.0, 0.0]


def test_progress_counts_votes_units_and_time(make):
    queue, ann, ben = make(pairs(10))
    queue.next(ben)
    for _ in range(3):
        token = queue.next(ann).token
        queue.clock.now += 20
        queue.vote(ann, token, Choice(0), 20.0)
    progress = queue.progress(ann)
    assert (progress.done, progress.left, progress.seconds, progress.minutes_left) == (3, 6, 20.0, 2.0)


def test_the_number_of_units_left_does_not_reveal_gold_units_and_repeats(make):
    gold = [NewUnit("pair", f"gold {i}", [Answer("x"), Answer("y")], gold=Choice(0)) for i in range(4)]
    queue, ann, _ = make([*gold, *pairs(60)], gold_every=10, repeat_every=20)
    left, hidden, seen = [], [], set()
    while (assigned := queue.next(ann)) is not None:
        left.append(queue.progress(ann).left)
        hidden.append(assigned.unit.gold is not None or assigned.unit.id in seen)
        seen.add(assigned.unit.id)
        queue.vote(ann, assigned.token, Choice(0), 1.0)
    assert 6 <= sum(hidden) <= 8
    assert left[-1] == 1
    steps = [(before - after, is_hidden) for before, after, is_hidden in zip(left, left[1:], hidden[1:], strict=False)]
    assert all(step == 1 for step, is_hidden in steps if is_hidden)
    assert sum(step != 1 for step, _ in steps) <= 1, "a repeat and a gold unit can be due at the same place"


def test_the_order_of_responses_is_random_and_a_repeat_reverses_it(make):
    queue, ann, _ = make(pairs(40), repeat_every=5)
    orders, repeats = {}, 0
    while (assigned := queue.next(ann)) is not None:
        queue.vote(ann, assigned.token, Choice(0), 1.0)
        if assigned.unit.id in orders:
            repeats += 1
            assert assigned.order == orders[assigned.unit.id][::-1]
        orders[assigned.unit.id] = assigned.order
    assert 6 <= repeats <= 10
    assert 10 <= sum(order == (0, 1) for order in orders.values()) <= 30


def test_every_labeler_gets_gold_units_at_random_places(make):
    gold = [NewUnit("pair", f"gold {i}", [Answer("x"), Answer("y")], gold=Choice(0)) for i in range(3)]
    queue, ann, ben = make([*gold, *pairs(30, overlap=2)], gold_every=10)
    places = []
    for labeler in (ann, ben):
        prompts = label(queue, labeler, most=30)
        places.append([i for i, prompt in enumerate(prompts) if prompt.startswith("gold")])
        assert len(places[-1]) == 3
        assert [place // 10 for place in places[-1]] == [0, 1, 2]
    assert places[0] != places[1]


def test_labelers_at_the_same_time_share_the_units(make):
    """Every unit is labeled once, although eight threads ask for units at the same time."""
    queue, *_ = make(pairs(40))
    got: list[list[str]] = [[] for _ in range(8)]

    def work(number):
        got[number] = label(queue, queue.store.labeler(f"labeler {number}"))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [prompt for prompts in got for prompt in prompts]
    assert len(together) == len(set(together)) == 40


def counted(queue):
    """Return the numbers of votes that units store, and those that follow from the votes."""
    with queue.store.read() as db:
        stored = dict(db.execute(sa.select(schema.units.c.id, schema.units.c.votes)).tuples().all())
    with queue.store.write() as db:
        db.execute(sa.text(COUNT_VOTES))
    with queue.store.read() as db:
        return stored, dict(db.execute(sa.select(schema.units.c.id, schema.units.c.votes)).tuples().all())


def test_units_know_their_number_of_votes(make):
    """After votes, skips, undone votes, repeats, expired leases and judgments in a random order."""
    queue, *_ = make(pairs(12, overlap=2), repeat_every=3)
    labelers, draw = [queue.store.labeler(name) for name in ("ann", "ben", "cem")], random.Random(0)
    for _ in range(80):
        labeler, action = draw.choice(labelers), draw.random()
        if action < 0.2 and undo(queue, labeler):
            stored, right = counted(queue)
            assert stored == right
        elif (assigned := queue.next(labeler)) is not None:
            queue.clock.now += draw.choice([1, LEASE_SECONDS + 1])
            with suppress(UnitGone):
                queue.vote(labeler, assigned.token, Skip() if action < 0.4 else Choice(0), 1.0)
        queue.store.add_judgment("judge:x", draw.randint(1, 12), Choice(draw.randrange(2)))
    stored, right = counted(queue)
    assert stored == right
    assert len(set(right.values())) > 1


def test_a_database_of_the_first_version_is_upgraded_with_its_votes(make, tmp_path):
    from alembic import command
    from alembic.config import Config

    queue, ann, ben = make(pairs(4, overlap=2))
    label(queue, ann, most=3)
    label(queue, ben, most=1)
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with queue.store.write() as db:
        db.execute(sa.text("DROP INDEX ix_assignments_leased_until"))
        db.execute(sa.text("ALTER TABLE units DROP COLUMN votes"))
        config.attributes["connection"] = db
        command.stamp(config, "0001")
    again = Queue(Store(tmp_path / "0.db"), gold_every=0, repeat_every=0)
    stored, right = counted(again)
    assert stored == right
    assert sorted(stored.values()) == [0, 1, 1, 2]
    assert len(label(again, ben)) == 3
    again.store.close()
