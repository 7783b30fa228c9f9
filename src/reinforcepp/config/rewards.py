"""Settings of what is made of rewards."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from reinforcepp.config._checks import check_apart_from, filled, filled_path, not_negative, positive
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class RewardSettings:
    """How completions are scored, and what becomes of the scores."""

    reward_normalize: bool = False
    """Scores of trained reward models less the mean, over the deviation, that their cards hold."""
    reward_clip: float | None = None
    """The weighted sum of the rewards, less truncation_penalty, is cut to plus or minus this; off by default."""
    truncation_penalty: float = 0.0
    """Taken off the reward of a completion that was cut off at max_new_tokens."""
    reward_timeout: float = 60.0
    """Seconds that a reward server has for an answer."""
    reward_attempts: int = 5
    """How often a reward server is asked the same, with growing pauses, before the run stops."""
    reward_batch_size: int = 64
    """Completions that a reward server gets at a time."""
    reward_label_column: str = "label"
    """Column of the data that a reward server gets as labels."""


def check_reward_settings(config: Any) -> None:
    """Check these settings of a configuration."""
    positive(config, "reward_clip", "reward_timeout", "reward_attempts", "reward_batch_size")
    not_negative(config, "truncation_penalty")
    filled(config, "reward_label_column")


def check_rewards(config: Any) -> None:
    """Check what a training's reward, and its judge, are made of, as far as that can be told without reading anything."""
    default = {field.name: field.default for field in fields(config)}["reward_model"]
    if config.rewards and config.reward_model != default:
        raise ConfigError(
            f"rewards take the place of reward_model: name {config.reward_model} among the rewards, or leave one of the two out."
        )
    if len(set(config.rewards)) < len(config.rewards):
        raise ConfigError(f"rewards name one twice: {', '.join(config.rewards)}. Give it a weight instead.")
    for text in config.rewards:
        source = parse_source(text)
        if source.path is not None:
            filled_path("rewards", source.path)
            check_apart_from(config, "rewards", source.path)
        longest = config.reward_timeout * config.reward_attempts
        if source.kind == "server" and 0 < config.watchdog_seconds <= longest:
            raise ConfigError(
                f"reward_timeout {config.reward_timeout:g} x reward_attempts {config.reward_attempts} is {longest:g} s, in which "
                f"the watchdog ends the run ({config.watchdog_seconds:g} s): lower one of the two or raise watchdog_seconds."
            )
    if config.judge_name is not None:
        parse_source(config.judge_name)
    if not config.rewards:
        check_apart_from(config, "reward_model", config.reward_model)
