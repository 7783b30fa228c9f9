"""The feedback database: its tables, its transactions, and the preferences that follow from votes."""

from __future__ import annotations

import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa

from reinforcepp.data.feedback import Answer, Choice, Edit, NewUnit, Ranking, Ratings, Skip, Store, parse_vote, schema
from reinforcepp.data.feedback.preferences import preference_rows
from reinforcepp.data.feedback.records import add_assignment, put_vote
from reinforcepp.data.loading import load_preferences
from reinforcepp.errors import ConfigError, DataError

ANSWERS = (Answer("Run ip route.", "model-a", {"temperature": 0.7}), Answer("Reboot it.", "model-b"))
UNIT = NewUnit("pair", "How do I see my routes?", ANSWERS, topic="routing")


@pytest.fixture
def store(tmp_path):
    with_tables = Store(tmp_path / "feedback.db")
    yield with_tables
    with_tables.close()


def only_unit(store):
    (unit,) = store.unjudged("nobody")
    return unit


def test_the_migrations_make_the_tables_of_the_schema(store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    with store.read() as db:
        assert compare_metadata(MigrationContext.configure(db), schema.metadata) == []


def test_a_unit_comes_back_as_it_was_added(store):
    assert store.add_units([UNIT]) == 1
    unit = only_unit(store)
    assert (unit.task, unit.prompt, unit.answers, unit.topic) == ("pair", UNIT.prompt, ANSWERS, "routing")
    assert store.add_units([UNIT, NewUnit("pair", UNIT.prompt, ANSWERS[::-1])]) == 0, "the same answers"
    assert store.add_units([NewUnit("rank", UNIT.prompt, ANSWERS)]) == 1, "another task"


def test_texts_that_a_database_can_not_store_are_replaced(store):
    store.add_units([NewUnit("pair", "a\0b", (Answer("x\0y"), Answer("\ud800")))])
    assert [each.text for each in only_unit(store).answers] == ["x\ufffdy", "?"]


@pytest.mark.parametrize(
    ("task", "texts"), [("pair", ["a"]), ("pair", ["a", "a "]), ("pair", "abc"), ("rank", "abcdef"), ("edit", [])]
)
def test_a_unit_needs_different_answers(task, texts):
    with pytest.raises(DataError, match="different answers"):
        NewUnit(task, "q", [Answer(text) for text in texts])


def test_a_new_file_is_private(store, tmp_path):
    assert (tmp_path / "feedback.db").stat().st_mode & 0o777 == 0o600


def test_an_exception_undoes_the_transaction(store):
    with pytest.raises(ZeroDivisionError), store.write() as db:
        db.execute(schema.settings.insert().values(name="x", value=1))
        1 / 0  # noqa: B018
    assert store.setting("x", 2) == 2
    assert store.setting("x", 3) == 2


def test_judges_vote_once_per_unit_and_can_change_their_mind(store):
    store.add_units([UNIT])
    unit = only_unit(store)
    for better in (0, 1, 1):
        store.add_judgment("judge:gold", unit.id, Choice(better), seconds=1.5, details={"model": "m"})
    assert store.unjudged("judge:gold") == []
    with store.read() as db:
        stored = db.execute(sa.select(schema.votes.c.value, schema.votes.c.undone)).all()
    assert [row.value["better"] for row in stored if row.undone is None] == [1]
    assert len(stored) == 2
    with pytest.raises(DataError, match="name of a judge"):
        store.labeler("judge:gold")


def test_votes_from_elsewhere_follow_the_order_of_the_unit(store):
    """The same answers in another order are the same unit."""
    store.add_units([UNIT])
    assert store.add_votes([(NewUnit("pair", UNIT.prompt, ANSWERS[::-1]), "ann", Choice(0), 1.0)]) == 0
    assert [row["chosen"] for row in preference_rows(store)] == [ANSWERS[1].text]


# --- preference pairs -------------------------------------------------------------------------------------------------


def vote(store, *votes, kind="human", unit=None):
    """Let one labeler per vote vote on the only unit."""
    unit = unit or only_unit(store)
    for i, each in enumerate(votes):
        with store.write() as db:
            labeler = store_labeler(db, f"{kind} {i}", kind)
            assignment = add_assignment(db, unit.id, labeler, order=(0, 1), now=0.0, leased_until=0.0)
            put_vote(db, assignment, each, seconds=2.0 + i, now=0.0)


def store_labeler(db, name, kind):
    return db.execute(schema.labelers.insert().values(name=name, kind=kind, created=0.0)).inserted_primary_key[0]


def test_the_votes_of_a_unit_become_one_pair_with_the_mean_margin(store):
    """By hand: +0.5, +1 and -0.5 are +1/3 on average."""
    store.add_units([UNIT])
    vote(store, Choice(0), Choice(0, 2), Choice(1), Skip())
    (row,) = preference_rows(store)
    assert row == {
        "prompt": UNIT.prompt,
        "chosen": "Run ip route.",
        "rejected": "Reboot it.",
        "margin": pytest.approx(1 / 3, abs=1e-5),
        "tie": False,
        "labeler": "human 0, human 1, human 2",
        "votes": 3,
        "seconds": 3.0,
        "topic": "routing",
        "task": "pair",
        "chosen_model": "model-a",
        "rejected_model": "model-b",
        "chosen_temperature": 0.7,
        "rejected_temperature": None,
        "chosen_truncated": False,
        "rejected_truncated": False,
    }


@pytest.mark.parametrize("votes", [(Choice(0), Choice(1)), (Choice(None, tie="bad"),)])
def test_votes_without_a_winner_are_a_tie(store, votes):
    store.add_units([UNIT])
    vote(store, *votes)
    (row,) = preference_rows(store)
    assert (row["margin"], row["tie"]) == (0.0, True)


def test_people_come_before_judges(store):
    store.add_units([UNIT])
    vote(store, Choice(1), Choice(1), kind="judge")
    assert [row["chosen"] for row in preference_rows(store)] == ["Reboot it."]
    vote(store, Skip(), kind="human")
    assert [row["chosen"] for row in preference_rows(store)] == ["Reboot it."]


def test_people_overrule_judges(store):
    store.add_units([UNIT])
    vote(store, Choice(1), Choice(1), kind="judge")
    vote(store, Choice(0), kind="human")
    assert [(row["chosen"], row["labeler"]) for row in preference_rows(store)] == [("Run ip route.", "human 0")]


def test_gold_units_and_repeats_make_no_pairs(store):
    store.add_units([NewUnit("pair", "q", ANSWERS, gold=Choice(0))])
    vote(store, Choice(0))
    assert list(preference_rows(store)) == []


def test_an_edited_answer_is_chosen_over_its_original_and_that_over_the_other(store):
    store.add_units([NewUnit("edit", [{"role": "user", "content": "q"}], ANSWERS)])
    unit = store.unjudged("x", "edit")[0]
    vote(store, Edit(0, "Run ip route show.", 2), unit=unit)
    pairs = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in preference_rows(store)]
    assert pairs == [("Run ip route.", "Reboot it."), ("Run ip route show.", "Run ip route.")]


def test_reward_training_reads_the_database(store, tmp_path):
    messages = [{"role": "user", "content": "And now?"}]
    store.add_units([UNIT, NewUnit("pair", messages, ANSWERS, columns={"tools": [{"name": "t"}]})])
    for unit, chosen in zip(store.unjudged("x"), (Choice(0, 2), Choice(None, tie="good")), strict=True):
        vote(store, chosen, unit=unit, kind=f"human {unit.id}")
    data, train, _ = load_preferences(str(tmp_path / "feedback.db"), heldout_fraction=0.0, seed=0)
    assert [(p.prompt, p.chosen, p.margin, p.tie) for p in train] == [
        (UNIT.prompt, "Run ip route.", 1.0, False),
        ("And now?", "Run ip route.", 0.0, True),
    ]
    assert train[1].messages == tuple(messages)
    assert train[1].chat_template_kwargs == {"tools": [{"name": "t"}]}
    assert not data.notes or "unused" not in str(data.notes)
    assert len(load_preferences(f"{tmp_path / 'feedback.db'}?weight=2", heldout_fraction=0.0, seed=0)[1]) == 4
    weighted = load_preferences(f"{tmp_path / 'feedback.db'}?strength=weight", heldout_fraction=0.0, seed=0)[1]
    assert [(p.margin, p.tie, p.loss_weight) for p in weighted] == [(0.0, False, 2.0), (0.0, True, 1.0)]


def test_a_database_without_votes_or_a_missing_one_is_an_error(store, tmp_path):
    with pytest.raises(DataError, match="no votes"):
        load_preferences(str(tmp_path / "feedback.db"), heldout_fraction=0.0, seed=0)
    with pytest.raises(ConfigError, match="no such file"):
        load_preferences("runs/none.db", heldout_fraction=0.0, seed=0)


# --- databases that can't be used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mysql://host/name", "mysql isn't supported"),
        ("postgresql://host:port/name", "malformed"),
        ("missing/feedback.db", "can't be used"),
        ("postgresql://user:hunter2@127.0.0.1:1/name", "can't be used"),
    ],
)
def test_unusable_databases(name, problem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=problem) as error:
        Store(name)
    assert "hunter2" not in str(error.value)


def test_a_file_that_is_another_database_stays_as_it_is(tmp_path):
    path = tmp_path / "other.db"
    with sa.create_engine(f"sqlite:///{path}").begin() as db:
        db.execute(sa.text("CREATE TABLE songs (id INTEGER)"))
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="holds other tables"):
        Store(path)
    assert path.read_bytes() == before or b"songs" in path.read_bytes()
    with pytest.raises(ConfigError, match="no such file"):
        Store(tmp_path / "none.db", create=False)


def test_a_database_of_a_newer_version_is_refused(tmp_path):
    Store(tmp_path / "feedback.db").close()
    with sa.create_engine(f"sqlite:///{tmp_path / 'feedback.db'}").begin() as db:
        db.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer version"):
        Store(tmp_path / "feedback.db")


# --- votes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vote", "margins"),
    [
        (Skip(), []),
        (Choice(0), [(0, 1, 0.5)]),
        (Choice(1, strength=2), [(0, 1, -1.0)]),
        (Choice(None, tie="bad"), [(0, 1, 0.0)]),
        (Ranking((2, 1, 3)), [(0, 1, -0.5), (0, 2, 0.5), (1, 2, 1.0)]),
        (Ranking((1, 1)), [(0, 1, 0.0)]),
        (Ratings(({"helpful": 5, "safe": 3}, {"helpful": 1, "safe": 3})), [(0, 1, 0.5)]),
        (Edit(1, "Better text.", 2), [(0, 1, -0.5)]),
        (Edit(0, "Better text."), []),
    ],
)
def test_preferences_of_votes(vote, margins):
    """By hand: half of the largest margin for better, a rank's share of the distance, a quarter per star."""
    assert [tuple(each) for each in vote.preferences()] == margins


@pytest.mark.parametrize(
    ("task", "vote"),
    [
        ("pair", Choice(1, 2)),
        ("pair", Choice(None, tie="good")),
        ("rank", Ranking((2, 1, 2))),
        ("rate", Ratings(({"safe": 1}, {"safe": 5}))),
        ("edit", Edit(1, "x", 2)),
        ("pair", Skip()),
    ],
)
def test_votes_survive_json(task, vote):
    number = 3 if task == "rank" else 2
    assert parse_vote(task, number, vote.value()) == vote


@pytest.mark.parametrize(
    ("task", "value"),
    [
        ("pair", {}),
        ("pair", {"better": 2}),
        ("pair", {"better": True}),
        ("pair", {"better": 0, "strength": 3}),
        ("pair", {"tie": "ugly"}),
        ("pair", []),
        ("rank", {"ranks": [1]}),
        ("rank", {"ranks": [0, 1]}),
        ("rate", {"ratings": [{"safe": 6}, {"safe": 1}]}),
        ("rate", {"ratings": [{"safe": 5}, {"helpful": 1}]}),
        ("rate", {"ratings": [{}, {}]}),
        ("edit", {"better": 0, "text": " "}),
        ("poem", {"better": 0}),
    ],
)
def test_other_values_are_no_votes(task, value):
    with pytest.raises(DataError, match="isn't a vote"):
        parse_vote(task, 2, value)


def test_an_edit_without_a_change_makes_no_pair_of_equal_texts(store):
    store.add_units([NewUnit("edit", "q", ANSWERS)])
    vote(store, Edit(0, "Run ip route.\n", 2), unit=store.unjudged("x", "edit")[0])
    assert [(row["chosen"], row["rejected"]) for row in preference_rows(store)] == [("Run ip route.", "Reboot it.")]
