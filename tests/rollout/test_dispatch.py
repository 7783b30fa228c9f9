"""Every prompt is processed once, whichever worker dies, joins or is slow; tested with simulated pools."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import scripts
from reinforcepp.errors import RolloutError
from reinforcepp.rollout.dispatch import ChunkDone, WorkerLost, WorkerReady, WorkQueue, dispatch, dispatch_to_all

pool = scripts.benchmark("scaling.pool")
Conditions, SimulatedPool = pool.Conditions, pool.SimulatedPool


class Simulated(SimulatedPool):
    """Workers that take a while per chunk and die in the middle of some; lost ones are replaced, and some join late."""

    def __init__(self, workers: int, *, deaths: float = 0.0, seed: int = 0, joining: int = 0) -> None:
        super().__init__(workers, lambda chunk: self._random.expovariate(0.1), Conditions(start_seconds=5.0), seed)
        self.deaths = deaths
        self.submitted: list[int] = []
        for _ in range(joining):
            self.schedule(self._random.uniform(0, 20), "joins", -1)

    def submit(self, worker, chunk):
        super().submit(worker, chunk)
        self.submitted += chunk
        if self._random.random() < self.deaths:
            self.schedule(0.0, "is lost", worker)


@settings(deadline=None)
@given(
    number=st.integers(0, 200),
    workers=st.integers(0, 20),
    joining=st.integers(1, 5),
    most=st.integers(1, 50),
    deaths=st.floats(0, 0.3),
    seed=st.integers(0, 10**6),
)
def test_every_prompt_is_processed_once(number, workers, joining, most, deaths, seed):
    pool = Simulated(workers, joining=joining, deaths=deaths, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reinforcepp.rollout.dispatch.MAX_LOSSES", 1000)
        results, stats = dispatch(pool, range(number), most)
    assert results == list(range(number))
    assert len(pool.submitted) == number + stats.requeued and set(pool.submitted) == set(range(number))
    assert stats.lost == len(stats.reasons) and (stats.lost > 0 or stats.requeued == 0)


def test_prompts_that_fit_are_divided_evenly():
    pool = Simulated(4)
    _, stats = dispatch(pool, range(64), 128)
    assert stats.chunks == 4 and pool.submitted == list(range(64))


def test_idle_workers_pull_further_chunks():
    pool = SimulatedPool(4, lambda chunk: 1.0)
    pool.slowness[0] = 100.0
    _, stats = dispatch(pool, range(80), 2)
    assert stats.chunks == 40 and pool.now == 100.0  # the slow one had a single chunk


def test_a_worker_that_joins_in_the_middle_is_used():
    pool = Simulated(1, joining=1, seed=1)
    dispatch(pool, range(50), 2)
    assert len(pool.slowness) == 2 and pool.submitted == list(range(50))


def test_the_chunk_of_a_lost_worker_is_dispatched_first():
    queue: WorkQueue[str, int] = WorkQueue(6, 2)
    assert (queue.take("a", 3), queue.take("b", 2)) == ((0, 1), (2, 3))
    assert queue.requeue("a") == 2 and queue.requeue("a") == 0
    assert queue.take("c", 1) == (0, 1)
    queue.complete("c", [10, 11])
    queue.complete("b", [12, 13])
    assert not queue.done
    assert queue.take("c", 1) == (4, 5) and queue.take("d", 1) == ()
    queue.complete("c", [14, 15])
    assert queue.done and queue.results() == [10, 11, 12, 13, 14, 15]


def test_a_chunk_needs_one_result_per_prompt():
    queue: WorkQueue[str, int] = WorkQueue(2, 2)
    queue.take("a", 1)
    with pytest.raises(AssertionError):
        queue.complete("a", [1])


def test_losses_with_results_in_between_do_not_stop_the_run(monkeypatch):
    monkeypatch.setattr("reinforcepp.rollout.dispatch.MAX_LOSSES", 0)
    monkeypatch.setattr("reinforcepp.rollout.dispatch.MAX_LOSSES_PER_WORKER", 1)

    class EverySecondDies(Simulated):
        def submit(self, worker, chunk):
            self.deaths = len(self.submitted) % 2
            super().submit(worker, chunk)

    results, stats = dispatch(EverySecondDies(1), range(20), 1)
    assert len(results) == 20 and stats.lost > 10


def test_a_worker_lost_while_idle_gets_no_chunk():
    class Script:
        """Of two workers the idle one is lost, then the other with its chunk, and a third finishes it."""

        def __init__(self):
            self.events = iter(
                [WorkerLost("b", "gone"), WorkerLost("a", "gone"), WorkerReady("c"), ChunkDone("c", ["done"])]
            )
            self.submitted = []

        def ready(self):
            return ["a", "b"]

        def submit(self, worker, chunk):
            self.submitted.append(worker)

        def wait(self):
            return next(self.events)

    pool = Script()
    results, stats = dispatch(pool, range(1), 1)
    assert (results, pool.submitted, stats.lost, stats.requeued) == (["done"], ["a", "c"], 2, 1)


def test_too_many_losses_in_a_row_stop_with_the_cause():
    with pytest.raises(RolloutError, match=r"workers in a row without a result.*lost in the simulation"):
        dispatch(Simulated(3, deaths=1.0), range(10), 2)


def test_dispatch_to_all_returns_the_results_of_each_worker_that_is_not_lost():
    class Script:
        """Of two workers one is lost; then all are lost, and a third takes over."""

        def __init__(self, *events):
            self.events, self.workers = iter(events), {"a": None, "b": None}

        def ready(self):
            return list(self.workers)

        def submit(self, worker, chunk):
            assert list(chunk) == [0, 1]

        def wait(self):
            event = next(self.events)
            if isinstance(event, WorkerLost):
                del self.workers[event.worker]
            if isinstance(event, WorkerReady):
                self.workers[event.worker] = None
            return event

    lost_a, done_b = WorkerLost("a", "gone"), ChunkDone("b", [1, 2])
    assert dispatch_to_all(Script(done_b, ChunkDone("a", [1, 2])), range(2)) == [[1, 2], [1, 2]]
    assert dispatch_to_all(Script(lost_a, done_b), range(2)) == [[1, 2]]
    joined_early = Script(lost_a, WorkerReady("c"), WorkerLost("b", "gone"), ChunkDone("c", [3, 4]))
    joined_late = Script(lost_a, WorkerLost("b", "gone"), WorkerReady("c"), ChunkDone("c", [3, 4]))
    assert dispatch_to_all(joined_early, range(2)) == dispatch_to_all(joined_late, range(2)) == [[3, 4]]
