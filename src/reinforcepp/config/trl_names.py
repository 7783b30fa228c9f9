"""The settings of TRL (GRPOConfig, RLOOConfig, RewardConfig, SFTConfig) and transformers that have another name here.

A name that both have isn't listed, if it means the same. Source: TRL 1.16, transformers 5.19.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal

from reinforcepp.config import trl_conversions as conversions
from reinforcepp.config.trl_conversions import Context, print_once
from reinforcepp.config.trl_unsupported import (
    NEUTRAL,
    NO_EFFECT,
    SUPERVISED_NEUTRAL,
    JsonText,
    Neutral,
)
from reinforcepp.errors import ConfigError
from reinforcepp.run_dir import RENAMED_SETTINGS
from reinforcepp.runtime.process import is_main, started
from reinforcepp.runtime.redaction import without_secrets

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Rule:
    """How some of TRL's settings become ours.

    Attributes:
        names: Type of the values by TRL's name; None is the type of our setting.
        settings: Our settings that the rule gives.
        convert: Returns our settings from the given values, which have the right type.
        mapping: The conversion as a formula, for messages and documentation.
        reads: TRL's value by its name, from a configuration.
        shared: Names of settings that TRL and we have, and that this rule converts.
        needs: Attributes of a configuration class that accepts the names.
    """

    names: Mapping[str, Any]
    settings: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], Context], dict[str, Any]]
    mapping: str
    reads: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("TRAINING",)


def _rename(name: str, setting: str, mapping: str = "") -> Rule:
    return Rule(
        names={name: None},
        settings=(setting,),
        convert=lambda given, _: {setting: given[name]},
        mapping=mapping or f"{name} is another name of {setting}",
        reads={name: attrgetter(setting)},
        needs=(),
    )


def _no_effect(name: str, kind: Any, reason: str) -> Rule:
    def convert(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
        print_once(f"{name} has no effect here, because {reason}.")
        return {}

    return Rule(
        names={name: kind},
        settings=(),
        convert=convert,
        mapping=f"no effect, because {reason}",
        reads={name: READ_ONLY.get(name, lambda config: _default_of_transformers(name))},
    )


def _default_of_transformers(name: str) -> Any:
    from transformers import TrainingArguments

    return getattr(TrainingArguments, name, None)


def _only(name: str, neutral: Neutral, *needs: str) -> Rule:
    def convert(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
        if given[name] not in neutral.values:
            value = "a value" if neutral.secret else repr(given[name])
            raise ConfigError(f"{name}: {value} isn't supported. {neutral.fix}")
        return {}

    values = " or ".join(["None", *map(repr, neutral.values)])
    return Rule(
        names={name: neutral.kind},
        settings=(),
        convert=convert,
        mapping=f"only {values}. {neutral.fix}",
        reads={name: lambda config: neutral.values[0] if neutral.values else None},
        needs=("TRAINING", *needs),
    )


# --- attributes -------------------------------------------------------------------------------------------------------


def _device() -> torch.device:
    import torch

    on_gpu = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0)) if on_gpu else torch.device("cpu")


READ_ONLY: Mapping[str, Callable[[Any], Any]] = {
    "load_best_model_at_end": lambda config: False,
    "eval_strategy": lambda config: "no",
    "do_eval": lambda config: bool(getattr(config, "eval_every", 0)),
    "train_batch_size": attrgetter("effective_micro_batch_size"),
    "eval_batch_size": attrgetter("per_device_eval_batch_size"),
    "device": lambda config: _device(),
    "n_gpu": lambda config: int(_device().type == "cuda"),
    "world_size": lambda config: started(),
    "process_index": lambda config: int(os.environ.get("RANK") or 0),
    "local_process_index": lambda config: int(os.environ.get("LOCAL_RANK") or 0),
    "should_save": lambda config: is_main(),
    "should_log": lambda config: is_main(),
    "disable_tqdm": lambda config: not sys.stderr.isatty(),
    "project": lambda config: "reinforcepp",
    "to_dict": lambda config: lambda: without_secrets(asdict(config)),
    "to_sanitized_dict": lambda config: lambda: without_secrets(asdict(config)),
    "to_json_string": lambda config: lambda: json.dumps(without_secrets(asdict(config)), indent=2),
}
"""Attributes that callbacks of transformers read, for configurations that have no such setting."""


# --- the table --------------------------------------------------------------------------------------------------------

RULES: tuple[Rule, ...] = (
    *(_rename(old, new, f"{old} is the old name of {new}") for old, new in RENAMED_SETTINGS.items()),
    _rename("beta", "kl_coef"),
    _rename("max_completion_length", "max_new_tokens"),
    _rename("delta", "dual_clip"),
    _rename("chat_template_path", "chat_template"),
    _rename("save_total_limit", "keep_last"),
    _rename("dataset_text_field", "text_column"),
    _rename("resume_from_checkpoint", "resume"),
    Rule(
        names={"device": str},
        settings=("use_cpu",),
        convert=conversions.use_cpu,
        mapping="device cpu is use_cpu",
        needs=(),
    ),
    Rule(
        names={"epsilon": float, "epsilon_high": float},
        settings=("clip_low", "clip_high"),
        convert=conversions.clipping,
        mapping="epsilon is clip_low and clip_high, and epsilon_high is clip_high",
        reads={"epsilon": attrgetter("clip_low"), "epsilon_high": attrgetter("clip_high")},
    ),
    Rule(
        names={"bf16": bool, "fp16": bool},
        settings=("mixed_precision",),
        convert=conversions.precision,
        mapping="bf16=True is mixed_precision bf16, and fp16=True is mixed_precision fp16",
        reads={
            "bf16": lambda config: config.mixed_precision == "bf16",
            "fp16": lambda config: config.mixed_precision == "fp16",
        },
    ),
    Rule(
        names={"per_device_train_batch_size": int, "steps_per_generation": int, "generation_batch_size": int},
        settings=("batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        convert=conversions.batch,
        mapping=(
            "batch_size (prompts) is per_device_train_batch_size x processes x steps_per_generation / num_generations, and "
            "micro_batch_size is per_device_train_batch_size"
        ),
        reads={
            "per_device_train_batch_size": attrgetter("effective_micro_batch_size"),
            "generation_batch_size": attrgetter("completions_per_step"),
            "steps_per_generation": lambda config: (
                config.completions_per_step // (config.effective_micro_batch_size * started())
            ),
        },
        shared=("gradient_accumulation_steps",),
    ),
    Rule(
        names={},
        settings=("max_steps",),
        convert=conversions.max_steps,
        mapping="max_steps counts rollout batches, or optimizer steps if the batch has TRL's names",
        shared=("max_steps",),
    ),
    Rule(
        names={},
        settings=("logging_steps",),
        convert=conversions.logging_steps,
        mapping="logging_steps counts rollout batches, or optimizer steps if the batch has TRL's names",
        shared=("logging_steps",),
        needs=("updates_per_step",),
    ),
    Rule(
        names={"save_steps": float, "save_strategy": Literal["no", "steps", "epoch", "best"]},
        settings=("save_every",),
        convert=conversions.saving,
        mapping="save_every is save_steps, counted in rollout batches; 0 for no and -1 for epoch",
        reads={"save_steps": attrgetter("save_every"), "save_strategy": conversions.strategy("save_every")},
    ),
    Rule(
        names={"eval_steps": float, "eval_strategy": Literal["no", "steps", "epoch"]},
        settings=("eval_every",),
        convert=conversions.evaluating,
        mapping="eval_every is eval_steps, counted in rollout batches; 0 for no and -1 for epoch",
        reads={"eval_steps": attrgetter("eval_every"), "eval_strategy": conversions.strategy("eval_every")},
    ),
    Rule(
        names={"metric_for_best_model": str, "greater_is_better": bool},
        settings=("keep_best",),
        convert=conversions.best,
        mapping="keep_best is metric_for_best_model with eval_, and with a minus if lower is better",
        reads={
            "metric_for_best_model": lambda config: config.keep_best and config.keep_best.removeprefix("-"),
            "greater_is_better": lambda config: not (config.keep_best or "").startswith("-"),
        },
    ),
    Rule(
        names={"model_init_kwargs": JsonText},
        settings=("mixed_precision", "attn_implementation"),
        convert=conversions.model_init,
        mapping="dtype is mixed_precision, and attn_implementation has the same name",
    ),
    Rule(
        names={
            "use_vllm": bool,
            "vllm_mode": Literal["colocate", "server"],
            "vllm_server_base_url": str,
            "vllm_server_host": str,
            "vllm_server_port": int,
        },
        settings=("rollout",),
        convert=conversions.engine,
        mapping="rollout is transformers, vllm (vllm_mode colocate) or vllm://HOST:PORT (vllm_mode server)",
        reads={
            "use_vllm": lambda config: config.rollout.startswith("vllm"),
            "vllm_mode": lambda config: "server" if "://" in config.rollout else "colocate",
        },
    ),
    Rule(
        names={
            "vllm_importance_sampling_correction": bool,
            "vllm_importance_sampling_mode": Literal[
                "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
            ],
            "vllm_importance_sampling_clip_min": float,
            "vllm_importance_sampling_clip_max": float | None,
            "vllm_importance_sampling_cap": float,
        },
        settings=("importance_correction", "importance_low", "importance_high"),
        convert=conversions.importance,
        mapping=(
            "importance_correction is off, tis (token_truncate), icepop (token_mask), sequence_truncate or sequence_mask, "
            "importance_low is clip_min, and importance_high is clip_max"
        ),
        reads={
            "vllm_importance_sampling_clip_min": attrgetter("importance_low"),
            "vllm_importance_sampling_clip_max": attrgetter("importance_high"),
        },
    ),
    Rule(
        names={"max_tool_calling_iterations": int | None},
        settings=("max_turns",),
        convert=conversions.turns,
        mapping="max_turns is one more, because it counts the answer, too",
        reads={"max_tool_calling_iterations": lambda config: config.max_turns - 1},
    ),
    *(_only(name, neutral) for name, neutral in NEUTRAL.items()),
    *(_only(name, neutral, "accumulation") for name, neutral in SUPERVISED_NEUTRAL.items()),
    *(_no_effect(name, kind, reason) for name, (kind, reason) in NO_EFFECT.items()),
)
"""Rules in the order in which they are applied: batches before steps, which are counted in batches."""

VALUES: Mapping[str, Callable[[Any], Any]] = {
    "max_steps": lambda steps: 0 if steps in (-1, "-1") else steps,
    "top_k": lambda count: 0 if count in (None, -1, "-1") else count,
    "scale_rewards": lambda scale: {"true": "group", "false": "none"}.get(str(scale).lower(), scale),
}
"""Conversions of values that only TRL has, for settings with the same name."""
