"""Settings of environments and tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reinforcepp.config.base import Config, FilledStr, JsonText, PositiveFloat, PositiveInt, json_object
from reinforcepp.config.values import NAMES
from reinforcepp.errors import ConfigError

EXAMPLE = '{"size": 3}'


@dataclass(frozen=True)
class EnvironmentConfig(Config):
    """What answers the policy's messages, so that a completion is an episode of several turns."""

    environment: FilledStr | None = None
    """Class whose objects answer the policy: module:Class or FILE.py:Class"""
    environment_kwargs: JsonText | None = None
    """Arguments of the environment's class, JSON"""
    tools: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Python functions that the policy can call: module:function or FILE.py:function"""
    max_turns: PositiveInt = 10
    """Messages of the policy after which an episode ends"""
    environment_timeout: PositiveFloat = 60.0
    """Seconds for each call of an environment"""
    episode_timeout: PositiveFloat | None = None
    """Seconds for all calls of an episode's environment; default: no limit"""
    tool_timeout: PositiveFloat = 10.0
    """Seconds for each call of a tool"""

    @property
    def environment_arguments(self) -> dict[str, Any]:
        """Arguments of the environment's class by name."""
        return json_object("environment_kwargs", self.environment_kwargs, EXAMPLE)

    @property
    def has_episodes(self) -> bool:
        """Whether a completion is an episode of several turns."""
        return self.environment is not None or bool(self.tools)

    def _check_rules(self) -> None:
        if self.environment_arguments and self.environment is None:
            raise ConfigError("environment_kwargs: there is no environment. Set environment, or omit them.")
        if self.environment is not None and self.tools:
            raise ConfigError(
                "environment and tools: both are given. Let the environment call the tools, or remove one."
            )
        if self.environment is not None and ":" not in self.environment:
            raise ConfigError(f"environment {self.environment}: give it as module:Class or path/to/file.py:Class.")
