"""From what the user names as rewards to one weighted sum of functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from reinforcepp.config import RewardSettings
from reinforcepp.config.reward_rules import make_rule
from reinforcepp.config.reward_spec import RewardSource, parse_source
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import weights_hash
from reinforcepp.rewards.card import RewardCard
from reinforcepp.rewards.functions import (
    GoldReward,
    RewardFunction,
    RewardScores,
    function_name,
    is_collective,
    score_with,
    unique_names,
)
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.rewards.user import load_function, source_digest
from reinforcepp.types import Completion

Reward = str | RewardFunction


@dataclass(frozen=True)
class RewardSum:
    """Reward functions, what each counts for, and what tells one from another of the same name."""

    functions: list[RewardFunction]
    weights: list[float]
    identities: list[str]
    truncation_penalty: float = 0.0

    def score(self, completions: Sequence[Completion]) -> RewardScores:
        """What each says of each completion, and their sum; errors are those of :func:`score_with`.

        Where there is none, as may happen to one of several processes, no function is called but those that all call together.
        """
        if not completions:
            for function in filter(is_collective, self.functions):
                function([], [])
            return RewardScores([], {name: [] for name in self.names})
        return score_with(self.functions, completions, self.weights, self.truncation_penalty)

    @property
    def names(self) -> list[str]:
        """Under what each is logged."""
        return unique_names(self.functions)

    @property
    def trained(self) -> list[TrainedReward]:
        """The trained models among them."""
        return [function for function in self.functions if isinstance(function, TrainedReward)]

    def fingerprint(self) -> str:
        """What they are, for a run that is resumed to notice a change."""
        parts = []
        for function, weight, own in zip(self.functions, self.weights, self.identities, strict=True):
            what = weights_hash(function.model) if isinstance(function, TrainedReward) else own
            parts.append(what if weight == 1 else f"{weight:g}*{what}")
        return " ".join(parts)

    def describe(self) -> list[dict[str, Any]]:
        """For the run's record: name, weight and, for a model loaded from a folder, what it was made from."""
        return [
            {"name": name, "weight": weight, "card": asdict(card) if isinstance(card, RewardCard) else None}
            for name, weight, card in zip(
                self.names, self.weights, [getattr(f, "card", None) for f in self.functions], strict=True
            )
        ]


def load_rewards(
    rewards: Reward | Sequence[Reward], settings: RewardSettings | None = None, weights: Sequence[float] | None = None
) -> RewardSum:
    """Functions as they are, and whatever :mod:`reinforcepp.config.reward_spec` can name; models are loaded last.

    Args:
        rewards: one or several of them.
        settings: how they are asked and what is taken off; the defaults ask and take off nothing.
        weights: one for each, on top of those written into their names.

    Raises:
        ReinforceError: for one that doesn't exist or can't be used, or weights that don't fit.
    """
    settings = settings or RewardSettings()
    listed: list[Any] = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not listed:
        raise ConfigError("reward_funcs is empty: give at least one function or reward model.")
    factors = _factors(weights, len(listed))
    sources = [parse_source(reward) if isinstance(reward, str) else None for reward in listed]
    models = [source.target for source in sources if source is not None and source.kind == "model"]
    for folder in models:
        check_reward_folder(folder)
    light = [
        reward if source is None else _light(source, settings) for reward, source in zip(listed, sources, strict=True)
    ]
    functions: list[RewardFunction] = []
    for function, source in zip(light, sources, strict=True):
        if source is not None and source.kind == "model":
            function = load_reward_model(source.target)
            function.name = Path(source.target).name if len(models) > 1 else function.name
        functions.append(function)
    if settings.reward_normalize:
        _normalize(functions)
    return RewardSum(
        functions,
        [own * (source.weight if source is not None else 1.0) for own, source in zip(factors, sources, strict=True)],
        [_identity(source, function) for source, function in zip(sources, functions, strict=True)],
        settings.truncation_penalty,
    )


def _factors(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"There are {len(weights)} reward_weights for {count} rewards: give one for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"reward_weights must be finite numbers, not {list(weights)}.")
    return [float(weight) for weight in weights]


def _light(source: RewardSource, settings: RewardSettings) -> Any:
    """The function of a source that needs no weights; None for a model."""
    match source.kind:
        case "judge":
            return GoldReward()
        case "rule":
            return make_rule(source.target)
        case "function":
            return load_function(source.target)
        case "server":
            from reinforcepp.rewards.remote import RemoteReward  # its libraries are for servers alone

            return RemoteReward(
                source.target,
                timeout=settings.reward_timeout,
                attempts=settings.reward_attempts,
                batch_size=settings.reward_batch_size,
                label_column=settings.reward_label_column,
            )
    return None


def _normalize(functions: Sequence[RewardFunction]) -> None:
    trained = [function for function in functions if isinstance(function, TrainedReward)]
    if not trained:
        raise ConfigError("reward_normalize works on trained reward models, and there is none among the rewards.")
    for reward in trained:
        reward.normalize()


def _identity(source: RewardSource | None, function: RewardFunction) -> str:
    if source is None or source.kind in ("judge", "model"):
        return function_name(function)
    return source_digest(source.target) if source.kind == "function" else source.target
