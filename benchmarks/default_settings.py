"""Our defaults next to those of TRL and OpenRLHF, for docs/defaults.md.

Ours and TRL's are read from the configuration classes, and TRL's are converted as a user's are. OpenRLHF's defaults of
``train_ppo_ray`` are those that ``reinforcepp migrate`` converts. The others are from the same commit, 3c3be623
(``openrlhf/cli/train_ppo_ray.py``, ``train_rm.py``, ``train_sft.py``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from reinforcepp.commands.migrate.reading import Training
from reinforcepp.commands.migrate.translation import METHODS, OPENRLHF_DEFAULTS, translate
from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config.aliases import aliases_of, translated
from reinforcepp.config.foreign_names import OPENRLHF as OPENRLHF_NAMES
from reinforcepp.config.shared import AdapterConfig
from reinforcepp.config.trl_unsupported import NEUTRAL, NO_EFFECT, SUPERVISED_NEUTRAL
from reinforcepp.config.values import accepted_values

PATHS = ("output_dir", "model", "data", "text_column", "reward_model", "rollout", "chat_template", "resume")
"""Settings whose default is a name or a place."""
IMPORTANCE = ("importance_correction", "importance_low", "importance_high")
"""Settings of TRL's mode and bounds of importance weights; its default mode has one weight per sequence."""
OPENRLHF_LORA = {"use_peft": False, "lora_alpha": 16, "lora_dropout": 0, "lora_target_modules": ["all-linear"]}
OPENRLHF_SUPERVISED = OPENRLHF_LORA | {
    "batch_size": 128,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}',
    "warmup_ratio": 0.03,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "mixed_precision": "bf16",
    "gradient_checkpointing": False,
    "attn_implementation": "flash_attention_2",
    "load_in_4bit": False,
    "save_every": 0,
    "keep_last": 3,
    "seed": 42,
}
OPENRLHF: Mapping[type, dict[str, Any]] = {
    # The conversion omits these defaults, because they depend on OpenRLHF's engines.
    ReinforceConfig: OPENRLHF_LORA
    | {
        "attn_implementation": "flash_attention_2",
        "importance_correction": "off",
        "importance_low": 0.5,
        "importance_high": 5.0,
        "rollout_batch_size": 1,
        "vllm_gpu_memory_utilization": 0.95,
    },
    RewardModelConfig: OPENRLHF_SUPERVISED
    | {
        "learning_rate": 9e-6,
        "num_train_epochs": 1,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 128,
        "max_length": 512,
        "eval_every": 0,
    },
    SftConfig: OPENRLHF_SUPERVISED
    | {
        "learning_rate": 5e-6,
        "num_train_epochs": 2,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 16,
        "max_length": 2048,
    },
}
"""OpenRLHF's defaults under our names."""

SHOWN: Mapping[str, str] = {
    "learning_rate": "by model size",
    "critic_learning_rate": "`learning_rate`",
    "keep_last": "1 until training ends",
    "max_length": "the model's context",
    "vllm_gpu_memory_utilization": "measured",
}
"""Our values of settings for which None is a rule."""
EVERY_TRAINING: Mapping[str, str] = {
    "learning_rate": "No rate fits every model size (`defaults.json`, [rates](best_practices.md)).",
    "save_every": "A killed run repeats at most 50 steps. It ends with the same weights (`kill.json`).",
    "keep_last": "A run resumes from its latest checkpoint. Each one has the size of weights and optimizer state.",
    "mixed_precision": "Each device computes in its faster dtype. Models below 10 million parameters gain little.",
    "gradient_checkpointing": "It takes up to a third more time. `plan` reports if memory requires it.",
    "lora_dropout": "Dropout changes the policy ratio in `train`, and all commands have the same default.",
    "lora_target_modules": "TRL's `none` works only for architectures that peft lists.",
}
REASONS: Mapping[type, Mapping[str, str]] = {
    ReinforceConfig: EVERY_TRAINING
    | {
        "estimator": "REINFORCE++ is the method of this project.",
        "micro_batch_size": "A pass has the rows that `max_tokens_per_micro_batch` allows. It changes time, not results.",
        "num_generations": "REINFORCE++ has one completion per prompt.",
        "batch_size": "A rollout batch has 8 completions, as in TRL. With one per prompt, these are 8 prompts.",
        "num_train_epochs": "Each pass samples new completions for all prompts, so 3 passes take 3 times as long.",
        "lr_scheduler_type": "The rate doesn't depend on the number of steps, so a run can be resumed with more.",
        "max_new_tokens": "`builtin:tiny`, the default model, has 512 tokens for prompt and completion.",
        "use_bias_correction_kl": "`none` is k2, with the same gradient on policy. See [KL of GRPO](trl_math.md).",
        "importance_correction": "`auto` corrects only engines with other log-probabilities, by one weight per token.",
        "importance_low": "With it, staleness 1 reaches the gold score of staleness 0 (`async.json`).",
        "importance_high": "With it, staleness 1 reaches the gold score of staleness 0 (`async.json`).",
        "kl_coef": "Measured in the demo and the comparison of estimators (`demo_seeds.json`, `algorithms.json`).",
        "disable_dropout": "With dropout, the policy ratio doesn't start at 1.",
        "logging_steps": "A step is a rollout batch, which can take minutes.",
        "log_completions": "`report` and the doctor read the completions.",
        "vllm_gpu_memory_utilization": "The trainer measures how much memory training leaves for vLLM.",
        "rollout_batch_size": "It changes memory, not results. vLLM on a GPU takes a whole step, up to 512.",
        "reward_clip": "REINFORCE++ standardizes the advantages. TRL doesn't clip rewards, either.",
        "gae_lambda": "`ppo` follows TRL's former `PPOConfig`.",
        "value_clip": "`ppo` follows TRL's former `PPOConfig`.",
        "critic_learning_rate": "`ppo` follows TRL's former `PPOConfig`.",
        "max_length": "Only the model limits the length.",
    },
    RewardModelConfig: EVERY_TRAINING
    | {
        "warmup_ratio": "At high rates, the largest loss is mostly lower with a warmup (`defaults.json`).",
        "center_rewards_coefficient": "Scores become rewards, which are added to others and to penalties, so 0 must be average.",
        "max_length": "Longer pairs are skipped, so a low limit would lose them. The limit is at most 4096.",
    },
    SftConfig: EVERY_TRAINING
    | {
        "warmup_ratio": "The default learning rates are measured with it (`defaults.json`).",
        "max_length": "Longer rows are skipped, so a low limit would lose them. The limit is at most 4096.",
    },
}
"""Why a default differs: required if it is that of no trainer of TRL, or not OpenRLHF's if TRL has none."""


class Row(NamedTuple):
    """A setting: our default, and that of each framework that has one, as text."""

    setting: str
    ours: str
    theirs: dict[str, str]

    @property
    def differs(self) -> bool:
        """Whether a framework has another default."""
        return any(value != self.ours for value in self.theirs.values())

    @property
    def needs_reason(self) -> bool:
        """Whether the default differs from those of all trainers of TRL, or from OpenRLHF's if TRL has none."""
        first = [value for name, value in self.theirs.items() if name.startswith("TRL")] or list(self.theirs.values())
        return self.ours not in first

    def reason(self, config_class: type) -> str:
        """Return why the default differs, or which framework it follows."""
        if not self.differs:
            return ""
        trl = [name for name in self.theirs if name.startswith("TRL")]
        same = [name for name in trl if self.theirs[name] == self.ours]
        return REASONS[config_class].get(self.setting) or f"As in {'TRL' if same == trl else ' and '.join(same)}."


def rows(config_class: type) -> Iterator[Row]:
    """Return every setting of ``config_class`` that TRL or OpenRLHF has, in the order of the class."""
    columns = {name: _converted(config_class, *classes) for name, classes in _trl_classes(config_class).items()}
    columns["OpenRLHF"] = dict(OPENRLHF[config_class])
    if config_class is ReinforceConfig:
        off = {OPENRLHF_NAMES[name].setting for name, value in OPENRLHF_DEFAULTS.items() if value is None}
        columns["OpenRLHF"] |= {name: None for name in off if getattr(config_class, str(name), 0) is None}
        columns["OpenRLHF"] |= translate(Training("openrlhf", {}, {})).settings
        columns["OpenRLHF"]["max_new_tokens"] = "2048 minus the prompt"
        for name in ("GRPO", "RLOO"):
            columns[f"TRL {name}"] |= METHODS[f"trl-{name.lower()}"]
    ours = _ours(config_class)
    for setting in accepted_values(config_class):
        theirs = {name: text(values[setting]) for name, values in columns.items() if setting in values}
        if theirs and setting not in PATHS:
            yield Row(setting, SHOWN.get(setting) or text(ours[setting]), theirs)


def _trl_classes(config_class: type) -> dict[str, tuple[type, ...]]:
    import trl

    return {
        ReinforceConfig: {"TRL GRPO": (trl.GRPOConfig, trl.ModelConfig), "TRL RLOO": (trl.RLOOConfig, trl.ModelConfig)},
        RewardModelConfig: {"TRL": (trl.RewardConfig, trl.ModelConfig)},
        SftConfig: {"TRL": (trl.SFTConfig, trl.ModelConfig)},
    }[config_class]


def _ours(config_class: Any) -> dict[str, Any]:
    config = config_class()
    size = getattr(config, "optimizer_batch_size", config.batch_size)
    micro = config.effective_micro_batch_size
    values = {name: getattr(config, name) for name in accepted_values(config_class)}
    values |= {"micro_batch_size": micro, "gradient_accumulation_steps": size // micro}
    if config_class is ReinforceConfig:
        values |= {"micro_batch_size": "by tokens", "rollout_batch_size": config.effective_rollout_batch_size}
        values["scale_rewards"] = "group"  # of grpo, whose setting it is
    return values


def _converted(config_class: type, trl_class: type, model_class: type) -> dict[str, Any]:
    """Return the defaults of TRL's classes under our names."""
    prefix = "vllm_importance_sampling_"
    shared = {setting.name for setting in dataclasses.fields(AdapterConfig)} | {"attn_implementation"}
    known = accepted_values(config_class)
    unused = {*NO_EFFECT, *NEUTRAL, *SUPERVISED_NEUTRAL} - known.keys()
    given = {
        setting.name: setting.default
        for source in (trl_class, model_class)
        for setting in dataclasses.fields(source)
        if setting.name not in unused
        and (source is trl_class or setting.name in shared)
        and (setting.name in known or (setting.name in aliases_of(config_class) and setting.default is not None))
    }
    weights = {name: given.pop(prefix + name, None) for name in ("mode", "clip_min", "clip_max")}
    for name in [name for name in given if name.startswith(prefix)]:
        del given[name]
    # TRL sets bf16 if fp16 isn't given, and transformers chooses the implementation of attention.
    values = _off(config_class, trl_class)
    values |= translated(config_class, given | {"bf16": True, "attn_implementation": "auto"})[0]
    if weights["mode"] is not None:
        values |= dict(zip(IMPORTANCE, weights.values(), strict=True))
    return values | {"warmup_ratio": values["warmup_steps"], "keep_last": "all"}


def _off(config_class: type, trl_class: Any) -> dict[str, Any]:
    """Return our names of TRL's settings that are None, if there is one name for each."""
    renames = {name: rule for name, rule in aliases_of(config_class).items() if rule.names[name] is None}
    none = (setting.name for setting in dataclasses.fields(trl_class) if setting.default is None)
    return {renames[name].settings[0]: None for name in none if name in renames}


def text(value: Any) -> str:
    """Return a default as text; what leaves a setting off is the same for all."""
    if value is None or value in ((), [], "none", ["none"]):
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float | int):
        return f"{value:g}"
    if isinstance(value, dict):
        return json.dumps(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
