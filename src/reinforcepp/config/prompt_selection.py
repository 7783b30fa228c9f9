"""Settings that choose the prompts of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

from reinforcepp.config.base import Config, PositiveFloat, PositiveInt
from reinforcepp.config.values import NAMES, EmptyIfNone
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class PromptSelectionConfig(Config):
    """Which prompts a training step uses, and which groups of completions it keeps."""

    dynamic_sampling: bool = False
    """Replace prompts whose completions all have the same reward (DAPO)"""
    max_num_gen_batches: PositiveInt = 10
    """With dynamic_sampling: batches generated per step, with the first one"""
    interleave_probs: Annotated[tuple[float, ...], EmptyIfNone()] = field(default=(), metadata=NAMES)
    """Share of each dataset in the prompts of a step, one number per entry of data"""
    curriculum: bool = False
    """Draw prompts more often that are solved about half of the time"""
    success_threshold: PositiveFloat = 0.5
    """Reward from which a completion is a success, for curriculum and datasets"""

    def _check_rules(self) -> None:
        if self.curriculum and self.interleave_probs:
            raise ConfigError(
                "curriculum and interleave_probs: both choose the prompts of a step. Remove one of the two."
            )
        if any(not 0 < prob < math.inf for prob in self.interleave_probs):
            raise ConfigError(
                f"interleave_probs: {' '.join(map(str, self.interleave_probs))} aren't all above 0. Omit the other datasets."
            )

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
