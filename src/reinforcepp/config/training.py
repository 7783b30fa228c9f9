"""Settings of policy training from files, with its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from reinforcepp.config.base import Config, FilledStr, check_name, check_not_below_output
from reinforcepp.config.data_spec import REASONING_GYM, data_entries
from reinforcepp.config.judge_spec import parse_judge
from reinforcepp.config.reinforce import ReinforceConfig
from reinforcepp.config.reward_spec import ENVIRONMENT, parse_model, parse_source, path_of_judge
from reinforcepp.config.shared import DataLoadingConfig, DryRunConfig, check_judge, check_verifier, judge_for
from reinforcepp.config.values import NAMES
from reinforcepp.errors import ConfigError


@dataclass(frozen=True)
class TrainInputs(Config):
    """Inputs of a policy training."""

    model: FilledStr = "builtin:tiny"
    """Policy and reference model: builtin:tiny, a folder or a Hub name"""
    data: FilledStr = "builtin:network"
    """Prompt files, folders, Hub names, builtin:network or reasoning_gym:TASK; a,b"""
    reward_model: FilledStr = "models/reward_model"
    """Folder of a reward model, from reinforcepp reward"""
    rewards: tuple[str, ...] = field(default=(), metadata=NAMES)
    """Weighted rewards instead: 0.5*FOLDER rule:length?max=200 my.py:f http://..."""
    judge: FilledStr = "auto"
    """Scores held-out responses: builtin:judge, a reward, none, or auto"""


@dataclass(frozen=True)
class TrainConfig(DryRunConfig, ReinforceConfig, DataLoadingConfig, TrainInputs):
    """Train a policy against a reward model with REINFORCE++."""

    def _check_rules(self) -> None:
        inputs = {"model": self.model, "data": self.data, "judge": path_of_judge(self.judge)}
        for setting, value in inputs.items():
            if value is not None:
                check_not_below_output(self.output_dir, setting, value)
        self._check_rewards()
        self._check_mixture()
        check_judge(self.judge, self.data)

    def _check_mixture(self) -> None:
        number, entries = len(self.interleave_probs), data_entries(self.data)
        if number and number != len(entries):
            raise ConfigError(
                f"interleave_probs: {number} shares for {len(entries)} entries of data ({', '.join(entries.values())}). Give one "
                "share per entry."
            )
        if number and self.streaming:
            raise ConfigError(
                "interleave_probs: draws from datasets in memory, but streaming keeps rows on disk. Remove one of the two."
            )

    def _check_rewards(self) -> None:
        """Check rewards and judge as far as possible without reading a file."""
        default = next(setting.default for setting in fields(TrainInputs) if setting.name == "reward_model")
        if self.rewards and self.reward_model != default:
            raise ConfigError(
                f"rewards replace reward_model, but both are given. Add {self.reward_model} to the rewards, or remove one."
            )
        if len(set(self.rewards)) < len(self.rewards):
            raise ConfigError(f"rewards: one is given twice ({', '.join(self.rewards)}). Give it a weight instead.")
        for text in self.rewards:
            self._check_reward(text)
        if self.reward_weights and len(self.reward_weights) != len(self.reward_sources):
            raise ConfigError(
                f"reward_weights: {len(self.reward_weights)} weights for {len(self.reward_sources)} rewards. Give one per reward."
            )
        if self.judge_name is not None:
            parse_source(self.judge_name)
        if not self.rewards:
            check_not_below_output(self.output_dir, "reward_model", parse_model(self.reward_model).name)

    def _check_reward(self, text: str) -> None:
        source = parse_source(text)
        if source.kind == "environment" and self.environment is None:
            raise ConfigError("rewards: environment is given, but there is no environment. Set environment.")
        check_verifier("rewards", source.target, self.data)
        if source.path is not None:
            check_name("rewards", source.path)
            check_not_below_output(self.output_dir, "rewards", source.path)
        timeout, attempts = self.reward_timeout, self.reward_attempts
        if source.kind == "judge":
            judge = parse_judge(source.target)
            timeout, attempts = judge.timeout or timeout, judge.attempts or attempts
        longest = timeout * attempts
        if source.kind in ("server", "judge") and 0 < self.watchdog_seconds <= longest:
            raise ConfigError(
                f"reward_timeout {timeout:g} x reward_attempts {attempts} is {longest:g} s, but the watchdog ends the run after "
                f"{self.watchdog_seconds:g} s. Lower one of the two or raise watchdog_seconds."
            )

    @property
    def judge_name(self) -> str | None:
        """The judge after resolving auto and none; auto means none if the verifiers of reasoning-gym are rewards already."""
        judge = judge_for(self.judge, self.data)
        rewarded = judge == REASONING_GYM and any(parse_source(reward).target == judge for reward in self.rewards)
        return None if self.judge == "auto" and rewarded else judge

    @property
    def reward_sources(self) -> tuple[str, ...]:
        """The rewards, or the reward model alone; with an environment, its rewards, too."""
        if self.environment is None:
            return self.rewards or (self.reward_model,)
        given = any(parse_source(text).kind == "environment" for text in self.rewards)
        return self.rewards if given else (*self.rewards, ENVIRONMENT)
