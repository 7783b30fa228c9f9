"""A simulated pool of rollout workers: the real dispatch code distributes prompts, on a simulated clock."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reinforcepp.rollout.dispatch import ChunkDone, DispatchStats, WorkerLost, WorkerReady, dispatch

HOUR_SECONDS = 3600.0
Event = WorkerReady[int] | ChunkDone[int, int] | WorkerLost[int]


@dataclass(frozen=True)
class Conditions:
    """Failures and speeds of the workers."""

    failures_per_hour: float = 0.0
    """Failure rate of each worker."""
    start_seconds: float = 0.0
    """Time from the loss of a worker until its replacement is ready."""
    spread: float = 0.0
    """Standard deviation of the logarithm of workers' speeds."""


class _Scheduled(NamedTuple):
    at: float
    number: int
    kind: str
    worker: int


@dataclass
class SimulatedPool:
    """Workers for :func:`~reinforcepp.rollout.dispatch.dispatch` on the simulated clock ``now``.

    Args:
        workers: number of workers; each lost worker is replaced.
        seconds_of: seconds of a chunk at the usual speed, by the indices of its prompts.
        conditions: failures and speeds.
        seed: of the workers' speeds and failures.
    """

    workers: int
    seconds_of: Callable[[Sequence[int]], float]
    conditions: Conditions = Conditions()
    seed: int = 0
    now: float = field(default=0.0, init=False)
    useful: float = field(default=0.0, init=False)
    """Workers' seconds in chunks that were completed."""
    simulating: float = field(default=0.0, init=False)
    """CPU seconds of the simulation itself, to subtract them from those of the dispatch code."""
    slowness: dict[int, float] = field(default_factory=dict, init=False)
    """Seconds of each present worker relative to the usual seconds."""
    _busy: dict[int, tuple[Sequence[int], float]] = field(default_factory=dict, init=False)
    _events: list[_Scheduled] = field(default_factory=list, init=False)
    _number: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Start all workers."""
        self._random = random.Random(self.seed)
        for _ in range(self.workers):
            self._join()

    def ready(self) -> list[int]:
        """Return the idle workers."""
        return [worker for worker in self.slowness if worker not in self._busy]

    def submit(self, worker: int, indices: Sequence[int]) -> None:
        """Start a chunk on an idle worker."""
        begin = time.process_time()
        assert worker in self.slowness and worker not in self._busy, "a chunk goes to an idle worker"
        seconds = self.seconds_of(indices) * self.slowness[worker]
        self._busy[worker] = indices, seconds
        self.schedule(seconds, "answers", worker)
        self.simulating += time.process_time() - begin

    def wait(self) -> Event:
        """Advance the clock to the next event, and return it."""
        begin = time.process_time()
        while (event := self._next()) is None:
            pass
        self.simulating += time.process_time() - begin
        return event

    def idle(self, seconds: float) -> None:
        """Advance the clock while the trainer does other work; workers fail and join meanwhile."""
        until = self.now + seconds
        while self._events and self._events[0].at <= until:
            self._next()
        self.now = until

    def _next(self) -> Event | None:
        self.now, _, kind, worker = heapq.heappop(self._events)
        if kind == "joins":
            return WorkerReady(self._join())
        if worker not in self.slowness:  # The event belongs to a worker that was lost before.
            return None
        if kind == "answers":
            indices, seconds = self._busy.pop(worker)
            self.useful += seconds
            return ChunkDone(worker, list(indices))
        del self.slowness[worker]
        self._busy.pop(worker, None)
        self.schedule(self.conditions.start_seconds, "joins", worker)
        return WorkerLost(worker, "lost in the simulation")

    def _join(self) -> int:
        worker = self._number
        self.slowness[worker] = self._random.lognormvariate(0.0, self.conditions.spread)
        rate = self.conditions.failures_per_hour / HOUR_SECONDS
        self.schedule(self._random.expovariate(rate) if rate else float("inf"), "is lost", worker)
        return worker

    def schedule(self, seconds: float, kind: str, worker: int) -> None:
        """Schedule an event ("joins", "answers" or "is lost") of a worker in ``seconds``."""
        self._number += 1
        if seconds < float("inf"):
            heapq.heappush(self._events, _Scheduled(self.now + seconds, self._number, kind, worker))


@dataclass(frozen=True)
class Rollout:
    """The outcome of one simulated rollout."""

    seconds: float
    """Until every prompt has completions."""
    useful: float
    """Workers' seconds in chunks that were completed."""
    scheduling: float
    """CPU seconds of the dispatch code."""
    stats: DispatchStats


def simulate(pool: SimulatedPool, number: int, chunk_size: int, rollouts: int, between: float = 0.0) -> list[Rollout]:
    """Return the outcomes of several rollouts.

    Args:
        pool: the workers.
        number: prompts per rollout.
        chunk_size: upper limit of prompts per chunk.
        rollouts: number of rollouts.
        between: simulated seconds after each rollout.
    """
    outcomes = []
    for _ in range(rollouts):
        begun, useful, simulating, begin = pool.now, pool.useful, pool.simulating, time.process_time()
        answers, stats = dispatch(pool, range(number), chunk_size)
        scheduling = time.process_time() - begin - (pool.simulating - simulating)
        assert answers == list(range(number)), "every prompt has one answer, at its index"
        outcomes.append(Rollout(pool.now - begun, pool.useful - useful, scheduling, stats))
        pool.idle(between)
    return outcomes
