"""Work that rank 0 does for all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import distributed

from reinforcepp.distributed.ranks import NO_TIMEOUT, Ranks
from reinforcepp.errors import ReinforceError

Q = TypeVar("Q")
T = TypeVar("T")


class RankZero:
    """Runs functions on rank 0 for all ranks.

    All ranks must make the same calls in the same order. Calls use a process group of their own, so a thread can make them
    while the training uses the default group.

    Args:
        ranks: the ranks of the training.
        timeout_seconds: raise an error after this long without an answer; 0 disables the timeout.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float) -> None:
        self._count, self._is_zero = ranks.count, ranks.is_main
        timeout = timedelta(seconds=timeout_seconds) if timeout_seconds else NO_TIMEOUT
        self._group = distributed.new_group(backend="gloo", timeout=timeout) if ranks.count > 1 else None

    def map(self, item: Q, function: Callable[[Sequence[Q]], Sequence[T]]) -> T:
        """Return this rank's result of ``function``, which rank 0 calls with the items of all ranks.

        Raises:
            ReinforceError: on all ranks, if ``function`` raises it on rank 0.
        """
        if self._group is None:
            return function([item])[0]
        items: list[Any] | None = [None] * self._count if self._is_zero else None
        distributed.gather_object(item, items, dst=0, group=self._group)
        outcomes: list[Any] | None = None
        if items is not None:
            try:
                outcomes = [(result, None) for result in function(items)]
            except ReinforceError as error:
                outcomes = [(None, error)] * self._count
        received: list[Any] = [None]
        distributed.scatter_object_list(received, outcomes, src=0, group=self._group)
        result, failure = received[0]
        if failure is not None:
            raise failure
        return cast(T, result)

    def run(self, function: Callable[[], T]) -> T:
        """Return the result of ``function``, which only rank 0 calls; raises as :meth:`map`."""
        return self.map(None, lambda items: [function()] * len(items))
