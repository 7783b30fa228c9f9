"""Settings of the trainings that go over the rows of a file: of reward models, and of language models before RL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reinforcepp.config._checks import positive
from reinforcepp.config.base import Config
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class Fitting(Config):
    """How often a file's rows are gone over, and how many at a time."""

    num_train_epochs: int = 3
    """Passes over the training rows."""
    batch_size: int = 8
    """Rows per optimiser step; a pair is one."""
    micro_batch_size: int | None = None
    """Rows per forward and backward pass; needs to divide batch_size. Default: the whole batch."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches per optimizer step; together with micro_batch_size it gives batch_size."""
    max_length: int = 512
    """Rows with more tokens, in a pair those of the longer answer, prompt and frame included, are left out and counted."""

    @property
    def effective_micro_batch_size(self) -> int:
        """Rows per forward and backward pass."""
        return self.micro_batch_size or max(1, self.batch_size // (self.gradient_accumulation_steps or 1))

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.gradient_accumulation_steps or max(1, self.batch_size // self.effective_micro_batch_size)


def check_fitting(config: Any) -> None:
    """Check these settings of a configuration, and the learning rate."""
    positive(config, "learning_rate", "num_train_epochs", "batch_size", "micro_batch_size", "max_length")
    positive(config, "gradient_accumulation_steps")
    if config.effective_micro_batch_size * config.accumulation != config.batch_size:
        raise ConfigError(
            f"micro_batch_size {config.effective_micro_batch_size} x gradient_accumulation_steps {config.accumulation} isn't "
            f"batch_size {config.batch_size}. Omit one of the three or make them agree."
        )
