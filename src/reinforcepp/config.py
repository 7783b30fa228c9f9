"""Every setting of every verb: frozen dataclasses that check themselves. Loads no torch.

The text under a field is its one description: ``--help`` shows it. A value that is out of range or contradicts
another one is a ``ConfigError`` that names the cure; nothing here changes what a user has set.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from reinforcepp.errors import ConfigError, nearest

DEFAULT_MICRO_BATCH = 8
SEEDS = 2**32  # what the random generators of all libraries take


def _positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be greater than 0, not {value}.")


def _not_negative(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} must not be negative, but is {value}.")


def _fraction(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, not {value}.")


def _check_numbers(config: Any) -> None:
    for name, value in asdict(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be a finite number, not {value}.")
    if not 0 <= config.seed < SEEDS:
        raise ConfigError(f"seed must be from 0 to {SEEDS - 1}, not {config.seed}.")


def _filled(config: Any, *names: str) -> None:
    for name in names:
        if not getattr(config, name).strip():
            raise ConfigError(f"{name} is empty: leave it out for its default, or give a name.")


def _check_apart(config: Any, *names: str) -> None:
    """Nothing that a run starts from may lie in the folder that it writes, and with overwrite clears."""
    output = Path(config.output_dir).expanduser().resolve()
    for name in names:
        source = Path(getattr(config, name)).expanduser().resolve()
        if output in (source, *source.parents):
            raise ConfigError(
                f"output_dir {config.output_dir} holds the {name} {getattr(config, name)} that the run starts from: "
                "give another output_dir."
            )


def _check_sampling(config: Any) -> None:
    _positive(config, "max_new_tokens", "max_prompt_length", "repetition_penalty")
    _not_negative(config, "top_k", "temperature")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {config.top_p}.")


def _check_output(config: Any) -> None:
    _filled(config, "output_dir")
    if config.overwrite and getattr(config, "resume", False):
        raise ConfigError("overwrite and resume contradict each other: give one of the two.")


@dataclass(frozen=True)
class Columns:
    """Names of the data file's columns."""

    prompt_column: str = "prompt"
    """Column with the prompt."""
    chosen_column: str = "chosen"
    """Column with the preferred answer."""
    rejected_column: str = "rejected"
    """Column with the answer that was not preferred."""
    heldout_fraction: float = 0.1
    """Share of the prompts kept out of training and used for the figures; built-in data brings its own split."""


@dataclass(frozen=True)
class ReinforceConfig:
    """Settings of REINFORCE++ training."""

    output_dir: str = "runs/train"
    """Folder for the trained model, the metrics and the checkpoints."""
    seed: int = 42
    """Decides the order of the prompts and every sampled token."""

    batch_size: int = 8
    """Prompts per training step; the last batch of an epoch may be shorter."""
    num_generations: int = 1
    """Completions sampled per prompt; the estimator reinforce_plus_plus_baseline needs at least 2."""
    mini_batch_size: int | None = None
    """Completions per forward and backward pass; less needs less memory and changes nothing else. Default: 8."""
    gradient_accumulation_steps: int | None = None
    """Mini-batches per optimiser step. Default: as many as there are, so one optimiser step per rollout batch."""
    num_iterations: int = 1
    """How often each rollout batch is trained on."""
    num_train_epochs: int = 1
    """Passes over the prompts."""
    max_steps: int = 0
    """Training steps (rollout batches); 0 follows num_train_epochs."""

    max_length: int = 512
    """Limit for prompt and completion together, in tokens."""
    max_prompt_length: int = 128
    """Limit for the framed prompt, in tokens."""
    max_new_tokens: int = 384
    """Limit for a completion, in tokens."""
    long_prompts: Literal["cut", "drop"] = "cut"
    """What happens to a prompt over the limit: its text is cut from the left, or it is left out. Either is reported."""

    estimator: Literal["reinforce_plus_plus", "reinforce_plus_plus_baseline"] = "reinforce_plus_plus"
    """How advantages are estimated."""
    kl_coef: float = 0.1
    """Weight of the KL to the reference policy; higher keeps the policy closer to where it started."""
    gamma: float = 1.0
    """Discount per token."""
    clip_low: float = 0.2
    """How far below 1 the policy ratio counts; matters only with several optimiser steps per batch."""
    clip_high: float = 0.2
    """How far above 1 the policy ratio counts."""
    dual_clip: float | None = None
    """Bound on the loss of tokens with a negative advantage, in multiples of it; off by default."""
    reward_clip: float | None = None
    """Rewards are cut to plus or minus this before anything else; off by default."""
    normalize_over: Literal["tokens", "sequences"] = "tokens"
    """Population of the advantage normalisation: every token (the paper's code) or every sequence once."""

    learning_rate: float = 1e-5
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate rises to its peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    temperature: float = 1.0
    """Sampling temperature of rollouts, also applied to every log-probability in training."""
    top_p: float = 1.0
    """Nucleus sampling of rollouts. Anything but 1 biases the policy ratio, so training samples the full distribution."""
    top_k: int = 0
    """Top-k sampling of rollouts; 0 is off. Anything else biases the policy ratio."""
    rollout: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that generates the rollouts; auto takes vLLM on a GPU where it can run the model, else transformers."""
    rollout_batch_size: int = 64
    """Completions the transformers engine generates at a time; memory grows with it, results don't change."""
    importance_correction: Literal["auto", "tis", "icepop", "off"] = "auto"
    """Correction for an engine whose log-probabilities differ from the trainer's; auto is tis for vLLM, else off."""
    importance_low: float = 0.5
    """Lower bound of the importance weight."""
    importance_high: float = 2.0
    """Upper bound of the importance weight."""
    sync_check_every: int = 50
    """Steps between checks that the rollout engine really holds the trainer's weights; the first sync is always checked."""
    vllm_gpu_memory_utilization: float | None = None
    """Share of the GPU's memory for vLLM; measured by default."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes in bfloat16; weights, optimiser, log-probabilities and reductions stay float32."""
    eval_prompts: int = 64
    """Held-out prompts answered before and after training; 0 skips the comparison."""
    save_every: int = 0
    """Steps between checkpoints; 0 keeps only the one written at an interruption."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        _check_numbers(self)
        _check_output(self)
        _check_sampling_for_training(self)
        _positive(self, "batch_size", "num_generations", "mini_batch_size", "gradient_accumulation_steps")
        _positive(self, "num_iterations", "num_train_epochs", "max_length", "clip_low", "clip_high", "reward_clip")
        _positive(self, "learning_rate", "max_grad_norm", "rollout_batch_size", "importance_low", "sync_check_every")
        _not_negative(
            self, "max_steps", "kl_coef", "gamma", "warmup_steps", "weight_decay", "eval_prompts", "save_every"
        )
        if self.gamma > 1:
            raise ConfigError(f"gamma must be at most 1, not {self.gamma}.")
        if self.clip_low >= 1:
            raise ConfigError(f"clip_low must be below 1, not {self.clip_low}.")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError(f"dual_clip must be greater than 1, not {self.dual_clip}.")
        if self.vllm_gpu_memory_utilization is not None and not 0 < self.vllm_gpu_memory_utilization <= 1:
            raise ConfigError(
                f"vllm_gpu_memory_utilization must be above 0 and at most 1, not {self.vllm_gpu_memory_utilization}."
            )
        if self.importance_high < self.importance_low:
            raise ConfigError(f"importance_high {self.importance_high} is below importance_low {self.importance_low}.")
        if self.max_prompt_length + self.max_new_tokens > self.max_length:
            raise ConfigError(
                f"max_prompt_length {self.max_prompt_length} + max_new_tokens {self.max_new_tokens} exceed max_length "
                f"{self.max_length}: lower one of the two or raise max_length."
            )
        if self.estimator == "reinforce_plus_plus_baseline" and self.num_generations < 2:
            raise ConfigError(
                "The estimator reinforce_plus_plus_baseline compares samples of one prompt: set num_generations to 2 or "
                "more, or use the estimator reinforce_plus_plus."
            )
        if self.estimator == "reinforce_plus_plus_baseline" and self.gamma != 1:
            raise ConfigError("The estimator reinforce_plus_plus_baseline needs gamma 1.")
        if self.optimizer_batch_size > self.completions_per_step:
            raise ConfigError(
                f"mini_batch_size {self.micro_batch_size} x gradient_accumulation_steps {self.gradient_accumulation_steps} "
                f"is {self.optimizer_batch_size} completions per optimiser step, but a rollout batch holds only "
                f"{self.completions_per_step} (batch_size x num_generations): lower them or raise batch_size."
            )

    @property
    def completions_per_step(self) -> int:
        """Completions in a full rollout batch."""
        return self.batch_size * self.num_generations

    @property
    def micro_batch_size(self) -> int:
        """Completions per forward and backward pass."""
        return self.mini_batch_size or min(DEFAULT_MICRO_BATCH, self.completions_per_step)

    @property
    def optimizer_batch_size(self) -> int:
        """Completions per optimiser step."""
        if self.gradient_accumulation_steps is None:
            return self.completions_per_step
        return self.micro_batch_size * self.gradient_accumulation_steps

    @property
    def kl_in_reward(self) -> float:
        """Weight of the k1 KL in the token rewards; the baseline estimator has it in the loss instead."""
        return self.kl_coef if self.estimator == "reinforce_plus_plus" else 0.0

    @property
    def kl_in_loss(self) -> float:
        """Weight of the k2 KL in the loss."""
        return self.kl_coef - self.kl_in_reward


def _check_sampling_for_training(config: ReinforceConfig) -> None:
    _positive(config, "temperature", "max_new_tokens", "max_prompt_length")
    _not_negative(config, "top_k")
    if not 0 < config.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, not {config.top_p}.")


@dataclass(frozen=True)
class TrainInputs:
    """What a training starts from."""

    model: str = "builtin:tiny"
    """Policy to start from, also the reference: builtin:tiny, a folder or a hub name."""
    data: str = "builtin:network"
    """CSV file with prompts, or builtin:network."""
    reward_model: str = "models/reward_model"
    """Folder that the reward verb wrote."""


@dataclass(frozen=True)
class TrainConfig(ReinforceConfig, Columns, TrainInputs):
    """Train a policy against a reward model with REINFORCE++."""

    def __post_init__(self) -> None:
        """Check what training adds to the algorithm's settings."""
        super().__post_init__()
        _fraction(self, "heldout_fraction")
        _filled(self, "model", "data", "reward_model")
        _check_apart(self, "model", "data", "reward_model")


@dataclass(frozen=True)
class RewardInputs:
    """What a reward model starts from."""

    model: str = "builtin:tiny"
    """Language model that gets the scoring head: builtin:tiny, a folder or a hub name."""
    data: str = "builtin:network"
    """CSV file with prompt, chosen and rejected answers, or builtin:network."""


@dataclass(frozen=True)
class RewardModelConfig(Columns, RewardInputs):
    """Train a reward model from a preference file."""

    output_dir: str = "models/reward_model"
    """Folder for the reward model and its card."""
    seed: int = 42
    """Decides the split, the order of the pairs and the fresh head."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW; falls linearly to 0."""
    num_train_epochs: int = 3
    """Passes over the training pairs."""
    batch_size: int = 8
    """Pairs per optimiser step."""
    mini_batch_size: int | None = None
    """Pairs per forward and backward pass; needs to divide batch_size. Default: the whole batch."""
    gradient_accumulation_steps: int | None = None
    """Mini-batches per optimiser step; together with mini_batch_size it gives batch_size."""
    max_length: int = 512
    """Pairs with a longer framed answer, in tokens, are left out and counted."""
    center_rewards_coefficient: float = 0.01
    """Weight of the penalty that keeps scores centred on 0."""
    overwrite: bool = False
    """Replace the reward model that output_dir holds."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        _check_numbers(self)
        _check_output(self)
        _positive(self, "learning_rate", "num_train_epochs", "batch_size", "mini_batch_size", "max_length")
        _positive(self, "gradient_accumulation_steps")
        _not_negative(self, "center_rewards_coefficient")
        _fraction(self, "heldout_fraction")
        _filled(self, "model", "data")
        _check_apart(self, "model", "data")
        if self.micro_batch_size * self.accumulation != self.batch_size:
            raise ConfigError(
                f"mini_batch_size {self.micro_batch_size} x gradient_accumulation_steps {self.accumulation} is not "
                f"batch_size {self.batch_size}: leave one of the three out, or make them agree."
            )

    @property
    def micro_batch_size(self) -> int:
        """Pairs per forward and backward pass."""
        return self.mini_batch_size or max(1, self.batch_size // (self.gradient_accumulation_steps or 1))

    @property
    def accumulation(self) -> int:
        """Mini-batches per optimiser step."""
        return self.gradient_accumulation_steps or max(1, self.batch_size // self.micro_batch_size)


@dataclass(frozen=True)
class GenerateConfig:
    """Answer prompts with a trained model."""

    model: str = "builtin:tiny"
    """Model that answers: builtin:tiny, a folder or a hub name."""
    prompt: str | None = None
    """The prompt; without it and prompts_file, prompts are read from standard input, one per line."""
    prompts_file: str | None = None
    """Text file with one prompt per line."""
    num_samples: int = 1
    """Answers per prompt."""
    max_prompt_length: int = 128
    """Limit for the framed prompt, in tokens."""
    max_new_tokens: int = 384
    """Limit for an answer, in tokens."""
    temperature: float = 0.7
    """0 always takes the likeliest token, 1 samples the model's own distribution."""
    top_p: float = 0.9
    """Sample only from the likeliest tokens that make up this probability."""
    top_k: int = 50
    """Sample only from this many likeliest tokens; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that already occurred less likely."""
    seed: int = 42
    """The same seed gives the same answers."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """Engine that generates; auto takes vLLM for many prompts where it can run the model, else transformers."""
    output: str | None = None
    """File for the answers as JSON lines (prompt, completion, finish_reason); default: text on the terminal."""

    def __post_init__(self) -> None:
        """Check each value, then what they mean together."""
        _check_numbers(self)
        _filled(self, "model")
        _check_sampling(self)
        _positive(self, "num_samples")
        if self.prompt is not None and self.prompts_file is not None:
            raise ConfigError("prompt and prompts_file contradict each other: give one of the two.")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError("prompt is empty: give the text to answer.")
        if self.output is not None and self.output == self.prompts_file:
            raise ConfigError(f"output and prompts_file are both {self.output}: give output another name.")


@dataclass(frozen=True)
class DemoConfig:
    """Run the whole job offline on the built-in model and data: reward model, REINFORCE++, generation, comparison."""

    output_dir: str = "runs/demo"
    """Folder for everything the demo writes."""
    seed: int = 0
    """Seed of the reward model and of the training."""
    max_steps: int = 40
    """Training steps of 64 completions."""
    rollout: Literal["auto", "transformers", "vllm"] = "transformers"
    """Engine that generates the rollouts."""
    overwrite: bool = False
    """Replace an earlier demo in output_dir."""

    def __post_init__(self) -> None:
        """Check each value."""
        _check_numbers(self)
        _check_output(self)
        _positive(self, "max_steps")


VERBS: dict[str, type] = {
    "reward": RewardModelConfig,
    "train": TrainConfig,
    "generate": GenerateConfig,
    "demo": DemoConfig,
}


def read_yaml(path: str, config_class: type) -> dict[str, Any]:
    """Settings of a YAML file, each a field of ``config_class``.

    Raises:
        ConfigError: for a file that is missing, isn't a mapping, holds an unknown key (the nearest is suggested), or
            more or less than one plain value under a key.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"There is no configuration file {path}.") from None
    except OSError as error:
        raise ConfigError(f"The configuration file {path} can't be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} can't be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as 'name: value' lines.")
    defaults = {field.name: field.default for field in fields(config_class)}
    for key, value in values.items():
        if key not in defaults:
            raise ConfigError(f"{path}: there is no setting {key!r}.{nearest(str(key), defaults)}")
        _check_yaml_value(f"{path}: {key}", value, defaults[key])
    return values


def _check_yaml_value(where: str, value: Any, default: Any) -> None:
    if value is None and default is not None:
        raise ConfigError(f"{where} has no value: give one, or remove the line for the default.")
    if value is not None and not isinstance(value, (str, int, float)):
        raise ConfigError(f"{where} must be a single value, not {value!r}.")
    if isinstance(default, bool) != isinstance(value, bool):
        kind = "true or false" if isinstance(default, bool) else "a value of its own"
        raise ConfigError(f"{where} must be {kind}, not {value!r}.")


def as_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, for JSON and for display."""
    return asdict(config)
