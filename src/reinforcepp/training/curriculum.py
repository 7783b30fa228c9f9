"""A curriculum by success rate: prompts that the policy solves about half of the time are drawn more often.

Prompt i has the weight p_i · (1 - p_i), the variance of its success and its learnability. [arXiv 2502.12272] p_i is the mean of a
Beta distribution with a uniform prior and discounted counts, because the policy changes. [arXiv 2507.04632]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reinforcepp.rewards.functions import RewardScores
from reinforcepp.training.prompt_batches import PromptBatches
from reinforcepp.types import Completion, Prompt

DISCOUNT = 0.5
"""Weight of a prompt's earlier successes and failures when it is used again."""
Weights = NDArray[np.float64]


class CurriculumBatches(PromptBatches):
    """Draws the prompts of each step, without replacement, by their success rates so far.

    The prompts of a step are chosen when they are first asked for, that is, when its generation starts. ``state`` has the
    choices that are still needed, so that a resumed run generates for the same prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, seed: int, **options: Any) -> None:
        super().__init__(prompts, batch_size, seed, **options)
        self._counts = np.zeros((len(prompts), 2))
        """Discounted successes and failures of each prompt."""
        self._chosen: dict[int, list[int]] = {}
        self._row_of = {prompt.key: row for row, prompt in enumerate(prompts)} if isinstance(prompts, list) else None

    def observe(self, step: int, completions: Sequence[Completion], scores: RewardScores) -> dict[str, float]:
        """Count the successes of a step; return the metrics of the curriculum."""
        metrics = super().observe(step, completions, scores)
        self._chosen = {later: rows for later, rows in self._chosen.items() if later > step}
        keys = [completion.prompt.key for completion in completions] + [dropped.key for dropped in scores.dropped]
        rewards = [*scores.total, *(dropped.reward for dropped in scores.dropped)]
        new: dict[int, list[int]] = {}
        for key, reward in zip(keys, rewards, strict=True):
            if reward is not None:
                row = key if self._row_of is None else self._row_of[key]
                new.setdefault(row, [0, 0])[int(reward < self.success_threshold)] += 1
        for row, counts in new.items():
            self._counts[row] = DISCOUNT * self._counts[row] + counts
        successes, seen = self._counts[:, 0], self._counts.sum(1) > 0
        total = sum(map(sum, new.values()))
        return metrics | {
            "curriculum/success_rate": sum(solved for solved, _ in new.values()) / max(1, total),
            "curriculum/seen_prompts": float(seen.sum()),
            "curriculum/never_solved": float((seen & (successes == 0)).sum()),
            "curriculum/always_solved": float((seen & (self._counts[:, 1] == 0)).sum()),
        }

    def state(self) -> dict[str, Any]:
        """Return the counts of the prompts used so far and the choices that are still needed, as JSON."""
        seen = np.flatnonzero(self._counts.sum(1))
        return {"rows": seen.tolist(), "counts": self._counts[seen].tolist(), "chosen": self._chosen}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""
        self._counts[:] = 0
        if state["rows"]:
            self._counts[state["rows"]] = state["counts"]
        self._chosen = {int(step): rows for step, rows in state["chosen"].items()}

    def weights(self) -> Weights:
        """Return p · (1 - p) of each prompt, where p = (1 + successes) / (2 + successes + failures)."""
        rates = (1 + self._counts[:, 0]) / (2 + self._counts.sum(1))
        return rates * (1 - rates)

    def _rows(self, step: int) -> Sequence[int]:
        return self._choice(step)[: self.batch_size]

    def _refill_rows(self, step: int) -> list[int]:
        return self._choice(step)[self.batch_size :]

    def _choice(self, step: int) -> list[int]:
        if step not in self._chosen:
            count = min(self.batch_size * (self.refills + 1), len(self.prompts))
            self._chosen[step] = drawn(self.weights(), count, np.random.default_rng([self.seed, step]))
        return self._chosen[step]


def drawn(weights: Weights, count: int, generator: np.random.Generator) -> list[int]:
    """Return ``count`` indices that are drawn one after another, without replacement, in proportion to positive ``weights``.

    Only additions and comparisons of the weights decide, so that the ranks of a training draw the same.
    """
    left, rows = weights.copy(), list[int]()
    while len(rows) < count:
        sums = left.cumsum()
        found = sums.searchsorted(generator.random(count - len(rows)) * sums[-1], side="right")
        for row in found.clip(max=len(left) - 1).tolist():
            if left[row]:
                rows.append(row)
                left[row] = 0.0
    return rows
