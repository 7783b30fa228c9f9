"""Every prompt is answered once, whoever dies, joins or is slow; tried with simulated crews."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reinforcepp.errors import RolloutError
from reinforcepp.plan.pool import Conditions, SimulatedCrew
from reinforcepp.rollout.dispatch import Answered, Board, Joined, Lost, share_out


class Simulated(SimulatedCrew):
    """Workers that take a while for each piece and die in the middle of some; lost ones are replaced, some join late."""

    def __init__(self, workers: int, *, deaths: float = 0.0, seed: int = 0, joining: int = 0) -> None:
        super().__init__(workers, lambda places: self._draw.expovariate(0.1), Conditions(start_seconds=5.0), seed)
        self.deaths = deaths
        self.given: list[int] = []
        for _ in range(joining):
            self.later(self._draw.uniform(0, 20), "joins", -1)

    def give(self, worker, places):
        super().give(worker, places)
        self.given += places
        if self._draw.random() < self.deaths:
            self.later(0.0, "is lost", worker)


@settings(deadline=None)
@given(
    number=st.integers(0, 200),
    workers=st.integers(0, 20),
    joining=st.integers(1, 5),
    most=st.integers(1, 50),
    deaths=st.floats(0, 0.3),
    seed=st.integers(0, 10**6),
)
def test_every_prompt_is_answered_once(number, workers, joining, most, deaths, seed):
    crew = Simulated(workers, joining=joining, deaths=deaths, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reinforcepp.rollout.dispatch.LOSSES", 1000)
        answers, tally = share_out(crew, number, most)
    assert answers == list(range(number))
    assert len(crew.given) == number + tally.again and set(crew.given) == set(range(number))
    assert tally.lost == len(tally.reasons) and (tally.lost > 0 or tally.again == 0)


def test_what_fits_is_divided_evenly_at_once():
    crew = Simulated(4)
    _, tally = share_out(crew, 64, 128)
    assert tally.pieces == 4 and crew.given == list(range(64))


def test_more_than_fits_is_taken_as_workers_finish():
    crew = SimulatedCrew(4, lambda places: 1.0)
    crew.slowness[0] = 100.0
    _, tally = share_out(crew, 80, 2)
    assert tally.pieces == 40 and crew.now == 100.0  # the slow one had a single piece


def test_a_worker_that_joins_in_the_middle_is_used():
    crew = Simulated(1, joining=1, seed=1)
    share_out(crew, 50, 2)
    assert len(crew.slowness) == 2 and crew.given == list(range(50))


def test_what_a_lost_worker_had_comes_first_again():
    board: Board[str, int] = Board(6, 2)
    assert (board.take("a", 3), board.take("b", 2)) == ((0, 1), (2, 3))
    assert board.lost("a") == 2 and board.lost("a") == 0
    assert board.take("c", 1) == (0, 1)
    board.answered("c", [10, 11])
    board.answered("b", [12, 13])
    assert not board.done
    assert board.take("c", 1) == (4, 5) and board.take("d", 1) == ()
    board.answered("c", [14, 15])
    assert board.done and board.answers() == [10, 11, 12, 13, 14, 15]


def test_an_answer_too_few_is_no_answer():
    board: Board[str, int] = Board(2, 2)
    board.take("a", 1)
    with pytest.raises(AssertionError):
        board.answered("a", [1])


def test_losses_between_answers_are_no_reason_to_stop(monkeypatch):
    monkeypatch.setattr("reinforcepp.rollout.dispatch.LOSSES", 0)
    monkeypatch.setattr("reinforcepp.rollout.dispatch.LOSSES_EACH", 1)

    class EverySecondDies(Simulated):
        def give(self, worker, places):
            self.deaths = len(self.given) % 2
            super().give(worker, places)

    answers, tally = share_out(EverySecondDies(1), 20, 1)
    assert len(answers) == 20 and tally.lost > 10


def test_who_is_lost_while_idle_gets_nothing():
    class Script:
        """Two are there; the idle one goes, then the other with its piece, and a third does it."""

        def __init__(self):
            self.events = iter([Lost("b", "gone"), Lost("a", "gone"), Joined("c"), Answered("c", ["done"])])
            self.given = []

        def ready(self):
            return ["a", "b"]

        def give(self, worker, places):
            self.given.append(worker)

        def wait(self):
            return next(self.events)

    crew = Script()
    answers, tally = share_out(crew, 1, 1)
    assert (answers, crew.given, tally.lost, tally.again) == (["done"], ["a", "c"], 2, 1)


def test_where_everyone_dies_it_stops_with_the_cause():
    with pytest.raises(
        RolloutError, match="lost one after the other without an answer, the last with: lost in the simulation"
    ):
        share_out(Simulated(3, deaths=1.0), 10, 2)
