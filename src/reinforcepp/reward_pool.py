"""Trained reward models in processes of a Ray pool, so that they take none of the trainer's memory and time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from reinforcepp.errors import ConfigError
from reinforcepp.models import empty_model
from reinforcepp.processes import started
from reinforcepp.reward_models import score_at_last_attended
from reinforcepp.rewards.functions import RewardFunction
from reinforcepp.rewards.load import RewardSum
from reinforcepp.rewards.trained import TrainedReward
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.ray_pool import RayCrew, RayEngine
from reinforcepp.rollout.ray_worker import Packed, fill, pack
from reinforcepp.rollout.share_out import Tally, share_out


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
        model = empty_model(recipe.config, recipe.dtype, "AutoModelForSequenceClassification").eval()
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
        ray: the library, connected.
        workers: of the pool.
    """

    def __init__(self, reward: TrainedReward, ray: Any, workers: int) -> None:
        super().__init__(reward.model, reward.tokenizer, reward.batch_size)
        self.name, self.card, self._scale = reward.name, reward.card, reward._scale
        self.tallies: list[Tally] = []
        model = reward.model
        recipe = ScorerRecipe(model.config, model.dtype, reward.tokenizer, reward.batch_size)
        self.crew = RayCrew(ray, Scorer, recipe, workers)
        self.crew.load(pack(model))
        model.to("meta")

    def score_rows(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """See :meth:`TrainedReward.score_rows`; each text is scored once, whoever dies."""
        if not rows:
            return []
        self.crew.ask(rows, None)
        scores: list[float]
        scores, tally = share_out(self.crew, len(rows), self.batch_size)
        self.tallies.append(tally)
        return scores


def for_a_pool(rewards: RewardSum, workers: int) -> Sequence[TrainedReward]:
    """Those of ``rewards`` that :func:`pooled` will put into a pool, if there are ``workers`` for it.

    Raises:
        ConfigError: there is none, or several processes train together.
    """
    if workers and started() > 1:
        raise ConfigError(
            f"reward_workers score for a training of one process, and the launcher has started {started()}: leave reward_workers "
            "out, and each process scores its own completions."
        )
    if workers and not rewards.trained:
        raise ConfigError("reward_workers score with trained reward models, and there is none among the rewards.")
    return rewards.trained if workers else []


def pooled(rewards: RewardSum, engine: RolloutEngine, workers: int) -> RewardSum:
    """``rewards`` with the trained models in a pool of ``workers`` each, beside that of ``engine``.

    Raises:
        ConfigError: there is no pool.
        RolloutError: no worker can be started.
    """
    if not isinstance(engine, RayEngine):
        raise ConfigError("reward_workers need an engine by Ray: leave engine out, or reward_workers.")
    functions: list[RewardFunction] = [
        PooledReward(function, engine.ray, workers) if isinstance(function, TrainedReward) else function
        for function in rewards.functions
    ]
    return replace(rewards, functions=functions)
