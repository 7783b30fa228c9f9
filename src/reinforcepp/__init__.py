"""REINFORCE++ RLHF: from a CSV of human preferences to an aligned language model.

The public names load on first use, so importing the package is instant.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; at run time, ``__getattr__`` loads the same names
    from reinforcepp.commands.compare.command import Comparison as Comparison
    from reinforcepp.commands.compare.command import compare as compare
    from reinforcepp.commands.export.command import export as export
    from reinforcepp.commands.generate import Response as Response
    from reinforcepp.commands.generate import generate as generate
    from reinforcepp.commands.lint.command import lint as lint
    from reinforcepp.commands.lint.findings import Finding as Finding
    from reinforcepp.commands.lint.findings import LintReport as LintReport
    from reinforcepp.commands.report import Report as Report
    from reinforcepp.commands.report import report as report
    from reinforcepp.config import GenerateConfig as GenerateConfig
    from reinforcepp.config import ReinforceConfig as ReinforceConfig
    from reinforcepp.config import RewardModelConfig as RewardModelConfig
    from reinforcepp.config import SftConfig as SftConfig
    from reinforcepp.errors import ConfigError as ConfigError
    from reinforcepp.errors import DataError as DataError
    from reinforcepp.errors import ModelError as ModelError
    from reinforcepp.errors import ReinforceError as ReinforceError
    from reinforcepp.errors import RewardError as RewardError
    from reinforcepp.errors import RolloutError as RolloutError
    from reinforcepp.errors import TrainingDiverged as TrainingDiverged
    from reinforcepp.models.loading import load_policy as load_policy
    from reinforcepp.models.loading import load_tokenizer as load_tokenizer
    from reinforcepp.models.tokenization import encode_answer as encode_answer
    from reinforcepp.models.tokenization import encode_prompt as encode_prompt
    from reinforcepp.planner.command import plan as plan
    from reinforcepp.planner.report import Plan as Plan
    from reinforcepp.rewards.trained import load_reward_model as load_reward_model
    from reinforcepp.rollout.engine import RolloutEngine as RolloutEngine
    from reinforcepp.rollout.transformers_engine import TransformersEngine as TransformersEngine
    from reinforcepp.training.reinforce_trainer import ReinforceTrainer as ReinforceTrainer
    from reinforcepp.training.reward_loop import RewardTrainer as RewardTrainer
    from reinforcepp.training.reward_trainer import train_reward_model as train_reward_model
    from reinforcepp.training.sft_trainer import SftResult as SftResult
    from reinforcepp.training.sft_trainer import sft as sft
    from reinforcepp.types import Completion as Completion
    from reinforcepp.types import Prompt as Prompt
    from reinforcepp.types import Sampling as Sampling

__version__ = "0.1.0"

_MODULES = {
    "ReinforceTrainer": "training.reinforce_trainer",
    "RewardTrainer": "training.reward_loop",
    "ReinforceConfig": "config",
    "RewardModelConfig": "config",
    "SftConfig": "config",
    "GenerateConfig": "config",
    "train_reward_model": "training.reward_trainer",
    "generate": "commands.generate",
    "Response": "commands.generate",
    "export": "commands.export.command",
    "plan": "planner.command",
    "Plan": "planner.report",
    "report": "commands.report",
    "Report": "commands.report",
    "compare": "commands.compare.command",
    "Comparison": "commands.compare.command",
    "sft": "training.sft_trainer",
    "SftResult": "training.sft_trainer",
    "lint": "commands.lint.command",
    "LintReport": "commands.lint.findings",
    "Finding": "commands.lint.findings",
    "load_reward_model": "rewards.trained",
    "load_policy": "models.loading",
    "load_tokenizer": "models.loading",
    "encode_prompt": "models.tokenization",
    "encode_answer": "models.tokenization",
    "RolloutEngine": "rollout.engine",
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

__all__ = ["__version__", *_MODULES]

if find_spec("torchvision") is not None:  # otherwise the check, which reads package metadata, isn't needed
    from reinforcepp.runtime.process import hide_unloadable_packages

    hide_unloadable_packages()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'reinforcepp' has no attribute {name!r}")
    return getattr(import_module(f"reinforcepp.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
