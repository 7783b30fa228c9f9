"""Which prompts belong to which step, and which rows to which pass: pure functions of seed, step and lengths.

Nothing here has state, so a resumed run goes on where it was, and no row is lost or doubled, whatever divides what.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from reinforcepp.types import Completion, Prompt


class PromptBatches:
    """Shuffled passes over ``prompts``; each prompt occurs exactly once per epoch, in a last batch that may be short."""

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int) -> None:
        self.prompts = list(prompts)
        self.batch_size = batch_size
        self.seed = seed

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass."""
        return -(-len(self.prompts) // self.batch_size)

    def at(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = list(range(len(self.prompts)))
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return [self.prompts[i] for i in order[place * self.batch_size : (place + 1) * self.batch_size]]


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
