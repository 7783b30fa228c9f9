"""Settings of supervised trainings: SFT and reward models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from reinforcepp.config.aliases import share_flags
from reinforcepp.config.base import (
    Config,
    FilledStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveCount,
    PositiveInt,
    Seed,
    StepInterval,
    check_not_below_output,
)
from reinforcepp.config.criteria import Criterion, parse_criteria
from reinforcepp.config.hub import HubConfig
from reinforcepp.config.learning_rates import Training
from reinforcepp.config.shared import (
    MODEL_CONFIG,
    BadRowsConfig,
    ChatTemplateConfig,
    CheckpointConfig,
    ColumnMapping,
    ComputeConfig,
    DataLoadingConfig,
    DryRunConfig,
    OptimizerConfig,
    TrackingConfig,
)
from reinforcepp.config.values import NAMES
from reinforcepp.errors import ConfigError, nearest

DEFAULT_MAX_LENGTH = 4096
"""Largest number of tokens of a row if ``max_length`` isn't set and the model's context isn't shorter."""


@dataclass(frozen=True)
class SupervisedConfig(TrackingConfig, OptimizerConfig):
    """Passes over the rows of a file, the size of a batch, and the optimizer."""

    num_train_epochs: PositiveCount = 3
    """Passes over the training rows; a fraction ends within a pass"""
    max_steps: NonNegativeInt = 0
    """Optimizer steps; 0 uses num_train_epochs"""
    batch_size: PositiveInt = 8
    """Rows per optimizer step; a pair counts as one"""
    micro_batch_size: PositiveInt | None = None
    """Rows per forward and backward pass; divides batch_size. Default: batch_size"""
    gradient_accumulation_steps: PositiveInt | None = None
    """Micro-batches per optimizer step; times micro_batch_size it is batch_size"""
    max_length: PositiveInt | None = None
    """Skip rows with more tokens. Default: the model's context, up to 4096"""

    @property
    def effective_micro_batch_size(self) -> int:
        """Rows per forward and backward pass."""
        return self.micro_batch_size or max(1, self.batch_size // (self.gradient_accumulation_steps or 1))

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.gradient_accumulation_steps or max(1, self.batch_size // self.effective_micro_batch_size)

    def _check_rules(self) -> None:
        if self.effective_micro_batch_size * self.accumulation != self.batch_size:
            raise ConfigError(
                f"micro_batch_size {self.effective_micro_batch_size} x gradient_accumulation_steps {self.accumulation} isn't "
                f"batch_size {self.batch_size}. Omit one of the three or make them agree."
            )


@dataclass(frozen=True)
class SftInputs(BadRowsConfig, ColumnMapping):
    """Inputs of SFT."""

    TEXTS = ("prompt", "completion", "chosen", "messages", "text")

    model: FilledStr = "builtin:tiny"
    """Language model to start from: builtin:tiny, a folder or a Hub name"""
    data: FilledStr = "builtin:network"
    """Data: files, folders, Hub names, or builtin:network; several: a.csv,b.csv"""
    prompt_column: str = "prompt"
    """Column with the prompt"""
    completion_column: str = "completion"
    """Column with the completion; if missing, the chosen column is used"""
    chosen_column: str = "chosen"
    """Column with the preferred response of a preference file"""
    messages_column: str = "messages"
    """Column with conversations, if there is no prompt; trains the last response"""
    text_column: str = "text"
    """Column with plain text, if there is none of the above; trains all of it"""


@dataclass(frozen=True)
class SftConfig(DryRunConfig, ChatTemplateConfig, ComputeConfig, CheckpointConfig, SupervisedConfig, SftInputs):
    """Fine-tune a language model on completions or plain text, before RL."""

    TRAINING: ClassVar[Training] = "sft"

    output_dir: str = "models/sft"
    """Folder for the fine-tuned model"""
    seed: Seed = 42
    """Seed of the split and of the row order"""

    def _check_rules(self) -> None:
        if self.renamed:
            name = next(iter(self.renamed))
            raise ConfigError(
                f"columns: SFT has no column {name!r}, only {', '.join(self.TEXTS)}.{nearest(name, self.TEXTS)}"
            )
        for setting in ("model", "data"):
            check_not_below_output(self.output_dir, setting, getattr(self, setting))


@dataclass(frozen=True)
class RewardInputs(Config):
    """Inputs of a reward model training."""

    model: FilledStr = "builtin:tiny"
    """Language model that gets the score head: builtin:tiny, a folder or a Hub name"""
    data: FilledStr = "builtin:network"
    """Preference files, folders, Hub names, or builtin:network; several: a.csv,b.csv"""


@dataclass(frozen=True)
class RewardModelConfig(
    DryRunConfig, ChatTemplateConfig, ComputeConfig, HubConfig, SupervisedConfig, DataLoadingConfig, RewardInputs
):
    """Train a reward model from a preference file."""

    TRAINING: ClassVar[Training] = "reward"

    output_dir: str = "models/reward_model"
    """Folder for the reward model and its card"""
    seed: Seed = 42
    """Seed of the split, the row order and the newly initialized score head"""
    center_rewards_coefficient: NonNegativeFloat | None = 0.01
    """Weight of the penalty that centers scores on 0"""
    eval_every: StepInterval = 0
    """Steps between evaluations of held-out pairs; 0: only at the end, -1: each epoch"""
    disable_dropout: bool = True
    """Turn off dropout during training"""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of trained weights; mixed_precision saves time without rounding them"""
    criteria: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Criteria with an output each, NAME or NAME=COLUMN; -COLUMN: lower is better"""
    criteria_margins: bool = False
    """Use differences of ratings, and sizes of judgments, as margins of the loss"""

    @property
    def parsed_criteria(self) -> tuple[Criterion, ...]:
        """The criteria; empty for one output that learns the pairs' own preference."""
        return parse_criteria(self.criteria)

    @property
    def float32_setting(self) -> str | None:
        """The setting that needs ``mixed_precision`` no."""
        return f"dtype {self.dtype}" if self.dtype != "float32" else None

    def _check_rules(self) -> None:
        if not self.parsed_criteria and self.criteria_margins:
            raise ConfigError("criteria_margins applies only to criteria. Add criteria, or omit it.")
        if self.dtype != "float32" and self.mixed_precision in ("bf16", "fp16"):
            raise ConfigError(
                f"dtype {self.dtype} and mixed_precision {self.mixed_precision} contradict each other, because mixed precision "
                "has float32 weights. Omit one of the two."
            )
        for setting in ("model", "data"):
            check_not_below_output(self.output_dir, setting, getattr(self, setting))


for config_class in (SftConfig, RewardModelConfig):
    share_flags(config_class, hidden=MODEL_CONFIG)
