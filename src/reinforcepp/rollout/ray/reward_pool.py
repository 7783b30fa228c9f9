"""Trained reward models in processes of a Ray pool, so that they take none of the trainer's memory and time.

Of several processes that train, the first one has the pool and asks it for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from reinforcepp.distributed.rank_zero import RankZero
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import meta_model
from reinforcepp.models.reward_models import score_at_last_attended
from reinforcepp.rewards.functions import RewardFunction
from reinforcepp.rewards.sources import RewardSum
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.rollout.dispatch import Tally, share_out
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.ray.actor_pool import RayCrew
from reinforcepp.rollout.ray.engine import RayEngine
from reinforcepp.rollout.ray.worker import Packed, fill, pack
from reinforcepp.rollout.shared_engine import SharedEngine


@dataclass(frozen=True)
class ScorerRecipe:
    """What a scorer starts from; weights come apart."""

    config: Any
    dtype: torch.dtype
    tokenizer: Any
    batch_size: int


class Scorer:
    """What runs in each of Ray's processes: a reward model."""

    kind = "scoring"

    def __init__(self, recipe: ScorerRecipe) -> None:
        model = meta_model(recipe.config, recipe.dtype, "AutoModelForSequenceClassification").eval()
        self.reward = TrainedReward(score_at_last_attended(model), recipe.tokenizer, recipe.batch_size)

    def load(self, packed: Packed) -> None:
        """Score with these weights."""
        fill(self.reward.model, packed)

    def answer(self, rows: Sequence[Sequence[int]], _: Any) -> list[float]:
        """The scores of framed, tokenised texts."""
        return self.reward.score_rows(rows)


class PooledReward(TrainedReward):
    """A trained reward model whose texts are scored by a pool; here it only frames and tokenises them.

    Args:
        reward: what it stands for. Its weights are handed out, and given up here.
        ray: gives the library, connected; called by the first process.
        workers: of the pool.
        first: the process that has the pool.

    Raises:
        ReinforceError: in all processes, what ``ray`` raised, or that no worker can be started.
    """

    collective = True

    def __init__(self, reward: TrainedReward, ray: Callable[[], Any], workers: int, first: RankZero) -> None:
        super().__init__(reward.model, reward.tokenizer, reward.batch_size)
        self.name, self.card, self._scale = reward.name, reward.card, reward._scale
        self.tallies: list[Tally] = []
        self.crew: Any = None
        """There where the pool is."""
        self._first, model = first, reward.model

        def start() -> None:
            recipe = ScorerRecipe(model.config, model.dtype, reward.tokenizer, reward.batch_size)
            self.crew = RayCrew(ray(), Scorer, recipe, workers)
            self.crew.load(pack(model))

        first.run(start)
        model.to("meta")

    def score_rows(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """See :meth:`TrainedReward.score_rows`; each text is scored once, whoever dies."""
        return self._first.map(rows, self._score_for_all)

    def _score_for_all(self, asked: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        rows = [row for own in asked for row in own]
        if not rows:
            return [[] for _ in asked]
        self.crew.ask(rows, None)
        scores, tally = share_out(self.crew, len(rows), self.batch_size)
        self.tallies.append(tally)
        told = iter(scores)
        return [list(islice(told, len(own))) for own in asked]


def for_a_pool(rewards: RewardSum, workers: int) -> Sequence[TrainedReward]:
    """Those of ``rewards`` that :func:`pooled` will put into a pool, if there are ``workers`` for it.

    Raises:
        ConfigError: there is none.
    """
    if workers and not rewards.trained:
        raise ConfigError("reward_workers score with trained reward models, and there is none among the rewards.")
    return rewards.trained if workers else []


def pooled(rewards: RewardSum, engine: RolloutEngine, workers: int, first: RankZero) -> RewardSum:
    """``rewards`` with the trained models in a pool of ``workers`` each, beside that of ``engine``; all processes call this.

    Raises:
        ConfigError: there is no pool.
        RolloutError: no worker can be started.
    """

    def ray() -> Any:
        own = engine.own if isinstance(engine, SharedEngine) else engine
        if not isinstance(own, RayEngine):
            raise ConfigError("reward_workers need an engine by Ray: leave engine out, or reward_workers.")
        return own.ray

    functions: list[RewardFunction] = [
        PooledReward(function, ray, workers, first) if isinstance(function, TrainedReward) else function
        for function in rewards.functions
    ]
    return replace(rewards, functions=functions)
