"""The prompts of each step: passes over the data, or draws from several datasets by probability.

They are a pure function of seed and step, so that a resumed run uses the same prompts.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import fmean
from typing import Any

from reinforcepp.rewards.functions import RewardScores
from reinforcepp.types import Completion, Prompt


class PromptBatches:
    """Passes over ``prompts``: each prompt occurs exactly once per epoch; the last batch can be short.

    Each pass has another order, unless ``shuffle`` is false. ``refills`` is the most refills of a step. A completion is a success
    if its reward is at least ``success_threshold``.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        refills: int = 0,
        success_threshold: float = 0.5,
    ) -> None:
        self.prompts = prompts
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.refills = refills
        self.success_threshold = success_threshold
        self._order: tuple[int, array[int]] = (-1, array("q"))

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches per epoch."""
        return -(-len(self.prompts) // self.batch_size)

    def at(self, step: int, start: int = 0, count: int | None = None) -> list[Prompt]:
        """Return ``count`` prompts of a step on all ranks, by default its batch; steps count from 0.

        The prompts from ``size(step)`` on are those of refills, for dynamic sampling: random other ones, while there are any.
        """
        rows = self._rows(step)
        if start:
            rows = [*rows, *self._refill_rows(step)]
        return [self.prompts[i] for i in rows[start:][:count]]

    def size(self, step: int) -> int:
        """Return the number of prompts in the batch of a step."""
        return len(self._rows(step))

    def with_refills(self, step: int) -> list[Prompt]:
        """Return the prompts of a step and those of all its refills."""
        return self.at(step) + (self.at(step, self.size(step)) if self.refills else [])

    def observe(self, step: int, completions: Sequence[Completion], scores: RewardScores) -> dict[str, float]:
        """Take note of the completions of a finished step; return metrics of the datasets, if there are several."""
        return source_metrics(completions, scores, self.success_threshold)

    def state(self) -> dict[str, Any]:
        """Return what decides on the prompts of later steps, apart from the settings, as JSON."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""

    def _refill_rows(self, step: int) -> list[int]:
        used = set(self._rows(step))
        count = min(len(self.prompts), len(used) * (self.refills + 1))
        drawn = random.Random(f"{self.seed}/{step}/refills").sample(range(len(self.prompts)), count)
        return [row for row in drawn if row not in used][: len(used) * self.refills]

    def _rows(self, step: int) -> Sequence[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        return self._order_of(epoch)[index * self.batch_size : (index + 1) * self.batch_size]

    def _order_of(self, epoch: int) -> array[int]:
        """Return the order of an epoch; it is cached because shuffling millions of prompts takes a second."""
        if self._order[0] != epoch:
            order = array("q", range(len(self.prompts)))
            if self.shuffle:
                random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        return self._order[1]


class InterleavedBatches(PromptBatches):
    """Draws the dataset of each prompt by ``probs``; ``prompts`` are those of one dataset after another.

    Each dataset is passed over in one order, again and again. A step has no prompt twice: if all prompts of a dataset are in
    it, the others fill it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        seed: int,
        probs: Sequence[float],
        **options: Any,
    ) -> None:
        super().__init__(prompts, batch_size, seed, **options)
        self.probs = probs
        groups = groupby(range(len(prompts)), key=lambda row: prompts[row].source)
        self._orders = [list(rows) for _, rows in groups]
        for number, order in enumerate(self._orders if self.shuffle else []):
            random.Random(f"{seed}/dataset {number}").shuffle(order)
        self._starts = [[0] * len(self._orders)]
        """Prompts drawn from each dataset before each step."""

    def _rows(self, step: int) -> Sequence[int]:
        while len(self._starts) <= step:
            start = list(self._starts[-1])
            for dataset in self._datasets(len(self._starts) - 1):
                start[dataset] += 1
            self._starts.append(start)
        position, rows = list(self._starts[step]), list[int]()
        for dataset in self._datasets(step):
            order = self._orders[dataset]
            rows.append(order[position[dataset] % len(order)])
            position[dataset] += 1
        return rows

    def _refill_rows(self, step: int) -> list[int]:
        used, generator = set(self._rows(step)), random.Random(f"{self.seed}/{step}/refills")
        wanted = len(used) * self.refills
        pools = [generator.sample(order, min(len(order), wanted + len(used))) for order in self._orders]
        pools = [[row for row in pool if row not in used] for pool in pools]
        return [pools[dataset].pop() for dataset in self._draw(generator, wanted, [len(pool) for pool in pools])]

    def _datasets(self, step: int) -> list[int]:
        generator = random.Random(f"{self.seed}/{step}/datasets")
        return self._draw(generator, self.batch_size, [len(order) for order in self._orders])

    def _draw(self, generator: random.Random, count: int, left: list[int]) -> list[int]:
        """Return the datasets of up to ``count`` prompts; ``left`` is how many prompts each one has."""
        drawn = list[int]()
        for _ in range(min(count, sum(left))):
            weights = [prob if rest else 0.0 for prob, rest in zip(self.probs, left, strict=True)]
            (dataset,) = generator.choices(range(len(left)), weights)
            left[dataset] -= 1
            drawn.append(dataset)
        return drawn


def source_metrics(
    completions: Sequence[Completion], scores: RewardScores, success_threshold: float
) -> dict[str, float]:
    """Return mean reward, share of successes and number of completions of each dataset, if the prompts are of several.

    A completion is a success if its reward is at least ``success_threshold``. Completions that dynamic sampling dropped count.
    """
    rewards: dict[str, list[float]] = {}
    for completion, total in zip(completions, scores.total, strict=True):
        if total is not None:
            rewards.setdefault(completion.prompt.source, []).append(total)
    for dropped in scores.dropped:
        rewards.setdefault(dropped.source, []).append(dropped.reward)
    metrics: dict[str, float] = {}
    for name in sorted(rewards.keys() - {""}):
        known = rewards[name]
        metrics[f"sources/{name}/reward"] = fmean(known)
        metrics[f"sources/{name}/success_rate"] = fmean(reward >= success_threshold for reward in known)
        metrics[f"sources/{name}/completions"] = float(len(known))
    return metrics


def joined(parts: Mapping[str, Sequence[Prompt]]) -> list[Prompt]:
    """Return the prompts of several datasets, one after another; their keys are their positions."""
    prompts = [(name, prompt) for name, part in parts.items() for prompt in part]
    return [replace(prompt, key=key, source=name) for key, (name, prompt) in enumerate(prompts)]
