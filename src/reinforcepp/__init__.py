"""REINFORCE++ RLHF: from a CSV of human preferences to an aligned language model.

The public names below load on first use, so importing the package is instant.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "ReinforceTrainer": "reinforce_trainer",
    "ReinforceConfig": "config",
    "RewardModelConfig": "config",
    "GenerateConfig": "config",
    "train_reward_model": "reward_trainer",
    "load_reward_model": "rewards",
    "load_policy": "models",
    "load_tokenizer": "models",
    "TransformersEngine": "rollout.transformers_engine",
    "Prompt": "types",
    "Sampling": "types",
    "Completion": "types",
    "ReinforceError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "RewardError": "errors",
    "RolloutError": "errors",
    "TrainingDiverged": "errors",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reinforcepp' has no attribute {name!r}")
    return getattr(import_module(f"reinforcepp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
