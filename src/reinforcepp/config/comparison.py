"""Settings of the comparisons: of two models, and of estimators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from reinforcepp.algorithm.estimators import ESTIMATORS
from reinforcepp.config.base import (
    Config,
    FilledStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Probability,
    Range,
    Seed,
    StepInterval,
    check_not_below_output,
    check_output_dir,
)
from reinforcepp.config.judge_spec import is_judge
from reinforcepp.config.reward_spec import parse_source, path_of_judge
from reinforcepp.config.shared import ColumnConfig, DeviceConfig, check_judge, judge_for
from reinforcepp.config.training import TrainConfig
from reinforcepp.errors import ConfigError, nearest

FEWEST_RESAMPLES = 100
"""With fewer, the ends of a 95% interval would be two or three of the resamples."""


@dataclass(frozen=True)
class CompareInputs(Config):
    """Models and data of a comparison."""

    model_a: FilledStr = "builtin:tiny"
    """Model A: builtin:tiny, a folder or a Hub name"""
    model_b: FilledStr = "runs/train"
    """Model B, whose win rate is reported"""
    data: FilledStr = "builtin:network"
    """Prompt file, or builtin:network; uses held-out prompts, or all if none"""
    judge: FilledStr = "auto"
    """Scores responses: builtin:judge, FOLDER, my.py:f, judge:MODEL?... or a rule"""
    reference: FilledStr | None = None
    """Reference model of the KL; default: model A"""


@dataclass(frozen=True)
class CompareConfig(DeviceConfig, ColumnConfig, CompareInputs):
    """Compare two models' responses to the same held-out prompts, with shared sampling seeds.

    The defaults sample as training does, not as generate does: the comparison is of the models' own distributions, and the
    mean of k3 is the KL only for these. Sampling only likely tokens would hide how the two models differ.
    """

    output_dir: str = "runs/compare"
    """Folder for compare.json, answers.jsonl and compare.html"""
    overwrite: bool = False
    """Replace the comparison in output_dir"""
    seed: Seed = 42
    """Seed of the split (use that of the training), sampling and intervals"""
    max_prompts: NonNegativeInt = 0
    """Number of held-out prompts, chosen at random; 0 uses all"""
    num_samples: PositiveInt = 1
    """Responses per prompt and model; the n-th of A is compared with the n-th of B"""
    max_prompt_length: PositiveInt | None = None
    """Most tokens of a formatted prompt. Default: what the context leaves"""
    max_new_tokens: PositiveInt = 384
    """Maximum length of a response, in tokens"""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 1 is the model's distribution, 0 greedy, generate uses 0.7"""
    top_p: Probability = 1.0
    """Sample from the likeliest tokens with this probability; KL needs 1"""
    top_k: NonNegativeInt = 0
    """Sample from this many likeliest tokens; 0 disables, KL needs 0"""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine; auto uses vLLM if it is installed and runs both models"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the weights; auto: the models' on a GPU, float32 on a CPU"""
    tie_margin: NonNegativeFloat = 0.0
    """Score difference up to which a comparison is a tie"""
    bootstrap_samples: Annotated[int, Range(at_least=FEWEST_RESAMPLES)] = 10_000
    """Bootstrap resamples of the prompts for the 95% intervals"""

    def _check_rules(self) -> None:
        check_output_dir(self.output_dir, self.overwrite)
        inputs = {name: getattr(self, name) for name in ("model_a", "model_b", "data", "reference")}
        for setting, value in (inputs | {"judge": path_of_judge(self.judge)}).items():
            if value is not None:
                check_not_below_output(self.output_dir, setting, value)
        if is_judge(self.judge):
            parse_source(self.judge)
        if judge_for(self.judge, self.data) is None:
            raise ConfigError(
                f"judge: missing, and {self.data} has no built-in judge. Give the folder of a reward model, as in --judge "
                "models/reward_model."
            )
        check_judge(self.judge, self.data, fix="Give the folder of a reward model")

    @property
    def judge_name(self) -> str:
        """The judge after resolving auto."""
        return str(judge_for(self.judge, self.data))


@dataclass(frozen=True)
class CompareAlgorithmsConfig(TrainConfig):
    """Train with each estimator on the same prompts, completions and steps, with several seeds, and compare the results."""

    output_dir: str = "runs/algorithms"
    """Folder for every run, comparison.json and comparison.html"""
    estimators: str = ",".join(ESTIMATORS)
    """Estimators, separated by commas; the setting estimator isn't used"""
    seeds: Annotated[int, Range(at_least=2)] = 5
    """Runs of each estimator, with the seeds seed, seed + 1, ..."""
    num_generations: PositiveInt = 4
    """Completions per prompt, for every estimator"""
    eval_every: StepInterval = 10
    """Steps between evaluations during training; 0 disables, -1: once per epoch"""
    sensitivity: bool = False
    """Also train with 1/3, 1 and 3x the learning rate and 4, 8 and 32 completions"""
    processes: PositiveInt = 1
    """Runs at a time, which share the CPU cores; compare times only with 1"""

    def _check_rules(self) -> None:
        if isinstance(self.resume, str):
            raise ConfigError(f"resume: {self.resume} is a path, but a comparison resumes output_dir. Omit the path.")
        if self.interleave_probs:
            raise ConfigError("interleave_probs: a comparison of estimators passes over all data. Omit the setting.")
        for name in self.names:
            if name not in ESTIMATORS:
                raise ConfigError(
                    f"estimators: {name!r} not found, only {', '.join(ESTIMATORS)}.{nearest(name, ESTIMATORS)}"
                )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"estimators: one is given twice ({self.estimators}). Remove it.")
        if self.num_generations < 2 and any(ESTIMATORS[name].grouped for name in self.names):
            raise ConfigError(
                f"num_generations: {self.num_generations} is too few for estimators that compare completions of one prompt. "
                "Set it to 2 or more."
            )

    @property
    def names(self) -> list[str]:
        """The estimators to compare."""
        return [name.strip() for name in self.estimators.split(",") if name.strip()]
