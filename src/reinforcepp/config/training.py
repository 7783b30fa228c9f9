"""Settings of each verb of the command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reinforcepp.config._checks import (
    check_apart,
    check_judge,
    check_output,
    check_values,
    filled,
    judge_for,
    not_negative,
    positive,
)
from reinforcepp.config.chat_template import Framing, check_framing
from reinforcepp.config.checkpointing import Keeping, check_keeping
from reinforcepp.config.columns import Reading, check_columns
from reinforcepp.config.lora import check_adapters
from reinforcepp.config.precision import Computing
from reinforcepp.config.reinforce import ReinforceConfig
from reinforcepp.config.rewards import check_rewards
from reinforcepp.config.supervised import Fitting, check_fitting
from reinforcepp.errors import ConfigError

LAST_PORT = 65535


@dataclass(frozen=True)
class Looking:
    """Whether a training is only to be looked at."""

    dry_run: bool = False
    """Show the settings, the plan and the first rows as they are tokenised, and stop; nothing is loaded or written."""


@dataclass(frozen=True)
class TrainInputs:
    """What a training starts from."""

    model: str = "builtin:tiny"
    """Policy to start from, also the reference: builtin:tiny, a folder or a hub name."""
    data: str = "builtin:network"
    """CSV, TSV, JSON, JSONL or Parquet file with prompts, a folder or pattern of such files, several with commas between
    them, or builtin:network."""
    reward_model: str = "models/reward_model"
    """Folder that the reward verb wrote."""
    rewards: tuple[str, ...] = ()
    """What is rewarded instead, added up, each with a weight or without: 0.5*models/reward_model, rule:length?max=200,
    my_rewards.py:helpful, http://127.0.0.1:5000/get_reward, builtin:judge. Default: reward_model alone."""
    judge: str = "auto"
    """Scores held-out answers and takes no part in training: builtin:judge, which knows builtin:network, the folder of
    another reward model or whatever else rewards takes, or none; auto is builtin:judge for builtin:network, else none."""


@dataclass(frozen=True)
class TrainConfig(Looking, ReinforceConfig, Reading, TrainInputs):
    """Train a policy against a reward model with REINFORCE++."""

    def __post_init__(self) -> None:
        """Check what training adds to the algorithm's settings."""
        super().__post_init__()
        check_columns(self)
        filled(self, "model", "data", "reward_model", "judge")
        check_apart(self, "model", "data", "judge")
        check_rewards(self)
        check_judge(self.judge, self.data)

    @property
    def judge_name(self) -> str | None:
        """The judge there is in fact, None for none."""
        return judge_for(self.judge, self.data)

    @property
    def reward_sources(self) -> tuple[str, ...]:
        """What the reward is made of."""
        return self.rewards or (self.reward_model,)


@dataclass(frozen=True)
class ServeRewardConfig:
    """Answer requests for a reward model's scores over HTTP, in the protocol of OpenRLHF's reward servers."""

    model: str = "models/reward_model"
    """Folder that the reward verb wrote."""
    host: str = "127.0.0.1"
    """Address to listen on; the default is this machine only, 0.0.0.0 is all of its addresses."""
    port: int = 5000
    """Port to listen on; 0 takes one that is free."""
    batch_size: int = 64
    """Texts scored at a time."""
    reward_normalize: bool = False
    """Scores less the mean, over the deviation, that the model's card holds."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        filled(self, "model", "host")
        positive(self, "batch_size")
        if not 0 <= self.port <= LAST_PORT:
            raise ConfigError(f"port must be from 0 to {LAST_PORT}, not {self.port}.")


@dataclass(frozen=True)
class RewardInputs:
    """What a reward model starts from."""

    model: str = "builtin:tiny"
    """Language model that gets the scoring head: builtin:tiny, a folder or a hub name."""
    data: str = "builtin:network"
    """CSV, TSV, JSON, JSONL or Parquet file with prompt, chosen and rejected answers, a folder or pattern of such files,
    several with commas between them, or builtin:network."""


@dataclass(frozen=True)
class RewardModelConfig(Looking, Framing, Computing, Keeping, Fitting, Reading, RewardInputs):
    """Train a reward model from a preference file."""

    output_dir: str = "models/reward_model"
    """Folder for the reward model and its card."""
    seed: int = 42
    """Decides the split, the order of the pairs and the fresh head."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; falls linearly to 0."""
    center_rewards_coefficient: float = 0.01
    """Weight of the penalty that keeps scores centred on 0."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        check_values(self)
        check_keeping(self)
        check_adapters(self)
        check_framing(self)
        check_fitting(self)
        not_negative(self, "center_rewards_coefficient")
        check_columns(self)
        filled(self, "model", "data")
        check_apart(self, "model", "data")


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole job offline on the built-in model and data: reward model, REINFORCE++, generation, comparison."""

    output_dir: str = "runs/demo"
    """Folder for everything the demo writes."""
    seed: int = 0
    """Seed of the reward model and of the training."""
    max_steps: int = 125
    """Training steps of 64 completions."""
    rollout: Literal["auto", "transformers", "vllm"] = "transformers"
    """Engine that generates the rollouts."""
    overwrite: bool = False
    """Replace an earlier demo in output_dir."""

    def __post_init__(self) -> None:
        """Check each value."""
        check_values(self)
        check_output(self)
        positive(self, "max_steps")
