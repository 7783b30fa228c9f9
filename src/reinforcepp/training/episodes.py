"""Start what runs the episodes of a training, from its settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import ReinforceConfig
from reinforcepp.config.reward_spec import ENVIRONMENT, parse_source
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.environments.protocol import EnvironmentFactory, environment_factory
from reinforcepp.environments.tools.environment import ToolEnvironments, tool_environments
from reinforcepp.environments.tools.schemas import TOOL, ToolFunction, load_tools
from reinforcepp.errors import ConfigError
from reinforcepp.monitoring.completion_log import log_failed_episodes
from reinforcepp.rewards.functions import EnvironmentReward
from reinforcepp.rewards.user_code import source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOM_FOR_RESET = 1024
"""Tokens by which the prompts of an environment can be longer than those of the data, unless max_prompt_length is set."""


def with_environment(
    config: ReinforceConfig,
    environment: EnvironmentFactory | None = None,
    tools: Sequence[str | ToolFunction] | None = None,
) -> ReinforceConfig:
    """Return ``config`` with the names of the trainer's arguments.

    Raises:
        ConfigError: an argument can't be used, or is given in the settings, too.
    """
    for name, given in (("environment", environment), ("tools", tools)):
        if given and getattr(config, name):
            raise ConfigError(f"{name}: given in the settings and as an argument. Remove one.")
    if environment is not None:
        name = getattr(environment, "__qualname__", type(environment).__qualname__)
        config = replace(config, environment=f"{environment.__module__}:{name}")
    return replace(config, tools=tuple(tool.source for tool in load_tools(tools))) if tools else config


def start_environments(
    config: ReinforceConfig, environment: EnvironmentFactory | None, tokenizer: PreTrainedTokenizerBase
) -> EnvironmentFactory | None:
    """Return what makes the environment of an episode, from the trainer's argument or the settings, if there is one.

    Raises:
        ConfigError: an environment or a tool doesn't exist or can't be used, also with the tokenizer's chat template.
    """
    if config.tools:
        return tool_environments(config.tools, tokenizer, config.tool_timeout)
    if config.environment is None:
        return None
    return environment_factory(environment or config.environment, config.environment_arguments)


def template_variables(make: EnvironmentFactory | None) -> dict[str, Any]:
    """Return the variables of the chat template that all prompts need: the schemas of the tools."""
    return {"tools": make.schemas} if isinstance(make, ToolEnvironments) else {}


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
        timeout=None if config.tools else config.environment_timeout,  # each call of a tool has a limit
        max_prompt_length=max_prompt_length,
        has_tools=bool(config.tools),
        episode_timeout=config.episode_timeout,
        log_failures=partial(log_failed_episodes, folder) if folder is not None else None,
    )


def environment_inputs(config: ReinforceConfig, given: object) -> dict[str, str]:
    """Return the fingerprint of tools, or of an environment that the settings name, so that a resumed run notices a change."""
    if config.tools:
        return {"tools": " ".join(source_digest(tool, TOOL) for tool in config.tools)}
    if config.environment is None or given is not None:
        return {}
    return {"environment": source_digest(config.environment, "environment")}


def longest_start(config: ReinforceConfig, longest: int, limit: int, make: EnvironmentFactory | None) -> int:
    """Return the most tokens of a prompt: ``longest`` of the data, with room for what an environment begins with."""
    if make is None or config.max_prompt_length is not None:
        return config.max_prompt_length or longest
    return min(limit, longest + ROOM_FOR_RESET)
