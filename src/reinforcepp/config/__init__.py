"""Every setting of every command, in frozen dataclasses that check themselves. Loads no torch.

The docstring under a field is its description, which ``--help`` shows. A value that is out of range or contradicts
another one raises a ``ConfigError`` with the fix; nothing here changes a user's setting.
"""

from __future__ import annotations

from reinforcepp.config.comparison import CompareAlgorithmsConfig, CompareConfig
from reinforcepp.config.files import as_dict, read_yaml
from reinforcepp.config.inference import (
    ChatConfig,
    ExportConfig,
    GenerateConfig,
    PushConfig,
    SamplingConfig,
    ServeConfig,
    ServeRewardConfig,
)
from reinforcepp.config.inspection import DoctorConfig, LintConfig, MigrateConfig, ReportConfig
from reinforcepp.config.labeling import LabelAgreementConfig, LabelConfig, LabelExportConfig, LabelImportConfig
from reinforcepp.config.plan import PlanConfig
from reinforcepp.config.presets import DemoConfig, RecipesConfig
from reinforcepp.config.reinforce import ReinforceConfig, RewardScoringConfig
from reinforcepp.config.shared import AdapterConfig, ChatTemplateConfig, CheckpointConfig, ColumnConfig, ComputeConfig
from reinforcepp.config.supervised import DEFAULT_MAX_LENGTH, RewardModelConfig, SftConfig
from reinforcepp.config.training import TrainConfig

__all__ = [
    "DEFAULT_MAX_LENGTH",
    "AdapterConfig",
    "ChatConfig",
    "ChatTemplateConfig",
    "CheckpointConfig",
    "ColumnConfig",
    "CompareAlgorithmsConfig",
    "CompareConfig",
    "ComputeConfig",
    "DemoConfig",
    "DoctorConfig",
    "ExportConfig",
    "GenerateConfig",
    "LabelAgreementConfig",
    "LabelConfig",
    "LabelExportConfig",
    "LabelImportConfig",
    "LintConfig",
    "MigrateConfig",
    "PlanConfig",
    "PushConfig",
    "RecipesConfig",
    "ReinforceConfig",
    "ReportConfig",
    "RewardModelConfig",
    "RewardScoringConfig",
    "SamplingConfig",
    "ServeConfig",
    "ServeRewardConfig",
    "SftConfig",
    "TrainConfig",
    "as_dict",
    "read_yaml",
]
