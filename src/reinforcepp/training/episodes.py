"""Start what runs the episodes of a training, from its settings."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.config.reward_spec import ENVIRONMENT, parse_source
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.environments.protocol import EnvironmentFactory, environment_factory
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.completion_log import log_failed_episodes
from reinforcepp.rewards.functions import EnvironmentReward
from reinforcepp.rewards.user_code import source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOM_FOR_RESET = 1024
"""Tokens by which the prompts of an environment can be longer than those of the data, unless max_prompt_length is set."""


def with_environment(
    config: ReinforceConfig, environment: EnvironmentFactory | None
) -> tuple[ReinforceConfig, EnvironmentFactory | None]:
    """Return what makes an environment, if there is one, and ``config`` with its name.

    Raises:
        ConfigError: it doesn't exist, can't be used, or is given twice.
    """
    if environment is None:
        if config.environment is None:
            return config, None
        return config, environment_factory(config.environment, config.environment_arguments)
    if config.environment is not None:
        raise ConfigError("environment: given in the settings and as an argument. Remove one.")
    make = environment_factory(environment, config.environment_arguments)
    name = getattr(environment, "__qualname__", type(environment).__qualname__)
    return replace(config, environment=f"{environment.__module__}:{name}"), make


def with_environment_reward(config: ReinforceConfig, rewards: Any) -> Any:
    """Return the reward functions, with the rewards of the environment, if there is one."""
    if config.environment is None:
        return rewards if rewards is not None else ()
    listed = list(rewards) if isinstance(rewards, (list, tuple)) else [] if rewards is None else [rewards]
    given = any(
        parse_source(reward).kind == ENVIRONMENT if isinstance(reward, str) else isinstance(reward, EnvironmentReward)
        for reward in listed
    )
    return listed if given else [*listed, ENVIRONMENT]


def episode_runner(
    config: ReinforceConfig,
    make: EnvironmentFactory | None,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    folder: Path | None,
) -> EpisodeRunner | None:
    """Return what runs the episodes of a training in ``folder``; None without an environment.

    Without a folder, failed episodes aren't saved.
    """
    if make is None:
        return None
    return EpisodeRunner(
        str(config.environment or ", ".join(config.tools)),
        make,
        tokenizer,
        max_turns=config.max_turns,
        timeout=config.environment_timeout,
        max_prompt_length=max_prompt_length,
        log_failures=partial(log_failed_episodes, folder) if folder is not None else lambda episodes: None,
    )


def environment_inputs(config: ReinforceConfig, given: object) -> dict[str, str]:
    """Return the fingerprint of an environment that the settings name, so that a resumed run notices a change."""
    if config.environment is None or given is not None:
        return {}
    return {"environment": source_digest(config.environment, "environment")}


def longest_start(config: ReinforceConfig, longest: int, limit: int, make: EnvironmentFactory | None) -> int:
    """Return the most tokens of a prompt: ``longest`` of the data, with room for what an environment begins with."""
    if make is None or config.max_prompt_length is not None:
        return config.max_prompt_length or longest
    return min(limit, longest + ROOM_FOR_RESET)
