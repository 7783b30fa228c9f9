"""Real clients of a real server that is killed: no vote is lost or doubled, in SQLite and in PostgreSQL."""

from __future__ import annotations

import pytest

pytest.importorskip("sqlalchemy")

from reinforcepp.data.feedback import Answer, Choice, NewUnit, Ranking, Store, schema
from reinforcepp.data.feedback.preferences import preference_rows
from reinforcepp.labeling.queue import Queue
from scripts import benchmark

pytestmark = pytest.mark.full


@pytest.fixture
def server():
    load = benchmark("label_load")
    if not load.has_postgres():
        pytest.skip("PostgreSQL isn't installed")
    pytest.importorskip("psycopg")
    with load.postgres() as url:
        yield url


def test_a_killed_server_loses_no_vote(tmp_path):
    result = benchmark("label_load").measure(str(tmp_path / "f.db"), tmp_path, clients=8, votes=160, kills=2)
    assert (result["votes"], result["kills"]) == (160, 2)
    assert (result["lost"], result["doubled"], result["errors"]) == (0, 0, [])


def test_a_killed_server_loses_no_vote_in_postgresql(server, tmp_path):
    result = benchmark("label_load").measure(server, tmp_path, clients=8, votes=160, kills=2)
    assert (result["votes"], result["kills"]) == (160, 2)
    assert (result["lost"], result["doubled"], result["errors"]) == (0, 0, [])


def test_postgresql_stores_what_sqlite_stores(server, tmp_path):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    messages = [{"role": "user", "content": "q\0 ünïcode"}]
    answers = [Answer("a\0", "m", {"temperature": 0.5}), Answer("b"), Answer("c")]
    votes = [
        (NewUnit("pair", messages, answers[:2], "t"), "ann", Choice(1, 2), 1.0),
        (NewUnit("rank", "q", answers), "ben", Ranking((1, 3, 2)), 2.0),
    ]
    rows = []
    for name in (server, str(tmp_path / "f.db")):
        store = Store(name)
        store.add_votes(votes)
        store.add_units([NewUnit("pair", "open", answers[:2], gold=Choice(0)), NewUnit("pair", "more", answers[:2])])
        queue = Queue(store, gold_every=1)
        ann = store.labeler("ann")
        token = queue.next(ann).token
        queue.vote(ann, token, Choice(0), 1.0)
        assert queue.undo(ann, token)
        assert queue.next(ann).token == token
        rows.append(list(preference_rows(store)))
        with store.read() as db:
            assert compare_metadata(MigrationContext.configure(db), schema.metadata) == []
        store.close()
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4
