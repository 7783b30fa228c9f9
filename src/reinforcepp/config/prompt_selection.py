"""Settings that choose the prompts of a step."""

from __future__ import annotations

from dataclasses import dataclass

from reinforcepp.config.base import Config, PositiveInt
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class PromptSelectionConfig(Config):
    """Which prompts a training step uses, and which groups of completions it keeps."""

    dynamic_sampling: bool = False
    """Replace prompts whose completions all have the same reward (DAPO)"""
    max_num_gen_batches: PositiveInt = 10
    """With dynamic_sampling: batches generated per step, with the first one"""

    def check_dynamic_sampling(self, num_generations: int, staleness: int) -> None:
        """Check that dynamic sampling can compare completions and generate more of them."""
        if not self.dynamic_sampling:
            return
        if num_generations < 2:
            raise ConfigError(
                "dynamic_sampling: compares the rewards of a prompt's completions, but num_generations is 1. Set "
                "num_generations to 2 or more, or remove dynamic_sampling."
            )
        if staleness:
            raise ConfigError(
                f"dynamic_sampling: generates more completions once a batch is scored, but staleness {staleness} generates "
                "later steps meanwhile. Remove one of the two."
            )
