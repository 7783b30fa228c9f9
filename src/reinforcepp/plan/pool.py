"""A pool of rollout workers that isn't there: the scheduler's own code deals prompts out, by a clock that is only counted."""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reinforcepp.rollout.dispatch import ChunkDone, DispatchStats, WorkerLost, WorkerReady, dispatch

HOUR = 3600.0
Happened = WorkerReady[int] | ChunkDone[int, int] | WorkerLost[int]


@dataclass(frozen=True)
class Conditions:
    """What workers have to live with."""

    failures_per_hour: float = 0.0
    """Of each worker, at any time with the same chance."""
    start_seconds: float = 0.0
    """From a worker's loss until another one in its place is ready."""
    spread: float = 0.0
    """Standard deviation of the logarithm of workers' speeds."""


class _Event(NamedTuple):
    at: float
    number: int
    what: str
    worker: int


@dataclass
class SimulatedPool:
    """Workers for :func:`~reinforcepp.rollout.dispatch.dispatch` that take no time but that of ``now``.

    Args:
        workers: how many; each that is lost is replaced.
        seconds_of: what a piece takes, by the places of its prompts, at the usual speed.
        conditions: how they fare.
        seed: decides who is fast and when who is lost.
    """

    workers: int
    seconds_of: Callable[[Sequence[int]], float]
    conditions: Conditions = Conditions()
    seed: int = 0
    now: float = field(default=0.0, init=False)
    useful: float = field(default=0.0, init=False)
    """Workers' seconds in pieces that were answered."""
    simulating: float = field(default=0.0, init=False)
    """Seconds of this machine's processor in what here stands for workers, so that the scheduler's own can be told apart."""
    slowness: dict[int, float] = field(default_factory=dict, init=False)
    """Of each worker that is there, how many times the usual seconds it takes."""
    _busy: dict[int, tuple[Sequence[int], float]] = field(default_factory=dict, init=False)
    _events: list[_Event] = field(default_factory=list, init=False)
    _number: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        """Have all workers there."""
        self._draw = random.Random(self.seed)
        for _ in range(self.workers):
            self._join()

    def ready(self) -> list[int]:
        """See :class:`~reinforcepp.rollout.dispatch.WorkerPool`."""
        return [worker for worker in self.slowness if worker not in self._busy]

    def submit(self, worker: int, places: Sequence[int]) -> None:
        """See :class:`~reinforcepp.rollout.dispatch.WorkerPool`."""
        begin = time.process_time()
        assert worker in self.slowness and worker not in self._busy, "who gets a piece is there and has none"
        seconds = self.seconds_of(places) * self.slowness[worker]
        self._busy[worker] = places, seconds
        self.later(seconds, "answers", worker)
        self.simulating += time.process_time() - begin

    def wait(self) -> Happened:
        """See :class:`~reinforcepp.rollout.dispatch.WorkerPool`."""
        begin = time.process_time()
        while (happened := self._next()) is None:
            pass
        self.simulating += time.process_time() - begin
        return happened

    def idle(self, seconds: float) -> None:
        """While the trainer does other things, workers come and go."""
        until = self.now + seconds
        while self._events and self._events[0].at <= until:
            self._next()
        self.now = until

    def _next(self) -> Happened | None:
        self.now, _, what, worker = heapq.heappop(self._events)
        if what == "joins":
            return WorkerReady(self._join())
        if worker not in self.slowness:  # what a lost one would have done
            return None
        if what == "answers":
            places, seconds = self._busy.pop(worker)
            self.useful += seconds
            return ChunkDone(worker, list(places))
        del self.slowness[worker]
        self._busy.pop(worker, None)
        self.later(self.conditions.start_seconds, "joins", worker)
        return WorkerLost(worker, "lost in the simulation")

    def _join(self) -> int:
        worker = self._number
        self.slowness[worker] = self._draw.lognormvariate(0.0, self.conditions.spread)
        rate = self.conditions.failures_per_hour / HOUR
        self.later(self._draw.expovariate(rate) if rate else float("inf"), "is lost", worker)
        return worker

    def later(self, seconds: float, what: str, worker: int) -> None:
        """After so many seconds a worker "joins", "answers" or "is lost"."""
        self._number += 1
        if seconds < float("inf"):
            heapq.heappush(self._events, _Event(self.now + seconds, self._number, what, worker))


@dataclass(frozen=True)
class Round:
    """What came of one rollout."""

    seconds: float
    """Until every prompt was answered."""
    useful: float
    """Workers' seconds in pieces that were answered."""
    scheduling: float
    """Seconds of this machine's processor in the scheduler."""
    stats: DispatchStats


def rounds(crew: SimulatedPool, number: int, most: int, times: int, between: float = 0.0) -> list[Round]:
    """``number`` prompts, at most ``most`` in a piece, dealt out so many times, with ``between`` seconds after each."""
    found = []
    for _ in range(times):
        begun, useful, simulating, begin = crew.now, crew.useful, crew.simulating, time.process_time()
        answers, stats = dispatch(crew, number, most)
        taken = time.process_time() - begin - (crew.simulating - simulating)
        assert answers == list(range(number)), "every prompt is answered once, and in its place"
        found.append(Round(crew.now - begun, crew.useful - useful, taken, stats))
        crew.idle(between)
    return found
