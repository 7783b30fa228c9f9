"""The groups of completions of a step: one batch, or with dynamic sampling the groups with signal of several batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from reinforcepp.rewards.functions import BATCHES_KEY, Dropped, RewardScores, join_scores
from reinforcepp.runtime.terminal import warn_once
from reinforcepp.training.policy_update import with_rewards

if TYPE_CHECKING:
    from reinforcepp.config import ReinforceConfig
    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.rewards.sources import RewardSum
    from reinforcepp.training.policy_update import PolicyUpdate
    from reinforcepp.training.rollout_scheduler import RolloutScheduler
    from reinforcepp.training.run_guard import Step
    from reinforcepp.types import Completion

Scored = tuple[list["Completion"], RewardScores]
"""Completions and their scores."""
FEW = (
    "dynamic_sampling: a step trains on fewer prompts, because too few have completions with different rewards (metrics "
    "dynamic_sampling/*). Remove prompts that are always or never solved, or raise max_num_gen_batches."
)


def sample(step: Step, rollouts: RolloutScheduler, rewards: RewardSum, update: PolicyUpdate) -> Scored:
    """Return this rank's completions of a step, and their scores; dynamic sampling generates and scores several batches."""
    groups = StepGroups(update.config, update.ranks, rollouts.batches.size(step.index))
    while groups.ahead:
        with step.phase("rollout", repeatable=True):
            completions = rollouts.next(step.index, groups.generated, groups.ahead)
        with step.phase("score", repeatable=True):
            groups.add(*with_rewards(completions, rewards, update))
    return groups.result()


class StepGroups:
    """Collects the scored completions of a step.

    With dynamic sampling, groups (the completions of a prompt) whose rewards are all equal are dropped, and further batches
    replace them. [DAPO, arXiv 2503.14476 section 3.2] All ranks agree on the next batch, and at the end they share the groups
    evenly, in the order of one rank.

    Args:
        config: the run's settings.
        ranks: of the training.
        wanted: number of prompts of the step, on all ranks.
    """

    def __init__(self, config: ReinforceConfig, ranks: Ranks, wanted: int) -> None:
        self._config, self._ranks, self._wanted = config, ranks, wanted
        self._first: Scored | None = None
        self._batches: list[list[Scored]] = []
        self.generated = 0
        """Prompts of the batches so far."""
        self.ahead = wanted
        """Prompts of the next batch, 0 if the step is complete; a refill has as many as are expected to fill the step."""

    def add(self, completions: list[Completion], scores: RewardScores) -> None:
        """Add this rank's part of a batch; every rank must call this."""
        self._first = self._first or (completions, scores)
        if not self._config.dynamic_sampling:
            self.ahead = 0
            return
        self.generated += self.ahead
        self._batches.append(self._ranks.gather(with_signal(completions, scores, self._config)))
        found = sum(len(groups_of(kept)) for batch in self._batches for kept, _ in batch)
        exhausted = not any(kept or scores.dropped for kept, scores in self._batches[-1])
        stop = exhausted or len(self._batches) == self._config.max_num_gen_batches
        if stop and found < self._wanted and self._ranks.is_main:
            warn_once(FEW)
        missing = self._wanted - found
        share = max(found, 1) / self.generated
        self.ahead = 0 if stop or missing <= 0 else min(math.ceil(missing / share), self._wanted)

    def result(self) -> Scored:
        """Return this rank's completions of the step and their scores.

        If no group has signal, these are those of the first batch, because a step needs completions.
        """
        assert self._first is not None
        if not self._config.dynamic_sampling:
            return self._first
        first = join_scores([scores for _, scores in self._batches[0]])
        joined = join_scores([scores for batch in self._batches for _, scores in batch])
        completions = [completion for batch in self._batches for kept, _ in batch for completion in kept]
        main = self._ranks.is_main  # the other ranks add nothing to sums over ranks
        counts, dropped = joined.counts | {BATCHES_KEY: float(len(self._batches))}, joined.dropped
        if not completions:
            (completions, scores), dropped = self._first, dropped[len(first.dropped) :]
        else:
            groups = groups_of(completions)
            surplus = [row for group in groups[self._wanted :] for row in group]
            dropped = dropped + [_dropped(completions, joined, row) for row in surplus]
            kept = [row for group in self._ranks.local_slice(groups[: self._wanted]) for row in group]
            completions = [completions[row] for row in kept]
            scores = replace(joined.rows(kept), skipped=joined.skipped if main else 0)
        return completions, replace(scores, counts=counts if main else {}, dropped=dropped if main else [])


def with_signal(completions: Sequence[Completion], scores: RewardScores, config: ReinforceConfig) -> Scored:
    """Return the completions of groups whose rewards differ, after clipping, and their scores."""
    low, high = config.reward_bounds or (-math.inf, math.inf)

    def reward(row: int) -> object:
        if config.normalizes_each_reward:
            return tuple(values[row] for values in scores.by_function.values())
        total = scores.total[row]
        return None if total is None else min(max(total, low), high)

    kept, dropped = list[int](), list[int]()
    for group in groups_of(completions):
        (kept if len({reward(row) for row in group}) > 1 else dropped).extend(group)
    left = [_dropped(completions, scores, row) for row in dropped]
    return [completions[row] for row in kept], replace(scores.rows(kept), skipped=scores.skipped, dropped=left)


def _dropped(completions: Sequence[Completion], scores: RewardScores, row: int) -> Dropped:
    prompt, tokens = completions[row].prompt, len(completions[row].sampled_ids)
    return Dropped(prompt.key, scores.total[row] or 0.0, tokens, prompt.source)


def groups_of(completions: Sequence[Completion]) -> list[list[int]]:
    """Return the row numbers of each prompt's completions, in the order in which the prompts appear."""
    groups: dict[int, list[int]] = {}
    for row, completion in enumerate(completions):
        groups.setdefault(completion.prompt.key, []).append(row)
    return list(groups.values())
