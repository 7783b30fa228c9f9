"""benchmarks/feedback_loop.py at a tiny size, and the person that labels in it."""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sqlalchemy")

import sqlalchemy as sa

from reinforcepp.data import load_preferences
from reinforcepp.data.builtin.judge import GoldJudge
from reinforcepp.data.feedback import Store, schema
from scripts import benchmark, result_of

QUESTION = "Which tool helps me unblock the wireless card on Linux?"
GOOD = "Use `rfkill list` to see the block, then `sudo rfkill unblock wifi` if it is a soft one."
BAD = "Ask somebody else."


def test_the_person_votes_as_the_gold_judge_apart_from_the_noise():
    labeler = benchmark("labeler")
    assert GoldJudge().score(QUESTION, GOOD) > 0.5 > GoldJudge().score(QUESTION, BAD)
    person = labeler.NoisyJudge(0.0, "seed")
    pairs = ([GOOD, BAD], [BAD, GOOD], [GOOD, GOOD], [BAD, BAD])
    assert [person(QUESTION, pair) for pair in pairs] == ["1", "2", "good", "bad"]
    assert [labeler.NoisyJudge(1.0, "seed")(QUESTION, pair) for pair in pairs[:2]] == ["2", "1"]
    noisy = labeler.NoisyJudge(0.1, "seed")
    wrong = sum(noisy(QUESTION, [GOOD, BAD]) == "2" for _ in range(1000))
    assert 70 < wrong < 130, "three standard deviations around 100"


@pytest.mark.full
def test_every_round_adds_votes_and_uncertain_pairs_come_first(tmp_path):
    flags = ["--seeds", "0", "--rounds", "2", "--labels", "6", "--prompts", "16", "--steps", "1", "--batch_size", "4"]
    flags += ["--heldout", "4", "--folder", str(tmp_path / "rounds")]
    rows = result_of("feedback_loop", tmp_path, *flags)["rows"]
    assert [(row["selection"], row["round"], row["labels"]) for row in rows] == [
        (selection, number, 6 * number) for selection in ("random", "uncertain") for number in range(3)
    ]
    assert rows[0]["gold"] == rows[3]["gold"] and rows[1]["gold"] == rows[4]["gold"], "the first round is shared"
    assert all(0 <= row["gold"] <= 1 and (row["round"] == 0 or 0 <= row["rm_accuracy"] <= 1) for row in rows)
    for selection in ("random", "uncertain"):
        folder = tmp_path / "rounds" / "seed-0" / selection / "round-2"
        assert len(load_preferences(str(folder / "feedback.db"), heldout_fraction=0.0, seed=0)[1]) == 6
        assert max(_priorities(folder, voted=True)) <= min(_priorities(folder, voted=False))
        assert (max(_priorities(folder, voted=True)) < 0) == (selection == "uncertain")
    for file in (tmp_path / "rounds").rglob("feedback.db"):
        file.unlink()
    assert result_of("feedback_loop", tmp_path, *flags)["rows"] == rows, "finished rounds aren't repeated"


def _priorities(folder, *, voted):
    """Priorities of the units with or without a vote; negative ones are those of reward models."""
    a, u = schema.assignments, schema.units
    has_vote = sa.exists().where(a.c.unit_id == u.c.id, schema.votes.c.assignment_id == a.c.id)
    store = Store(folder / "feedback.db", create=False)
    with store.read() as db:
        found = list(db.execute(sa.select(u.c.priority).where(has_vote if voted else ~has_vote)).scalars())
    store.close()
    assert found and all(map(math.isfinite, found))
    return found
