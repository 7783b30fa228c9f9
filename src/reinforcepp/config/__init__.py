"""Every setting of every verb: frozen dataclasses that check themselves. Loads no torch.

The text under a field is its one description: ``--help`` shows it. A value that is out of range or contradicts
another one is a ``ConfigError`` that names the cure; nothing here changes what a user has set.
"""

from __future__ import annotations

from reinforcepp.config.checkpointing import Keeping
from reinforcepp.config.columns import Columns
from reinforcepp.config.compare_estimators import CompareAlgorithmsConfig
from reinforcepp.config.compare_models import CompareConfig
from reinforcepp.config.doctor import DoctorConfig
from reinforcepp.config.files import as_dict, read_yaml
from reinforcepp.config.inference import ChatConfig, ExportConfig, GenerateConfig, PushConfig, ServeConfig
from reinforcepp.config.lint import LintConfig
from reinforcepp.config.plan import PlanConfig
from reinforcepp.config.recipes import RecipesConfig
from reinforcepp.config.reinforce import ReinforceConfig
from reinforcepp.config.report import ReportConfig
from reinforcepp.config.rewards import RewardSettings
from reinforcepp.config.sft import SftConfig
from reinforcepp.config.training import DemoConfig, RewardModelConfig, ServeRewardConfig, TrainConfig

__all__ = [
    "ChatConfig",
    "Columns",
    "CompareAlgorithmsConfig",
    "CompareConfig",
    "DemoConfig",
    "DoctorConfig",
    "ExportConfig",
    "GenerateConfig",
    "Keeping",
    "LintConfig",
    "PlanConfig",
    "PushConfig",
    "RecipesConfig",
    "ReinforceConfig",
    "ReportConfig",
    "RewardModelConfig",
    "RewardSettings",
    "ServeConfig",
    "ServeRewardConfig",
    "SftConfig",
    "TrainConfig",
    "as_dict",
    "read_yaml",
]
