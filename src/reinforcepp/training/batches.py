"""Which prompts belong to which step, and which rows to which pass: pure functions of seed, step and lengths.

No state here decides anything, so a resumed run goes on where it was, and no row is lost or doubled, whatever divides what.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence

from reinforcepp.types import Completion, Prompt


class PromptBatches:
    """Shuffled passes over ``prompts``; each prompt occurs exactly once per epoch, in a last batch that may be short."""

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, array[int]] = (-1, array("q"))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass."""
        return -(-len(self.prompts) // self.batch_size)

    def at(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        chosen = self._order_of(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return [self.prompts[i] for i in chosen]

    def _order_of(self, epoch: int) -> array[int]:
        """Kept for the epoch: of millions of prompts, shuffling takes a second."""
        if self._order[0] != epoch:
            order = array("q", range(len(self.prompts)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1]


def optimizer_batches(rows: int, size: int, seed: int) -> Iterator[list[int]]:
    """All row numbers, in chunks for one optimiser step each; shuffled if there are several, the last may be short."""
    order = list(range(rows))
    if size < rows:
        random.Random(seed).shuffle(order)
    for start in range(0, rows, size):
        yield order[start : start + size]


def micro_batches(completions: Sequence[Completion], rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """``rows`` in chunks for one forward pass each, rows of similar length together to save padding."""
    by_length = sorted(rows, key=lambda i: (len(completions[i].prompt.ids) + len(completions[i].ids), i))
    for start in range(0, len(by_length), size):
        yield by_length[start : start + size]
