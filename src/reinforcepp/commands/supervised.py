"""The commands ``sft`` and ``reward``: train, after an estimate of the memory that the training needs."""

from __future__ import annotations

from reinforcepp.config import RewardModelConfig, SftConfig
from reinforcepp.planner.supervised import report_memory
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.sft_trainer import train_language_model


def run_sft(config: SftConfig) -> None:
    """Fine-tune a language model."""
    train_language_model(config, report_memory)


def run_reward_training(config: RewardModelConfig) -> None:
    """Train a reward model."""
    train_reward_model(config, check_memory=report_memory)
