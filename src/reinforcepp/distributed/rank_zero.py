"""What the first of several processes does for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch import distributed

from reinforcepp.distributed.ranks import NEVER, Ranks
from reinforcepp.errors import ReinforceError

Q = TypeVar("Q")
T = TypeVar("T")


class FirstRank:
    """The first of several ranks, which does for all what it alone can.

    All ranks ask it alike, in the same order, through a process group of its own: so a thread can ask while the training uses
    its group.

    Args:
        ranks: those of the training.
        seconds: without an answer, after which waiting for it is an error; 0 is never.
    """

    def __init__(self, ranks: Ranks, seconds: float) -> None:
        self._count, self._here = ranks.count, ranks.is_main
        timeout = timedelta(seconds=seconds) if seconds else NEVER
        self._group = distributed.new_group(backend="gloo", timeout=timeout) if ranks.count > 1 else None

    def answers(self, question: Q, answer: Callable[[Sequence[Q]], Sequence[T]]) -> T:
        """The first rank's answer to this rank's question; ``answer`` is called there, with the questions of all ranks.

        Raises:
            ReinforceError: on all ranks, what ``answer`` raised.
        """
        if self._group is None:
            return answer([question])[0]
        questions: list[Any] | None = [None] * self._count if self._here else None
        distributed.gather_object(question, questions, dst=0, group=self._group)
        told: list[Any] | None = None
        if questions is not None:
            try:
                told = [(own, None) for own in answer(questions)]
            except ReinforceError as error:
                told = [(None, error)] * self._count
        received: list[Any] = [None]
        distributed.scatter_object_list(received, told, src=0, group=self._group)
        outcome, failure = received[0]
        if failure is not None:
            raise failure
        return cast(T, outcome)

    def does(self, what: Callable[[], T]) -> T:
        """What the first rank gets from ``what``, which is called there alone; errors are those of :meth:`answers`."""
        return self.answers(None, lambda asked: [what()] * len(asked))
