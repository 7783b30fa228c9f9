"""Dispatch items to workers that differ in speed, fail, and join late: every item is processed exactly once.

This module is pure bookkeeping. A :class:`WorkerPool` knows its workers and how to reach them: Ray actors
(``ray/actor_pool.py``), vLLM servers (``vllm/server_pool.py``) or simulated workers (``benchmarks/scaling``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from reinforcepp.errors import EngineLost

Item = TypeVar("Item", contravariant=True)
R = TypeVar("R")
W = TypeVar("W", bound=Hashable)

MAX_LOSSES, MAX_LOSSES_PER_WORKER = 10, 3
"""Losses in a row, without a result in between, that a dispatch survives: in total, and per worker of the pool.

More losses than the larger of the two point to a cause that all workers share.
"""


@dataclass(frozen=True)
class WorkerReady(Generic[W]):
    """A worker can take its first chunk."""

    worker: W


@dataclass(frozen=True)
class ChunkDone(Generic[W, R]):
    """A worker has finished its chunk."""

    worker: W
    results: Sequence[R]


@dataclass(frozen=True)
class WorkerLost(Generic[W]):
    """A worker is gone, and its unfinished chunk with it."""

    worker: W
    reason: str


class WorkerPool(Protocol[W, Item, R]):
    """Workers to which :func:`dispatch` sends chunks of items."""

    def ready(self) -> list[W]:
        """Return the workers that can process items now."""

    def submit(self, worker: W, chunk: Sequence[Item]) -> None:
        """Start processing a chunk on ``worker``, which is idle."""

    def wait(self) -> WorkerReady[W] | ChunkDone[W, R] | WorkerLost[W]:
        """Block until something happens and return it."""


@dataclass
class DispatchStats:
    """Statistics of one dispatch."""

    chunks: int = 0
    lost: int = 0
    """Workers that were lost."""
    requeued: int = 0
    """Items that were dispatched again because their worker was lost."""
    reasons: list[str] = field(default_factory=list)
    """Why each worker was lost."""


class WorkQueue(Generic[W, R]):
    """Indices of items that wait, are in progress, or are done; each item is in exactly one of these states.

    Args:
        count: number of items.
        chunk_size: largest number of items in a chunk.
    """

    def __init__(self, count: int, chunk_size: int) -> None:
        self._waiting = deque(range(count))
        self._in_progress: dict[W, tuple[int, ...]] = {}
        self._results: dict[int, R] = {}
        self._count, self._chunk_size = count, chunk_size

    @property
    def done(self) -> bool:
        """Whether every item has a result."""
        return len(self._results) == self._count

    @property
    def busy(self) -> int:
        """Number of workers that have a chunk."""
        return len(self._in_progress)

    def take(self, worker: W, idle: int) -> tuple[int, ...]:
        """Return the next chunk for ``worker``, one of ``idle`` idle workers; empty if no item waits.

        Waiting items are divided evenly among the idle workers, because a batch takes nearly as long with half its rows. If
        they exceed ``chunk_size`` per worker, idle workers pull further chunks as they finish.
        """
        assert worker not in self._in_progress, "a worker has one chunk at a time"
        size = min(self._chunk_size, -(-len(self._waiting) // max(1, idle)))
        chunk = tuple(self._waiting.popleft() for _ in range(size))
        if chunk:
            self._in_progress[worker] = chunk
        return chunk

    def complete(self, worker: W, results: Sequence[R]) -> None:
        """Record the results of ``worker``'s chunk."""
        chunk = self._in_progress.pop(worker)
        assert len(chunk) == len(results), "a chunk has one result per item"
        for index, result in zip(chunk, results, strict=True):
            assert index not in self._results, "an item is processed once"
            self._results[index] = result

    def requeue(self, worker: W) -> int:
        """Put the unfinished chunk of ``worker`` back to the front of the queue; return its number of items."""
        chunk = self._in_progress.pop(worker, ())
        self._waiting.extendleft(reversed(chunk))
        return len(chunk)

    def results(self) -> list[R]:
        """Return all results in the order of the items."""
        return [self._results[index] for index in range(self._count)]


def dispatch(pool: WorkerPool[W, Item, R], items: Sequence[Item], chunk_size: int) -> tuple[list[R], DispatchStats]:
    """Process ``items`` on ``pool``, up to ``chunk_size`` at a time per worker; return the results in item order.

    Raises:
        EngineLost: Too many workers were lost in a row without a result.
    """
    queue: WorkQueue[W, R] = WorkQueue(len(items), chunk_size)
    stats = DispatchStats()
    idle = dict.fromkeys(pool.ready())
    losses_in_a_row = pool_size = 0
    while not queue.done:
        while idle:
            worker = next(iter(idle))
            chunk = queue.take(worker, len(idle))
            if not chunk:
                break
            del idle[worker]
            pool.submit(worker, [items[index] for index in chunk])
            stats.chunks += 1
        pool_size = max(pool_size, len(idle) + queue.busy)
        event: Any = pool.wait()
        if isinstance(event, WorkerLost):
            idle.pop(event.worker, None)
            stats.requeued += queue.requeue(event.worker)
            stats.lost += 1
            stats.reasons.append(event.reason)
            losses_in_a_row += 1
            if losses_in_a_row > max(MAX_LOSSES, MAX_LOSSES_PER_WORKER * pool_size):
                raise EngineLost(
                    f"Lost {losses_in_a_row} workers in a row without a result. The last one: {event.reason}. Fix this cause, "
                    "then resume the run."
                )
            continue
        if isinstance(event, ChunkDone):
            queue.complete(event.worker, event.results)
            losses_in_a_row = 0
        idle[event.worker] = None
    return queue.results(), stats


def dispatch_to_all(pool: WorkerPool[W, Item, R], items: Sequence[Item]) -> list[Sequence[R]]:
    """Process all ``items`` on every ready worker; return the results of each worker that wasn't lost meanwhile.

    If all of them are lost, the workers that become ready next take their place.
    """
    finished: list[Sequence[R]] = []
    while not finished:
        busy = set(pool.ready())
        for worker in pool.ready():
            pool.submit(worker, items)
        while busy:
            event: Any = pool.wait()
            if isinstance(event, ChunkDone):
                finished.append(event.results)
            if not isinstance(event, WorkerReady):
                busy.discard(event.worker)
        while not finished and not pool.ready():
            pool.wait()
    return finished
