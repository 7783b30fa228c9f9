"""Turn the user's reward names and functions into one weighted sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import RewardScoringConfig
from reinforcepp.config.judge_spec import parse_judge
from reinforcepp.config.reward_rules import Rule, make_rule
from reinforcepp.config.reward_spec import RewardSource, parse_model, parse_source
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import weights_hash
from reinforcepp.rewards.card import REWARD_MODEL, RewardCard
from reinforcepp.rewards.functions import (
    EnvironmentReward,
    GoldReward,
    RewardFunction,
    RewardScores,
    function_name,
    is_collective,
    length_scale,
    new_state,
    score_with,
    unique_names,
)
from reinforcepp.rewards.loaded import is_model, loaded_reward, use_tokenizer
from reinforcepp.rewards.reasoning_gym import ReasoningGymReward
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder, load_reward_model
from reinforcepp.rewards.user_code import load_object, source_digest
from reinforcepp.runtime.process import is_main
from reinforcepp.runtime.redaction import redacted
from reinforcepp.runtime.terminal import logger
from reinforcepp.types import Completion

if TYPE_CHECKING:
    from transformers import TrainerState

Reward = str | RewardFunction
WATCHED_BATCHES, WATCHED_COMPLETIONS = 2, 8
"""First batches of a run, and the fewest completions in them, in which a function's scores must not be all the same."""

log = logger(__name__)


@dataclass
class RewardSum:
    """Reward functions, their weights, and strings that identify them in a run's fingerprint."""

    functions: list[RewardFunction]
    weights: list[float]
    identities: list[str]
    truncation_penalty: float = 0.0
    length_power: float = 0.0
    first_scores: list[dict[str, list[float | None]]] = field(default_factory=list, compare=False)
    """Scores of the first batches, until they were checked for functions that give only one value."""
    trainer_state: TrainerState = field(default_factory=new_state, compare=False)
    """Passed to the functions; a trainer sets its own."""

    def score(self, completions: Sequence[Completion]) -> RewardScores:
        """Return every function's scores and their weighted sum; errors are those of :func:`score_with`.

        A rank without completions calls collective functions only.
        """
        if not completions:
            for function in filter(is_collective, self.functions):
                function([], [])
            return RewardScores([], {name: [] for name in self._logged_names})
        shaping = self.truncation_penalty, self.trainer_state, self.length_power
        scores = score_with(self.functions, completions, self.weights, *shaping)
        if len(self.first_scores) < WATCHED_BATCHES:
            self.first_scores.append(scores.by_function)
            if len(self.first_scores) == WATCHED_BATCHES:
                self._warn_about_constants()
        return scores

    def _warn_about_constants(self) -> None:
        for name, function in zip(self.names, self.functions, strict=True):
            values = [score for batch in self.first_scores for score in batch[name] if score is not None]
            constant = len(values) >= WATCHED_COMPLETIONS and len(set(values)) == 1
            expected = isinstance(function, TrainedReward) or getattr(function, "constant_at_first", False)
            if constant and is_main() and not expected:
                log.warning(
                    "Reward %s: gave %g to each of the first %d completions, so training can't learn from it. Check its "
                    "options and the data's columns.",
                    name,
                    values[0],
                    len(values),
                )

    @property
    def names(self) -> list[str]:
        """Names under which the functions are logged."""
        return unique_names(self.functions)

    @property
    def _logged_names(self) -> list[str]:
        """Names of the functions, and of the outputs of a model that has several."""
        names = []
        for name, function in zip(self.names, self.functions, strict=True):
            names += [name, *(f"{name}/{label}" for label in getattr(function, "labels", ()))]
        return names

    def turn_weight(self, episode: Completion) -> float:
        """Return the weight of an environment's rewards in the reward of ``episode``, 0 if they don't count."""
        weighted = zip(self.functions, self.weights, strict=True)
        weight = math.fsum(weight for function, weight in weighted if isinstance(function, EnvironmentReward))
        return weight / length_scale(episode, self.length_power)

    @property
    def trained(self) -> list[TrainedReward]:
        """The trained reward models among the functions."""
        return [function for function in self.functions if isinstance(function, TrainedReward)]

    def fingerprint(self) -> str:
        """Return a string that changes with the functions and weights, so that a resumed run notices."""
        parts = []
        for function, weight, name in zip(self.functions, self.weights, self.identities, strict=True):
            identity = _model_identity(function) if isinstance(function, TrainedReward) else name
            parts.append(identity if weight == 1 else f"{weight:g}*{identity}")
        return " ".join(parts)

    def describe(self) -> list[dict[str, Any]]:
        """Return names, weight and, for a model from a folder, its card and outputs, for the run's record."""
        found = []
        for name, weight, function in zip(self.names, self.weights, self.functions, strict=True):
            card, labels = getattr(function, "card", None), getattr(function, "labels", ())
            described = {
                "name": name,
                "public_name": _public_name(function),
                "weight": weight,
                "card": asdict(card) if isinstance(card, RewardCard) else None,
            }
            if labels:
                described["outputs"] = dict(zip(labels, function.output_weights, strict=True))  # type: ignore[attr-defined]
            found.append(described)
        return found


def load_rewards(
    rewards: Reward | Sequence[Reward],
    settings: RewardScoringConfig | None = None,
    weights: Sequence[float] | None = None,
    processing_classes: Any = None,
    *,
    texts_are_messages: bool = True,
) -> RewardSum:
    """Return the weighted sum of ``rewards``. All names are checked before a model is loaded.

    Args:
        rewards: one or several functions, loaded models, or names as in :mod:`reinforcepp.config.reward_spec`.
        settings: of reward servers, weights, normalization, length and the truncation penalty.
        weights: instead of those in ``settings``: one per reward, multiplied by the weight in its name.
        processing_classes: a tokenizer, or a list with one or None per reward, which functions ignore; default: the models' own.
        texts_are_messages: whether the policy reads a prompt that is a text as a user message.

    Raises:
        ReinforceError: a reward doesn't exist or can't be used, or the weights don't match.
    """
    settings = settings or RewardScoringConfig()
    listed: list[Any] = list(rewards) if isinstance(rewards, (list, tuple)) else [rewards]
    if not listed:
        raise ConfigError("reward_funcs: empty. Give at least one function or reward model.")
    if weights is not None and settings.reward_weights:
        raise ConfigError("reward_weights: given in the settings and as an argument. Remove one.")
    factors = _factors(weights if weights is not None else settings.reward_weights or None, len(listed))
    sources = [parse_source(reward) if isinstance(reward, str) else None for reward in listed]
    models = [source.target for source in sources if source is not None and source.kind == "model"]
    for folder in models:
        check_reward_folder(folder)
    tokenizers = _tokenizers(processing_classes, len(listed))
    without_models = [
        reward if source is None else _function_of(source, settings)
        for reward, source in zip(listed, sources, strict=True)
    ]
    functions: list[RewardFunction] = []
    for function, source, tokenizer in zip(without_models, sources, tokenizers, strict=True):
        if is_model(function):
            function = loaded_reward(function, tokenizer, texts_are_messages=texts_are_messages)
        if source is not None and source.kind == "model":
            function = load_reward_model(source.target)
            model = parse_model(source.target)
            function.name = Path(model.name).name + (source.target.removeprefix(model.name) if len(models) > 1 else "")
            if tokenizer is not None:
                use_tokenizer(function, model.name, tokenizer)
        functions.append(function)
    if settings.reward_normalize:
        _normalize(functions)
    for name, function, source in zip(unique_names(functions), functions, sources, strict=True):
        if (
            source is not None and source.kind == "judge"
        ):  # Two judges can have the same rubric, but not the same metrics.
            function.name = name  # type: ignore[attr-defined]
    return RewardSum(
        functions,
        [
            factor * (source.weight if source is not None else 1.0)
            for factor, source in zip(factors, sources, strict=True)
        ],
        [_identity(source, function) for source, function in zip(sources, functions, strict=True)],
        settings.truncation_penalty,
        settings.reward_length_power,
    )


def _model_identity(reward: TrainedReward) -> str:
    identity, weights = weights_hash(reward.model), reward.output_weights
    return identity if weights == (1.0,) else f"{identity}[{','.join(map('{:g}'.format, weights))}]"


def _tokenizers(processing_classes: Any, count: int) -> list[Any]:
    if processing_classes is None:
        return [None] * count
    tokenizers = list(processing_classes) if isinstance(processing_classes, (list, tuple)) else [processing_classes]
    if len(tokenizers) != count:
        raise ConfigError(
            f"reward_processing_classes: {len(tokenizers)} for {count} rewards. Give a list with a tokenizer or None per reward."
        )
    return tokenizers


def _factors(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if len(weights) != count:
        raise ConfigError(f"reward_weights: {len(weights)} weights for {count} rewards. Give one per reward.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"reward_weights: {list(weights)} aren't all finite. Give finite numbers.")
    return [float(weight) for weight in weights]


def _function_of(source: RewardSource, settings: RewardScoringConfig) -> Any:
    """Return the function of a source that loads no model; None for a model."""
    match source.kind:
        case "builtin":
            return GoldReward()
        case "environment":
            return EnvironmentReward()
        case "reasoning_gym":
            return ReasoningGymReward()
        case "judge":
            from reinforcepp.rewards.judge.judge import Judge  # loads HTTP libraries

            return Judge(parse_judge(source.target), timeout=settings.reward_timeout, attempts=settings.reward_attempts)
        case "rule":
            return make_rule(source.target)
        case "function":
            return load_object(source.target)
        case "server":
            from reinforcepp.rewards.remote import RemoteReward  # loads HTTP libraries

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
        raise ConfigError("reward_normalize: needs a trained reward model, but none of the rewards is one. Omit it.")
    for reward in trained:
        reward.normalize()


def _public_name(function: RewardFunction) -> str:
    """Return the name for a public model card, without an address or a folder."""
    if isinstance(function, TrainedReward):
        return REWARD_MODEL
    if hasattr(function, "url"):
        return "a reward server"
    if hasattr(function, "rubric"):
        return "a language model as judge"
    name = function_name(function)
    own = isinstance(function, GoldReward | EnvironmentReward | ReasoningGymReward | Rule)
    known = own or hasattr(getattr(function, "func", function), "__name__")
    return name if known and name.isidentifier() else "a reward function"


def _identity(source: RewardSource | None, function: RewardFunction) -> str:
    if source is None or source.kind in ("builtin", "environment", "reasoning_gym", "model"):
        return function_name(function)
    if source.kind == "judge":
        return str(function.identity)  # type: ignore[attr-defined]
    return source_digest(source.target) if source.kind == "function" else redacted(source.target)
