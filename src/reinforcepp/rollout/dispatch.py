"""Dealing prompts out to workers that are fast or slow, come and go: every prompt is answered once, whoever dies.

Pure bookkeeping: who the workers are and how they are spoken to is the business of a ``Crew``, a real one
(``ray_crew``) or a simulated one (benchmarks/scaling.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from reinforcepp.errors import EngineLost

A = TypeVar("A")
W = TypeVar("W", bound=Hashable)
LOSSES, LOSSES_EACH = 10, 3
"""Workers that may be lost in a row without an answer in between, in all and for each that there was: then something is
wrong with all of them, not with a machine of many workers."""


@dataclass(frozen=True)
class Joined(Generic[W]):
    """A worker is ready for its first piece."""

    worker: W


@dataclass(frozen=True)
class Answered(Generic[W, A]):
    """A worker has done its piece."""

    worker: W
    answers: Sequence[A]


@dataclass(frozen=True)
class Lost(Generic[W]):
    """A worker is gone, and what it was doing with it."""

    worker: W
    reason: str


class Crew(Protocol[W, A]):
    """Workers as ``share_out`` needs them."""

    def ready(self) -> list[W]:
        """Those that may be given a piece now."""

    def give(self, worker: W, places: Sequence[int]) -> None:
        """Have ``worker`` answer the prompts at ``places``; it has nothing else to do."""

    def wait(self) -> Joined[W] | Answered[W, A] | Lost[W]:
        """What happens next."""


@dataclass
class Tally:
    """What happened while prompts were dealt out."""

    pieces: int = 0
    lost: int = 0
    again: int = 0
    """Prompts that were given out a second time, because whoever had them was lost."""
    reasons: list[str] = field(default_factory=list)


class Board(Generic[W, A]):
    """Which prompts wait, who has which, and which are answered; a prompt is in one of these places at any time.

    Args:
        number: of prompts, which are named by their places.
        most: prompts in a piece, at most: what a worker generates at a time.
    """

    def __init__(self, number: int, most: int) -> None:
        self._waiting = deque(range(number))
        self._held: dict[W, tuple[int, ...]] = {}
        self._answers: dict[int, A] = {}
        self._number, self._most = number, most

    @property
    def done(self) -> bool:
        """Whether every prompt is answered."""
        return len(self._answers) == self._number

    @property
    def working(self) -> int:
        """Workers that have a piece."""
        return len(self._held)

    def take(self, worker: W, workers: int) -> tuple[int, ...]:
        """The next piece, empty where nothing waits.

        What waits is divided evenly among those who are free, since a batch takes nearly as long with half its rows; where
        it is more than they can hold, they come back for the rest as they finish.
        """
        assert worker not in self._held, "a worker has one piece at a time"
        size = min(self._most, -(-len(self._waiting) // max(1, workers)))
        piece = tuple(self._waiting.popleft() for _ in range(size))
        if piece:
            self._held[worker] = piece
        return piece

    def answered(self, worker: W, answers: Sequence[A]) -> None:
        """``worker`` has done its piece."""
        piece = self._held.pop(worker)
        assert len(piece) == len(answers), "a piece has one answer for each prompt"
        for place, answer in zip(piece, answers, strict=True):
            assert place not in self._answers, "a prompt is answered once"
            self._answers[place] = answer

    def lost(self, worker: W) -> int:
        """What ``worker`` had waits again, in front; returns how many prompts that are."""
        piece = self._held.pop(worker, ())
        self._waiting.extendleft(reversed(piece))
        return len(piece)

    def answers(self) -> list[A]:
        """All answers, in the order of the prompts."""
        return [self._answers[place] for place in range(self._number)]


def share_out(crew: Crew[W, A], number: int, most: int) -> tuple[list[A], Tally]:
    """Have ``number`` prompts answered by ``crew``, at most ``most`` at a time by each; the answers are in their order.

    Raises:
        EngineLost: one worker after the other is lost without having answered anything.
    """
    board: Board[W, A] = Board(number, most)
    tally = Tally()
    free = dict.fromkeys(crew.ready())
    in_a_row = most_at_once = 0
    while not board.done:
        while free:
            worker = next(iter(free))
            piece = board.take(worker, len(free))
            if not piece:
                break
            del free[worker]
            crew.give(worker, piece)
            tally.pieces += 1
        most_at_once = max(most_at_once, len(free) + board.working)
        event: Any = crew.wait()
        if isinstance(event, Lost):
            free.pop(event.worker, None)
            tally.again += board.lost(event.worker)
            tally.lost += 1
            tally.reasons.append(event.reason)
            in_a_row += 1
            if in_a_row > max(LOSSES, LOSSES_EACH * most_at_once):
                raise EngineLost(
                    f"{in_a_row} rollout workers were lost one after the other without an answer, the last with: "
                    f"{event.reason}"
                )
            continue
        if isinstance(event, Answered):
            board.answered(event.worker, event.answers)
            in_a_row = 0
        free[event.worker] = None
    return board.answers(), tally
