"""Trained reward models in a Ray pool, so that they take none of the trainer's memory and time.

With several data-parallel ranks, rank 0 owns the pool and scores for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.errors import ConfigError, setting
from reinforcepp.models.loading import meta_model
from reinforcepp.models.lora import is_4bit
from reinforcepp.models.micro_batches import MicroBatchLimit
from reinforcepp.models.reward_models import ScoreReading, prepare_scoring, register_classifier
from reinforcepp.rewards.functions import RewardFunction
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.rollout.dispatch import DispatchStats, dispatch
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.ray.actor_pool import RayPool
from reinforcepp.rollout.ray.engine import RayEngine
from reinforcepp.rollout.ray.worker import PackedWeights, unpack
from reinforcepp.rollout.shared_engine import SharedEngine

CHUNK_SIZE = 64
"""Texts that a worker scores at a time."""


@dataclass(frozen=True)
class ScorerSpec:
    """Everything from which a scorer starts, except the weights."""

    config: Any
    dtype: torch.dtype
    tokenizer: Any
    limit: MicroBatchLimit | None
    reading: ScoreReading
    output_weights: tuple[float, ...]


class Scorer:
    """A process of the pool with a reward model."""

    kind = "scoring"

    def __init__(self, spec: ScorerSpec) -> None:
        register_classifier(spec.config)
        model = meta_model(spec.config, spec.dtype, "AutoModelForSequenceClassification").eval()
        self.reward = TrainedReward(prepare_scoring(model, spec.reading), spec.tokenizer)
        self.reward.output_weights, self.reward.limit = spec.output_weights, spec.limit

    def load(self, packed: PackedWeights) -> None:
        """Score with these weights."""
        unpack(self.reward.model, packed)

    def process(self, items: Sequence[Sequence[int]], _: Any) -> list[float]:
        """Return the scores of tokenized texts."""
        return self.reward.score_rows(items)


class PooledReward(TrainedReward):
    """A trained reward model whose texts are scored by a pool; this process only formats and tokenizes them.

    Args:
        reward: The reward model. Its weights move to the pool and are released here.
        ray: Returns the connected library; called on rank 0.
        workers: Number of workers in the pool.
        rank_zero: Runs work on rank 0 for all ranks.

    Raises:
        ReinforceError: On all ranks, the error of ``ray``, or no worker can be started.
    """

    collective = True

    def __init__(self, reward: TrainedReward, ray: Callable[[], Any], workers: int, rank_zero: RankZero) -> None:
        super().__init__(reward.model, reward.tokenizer)
        self.name, self.card, self._scale = reward.name, reward.card, reward._scale
        self.form, self.reading, self.output_weights = reward.form, reward.reading, reward.output_weights
        self.dispatches: list[DispatchStats] = []
        """Statistics of every scored batch."""
        self.pool: Any = None
        """The pool on rank 0; None on other ranks."""
        self._rank_zero, model = rank_zero, reward.model

        def start() -> None:
            spec = ScorerSpec(
                model.config, model.dtype, reward.tokenizer, reward.limit, reward.reading, reward.output_weights
            )
            self.pool = RayPool(ray(), Scorer, spec, workers)
            self.pool.load(model)

        rank_zero.run(start)
        model.to("meta")

    def score_rows(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return the scores of ``rows``; each is scored once, even if workers are lost."""
        return self._rank_zero.map(rows, self._score_for_all)

    def _score_for_all(self, rows_per_rank: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        rows = [row for rank_rows in rows_per_rank for row in rank_rows]
        if not rows:
            return [[] for _ in rows_per_rank]
        self.pool.begin(None)
        scores, stats = dispatch(self.pool, rows, CHUNK_SIZE)
        self.dispatches.append(stats)
        remaining = iter(scores)
        return [list(islice(remaining, len(rank_rows))) for rank_rows in rows_per_rank]


def rewards_to_pool(rewards: RewardSum, workers: int) -> Sequence[TrainedReward]:
    """Return the rewards that :func:`pool_rewards` moves to a pool of ``workers``.

    Raises:
        ConfigError: None of ``rewards`` is a trained reward model.
    """
    if workers and not rewards.trained:
        raise ConfigError(
            f"{setting('reward_workers')} {workers}: none of the rewards is a trained reward model. Add "
            f"{setting('reward_model')}, or omit {setting('reward_workers')}."
        )
    if workers and any(is_4bit(reward.model) for reward in rewards.trained):
        raise ConfigError(
            f"{setting('reward_workers')} {workers}: workers can't hold 4-bit weights. Omit {setting('reward_workers')}, or "
            "load_in_4bit."
        )
    if workers and any(reward.given for reward in rewards.trained):
        raise ConfigError(
            f"{setting('reward_workers')} {workers}: a loaded reward model stays in its process. Give its folder instead, or "
            f"omit {setting('reward_workers')}."
        )
    return rewards.trained if workers else []


def pool_rewards(rewards: RewardSum, engine: RolloutEngine, workers: int, rank_zero: RankZero) -> RewardSum:
    """Return ``rewards`` with each trained model in a pool of ``workers`` on the cluster of ``engine``; all ranks call this.

    Raises:
        ConfigError: The engine has no Ray cluster.
        RolloutError: No worker can be started.
    """

    def ray() -> Any:
        local = engine.local if isinstance(engine, SharedEngine) else engine
        if not isinstance(local, RayEngine):
            raise ConfigError(
                f"{setting('reward_workers')} {workers}: the given engine doesn't run on Ray. Omit engine, or omit "
                "reward_workers."
            )
        return local.ray

    functions: list[RewardFunction] = [
        PooledReward(function, ray, workers, rank_zero) if isinstance(function, TrainedReward) else function
        for function in rewards.functions
    ]
    return replace(rewards, functions=functions)
