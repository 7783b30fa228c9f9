"""The settings of TRL (GRPOConfig, RLOOConfig, RewardConfig, SFTConfig) and transformers that have another name here.

A name that both have isn't listed, if it means the same. Source: TRL 1.16, transformers 5.19.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Literal

from reinforcepp.errors import ConfigError
from reinforcepp.run_dir import RENAMED_SETTINGS
from reinforcepp.runtime import is_main, started

TRL_DEVICE_BATCH = 8
"""Default of per_device_train_batch_size in transformers."""
TRL_LOGGING_STEPS = 10
"""Default of logging_steps in TRL, which eval_strategy="steps" uses if eval_steps isn't given."""


@dataclass(frozen=True)
class Context:
    """What a rule can know about the other settings.

    Attributes:
        view: All settings so far, as attributes of an unchecked configuration.
        explicit: Names of our settings that the user gave.
        trl_batch: Whether the batch is given by TRL's names, so that steps of all settings are optimizer steps.
        replaced: Whether ``dataclasses.replace`` gives the values, so that every setting has one.
    """

    view: Any
    explicit: frozenset[str]
    trl_batch: bool
    replaced: bool


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
    """

    names: Mapping[str, Any]
    settings: tuple[str, ...]
    convert: Callable[[Mapping[str, Any], Context], dict[str, Any]]
    mapping: str
    reads: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    shared: tuple[str, ...] = ()


def _rename(name: str, setting: str, mapping: str = "") -> Rule:
    return Rule(
        names={name: None},
        settings=(setting,),
        convert=lambda given, _: {setting: given[name]},
        mapping=mapping or f"{name} is another name of {setting}",
        reads={name: attrgetter(setting)},
    )


# --- batches and steps ------------------------------------------------------------------------------------------------


def _batch(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Apply TRL's arithmetic of batches.

    One generation batch of TRL is one rollout batch here. ``micro_batch_size`` is per process, as TRL's device batch is, but
    ``gradient_accumulation_steps`` counts the micro-batches of all processes.
    """
    if context.replaced:
        raise ConfigError(
            f"{next(iter(given))}: dataclasses.replace can't change batches by TRL's names, because the new sizes follow from "
            "all of them. Change batch_size, micro_batch_size and gradient_accumulation_steps instead."
        )
    device_batch = given.get("per_device_train_batch_size", TRL_DEVICE_BATCH)
    accumulation = given.get("gradient_accumulation_steps") or 1
    micro = device_batch * started()
    generations = getattr(context.view, "num_generations", None)
    for name, value in given.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, not {value}.")
    if generations is None:
        if len(given.keys() & {"steps_per_generation", "generation_batch_size"}):
            raise ConfigError(
                "steps_per_generation and generation_batch_size are settings of policy training. Omit them."
            )
        return {
            "batch_size": micro * accumulation,
            "micro_batch_size": device_batch,
            "gradient_accumulation_steps": accumulation * started(),
        }
    if {"steps_per_generation", "generation_batch_size"} <= given.keys():
        raise ConfigError(
            "generation_batch_size and steps_per_generation: both are given, but each determines the other. Remove one."
        )
    size = given.get("generation_batch_size", micro * given.get("steps_per_generation", accumulation))
    product = f"per_device_train_batch_size {device_batch} x {started()} processes"
    if size % micro:
        raise ConfigError(
            f"generation_batch_size: {size} isn't a multiple of {micro} ({product}). Change one of them, or give batch_size "
            "(prompts per rollout batch) and micro_batch_size instead."
        )
    steps = size // micro
    if size % generations:
        raise ConfigError(
            f"generation_batch_size: {size} completions ({product} x steps_per_generation {steps}) aren't a multiple of "
            f"num_generations {generations}, so the last prompt would have fewer completions. Change one of them, or give "
            "batch_size (prompts per rollout batch) and micro_batch_size instead."
        )
    if steps % accumulation:
        raise ConfigError(
            f"steps_per_generation: {steps} isn't a multiple of gradient_accumulation_steps {accumulation}, so an optimizer "
            "step would span two generation batches, but here it belongs to one rollout batch. Raise steps_per_generation or "
            "lower gradient_accumulation_steps."
        )
    return {
        "batch_size": size // generations,
        "micro_batch_size": device_batch,
        "gradient_accumulation_steps": accumulation * started(),
    }


def _device_accumulation(config: Any) -> int:
    """Return TRL's gradient_accumulation_steps: micro-batches of one process per optimizer step."""
    size = getattr(config, "optimizer_batch_size", config.batch_size)
    return max(1, size // (config.effective_micro_batch_size * started()))


def _in_batches(name: str, steps: float, context: Context) -> int:
    """Return a number of optimizer steps as rollout batches; for SFT and reward models, both are the same."""
    if 0 < steps < 1 or not float(steps).is_integer():
        raise ConfigError(f"{name}: {steps} is a fraction of all steps, which isn't supported. Give a number of steps.")
    updates = getattr(context.view, "updates_per_step", 1)
    if steps % updates:
        raise ConfigError(
            f"{name}: {int(steps)} isn't a multiple of {updates}. TRL counts optimizer steps, and each rollout batch has "
            f"{updates} of them (num_iterations x steps_per_generation / gradient_accumulation_steps). Give a multiple of "
            f"{updates}, or count rollout batches: {BATCH_COUNTED.get(name, name)}."
        )
    return int(steps) // updates


BATCH_COUNTED = {"save_steps": "save_every", "eval_steps": "eval_every", "max_steps": "max_steps with batch_size"}


def _saving(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    strategy = given.get("save_strategy", "steps")
    if strategy == "no":
        return {"save_every": 0}
    if strategy != "steps":
        raise ConfigError(
            f"save_strategy: {strategy!r} isn't supported. Give save_every, a number of steps, and keep_best METRIC for the best."
        )
    return {"save_every": _in_batches("save_steps", given["save_steps"], context)} if "save_steps" in given else {}


def _evaluating(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    strategy = given.get("eval_strategy", "steps")
    if strategy == "no":
        return {"eval_every": 0}
    if strategy != "steps":
        raise ConfigError(f"eval_strategy: {strategy!r} isn't supported. Give eval_every, a number of steps.")
    return {"eval_every": _in_batches("eval_steps", given.get("eval_steps", TRL_LOGGING_STEPS), context)}


def _max_steps(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    steps = int(given["max_steps"])
    return {"max_steps": _in_batches("max_steps", steps, context) if steps > 0 else steps}


def _strategy(setting: str) -> Callable[[Any], str]:
    return lambda config: "steps" if getattr(config, setting) else "no"


def _best(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    name = given.get("metric_for_best_model")
    if name is None:
        raise ConfigError("greater_is_better: which metric? Give metric_for_best_model.")
    metric = name if name.startswith("eval_") else f"eval_{name}"
    return {"keep_best": metric if given.get("greater_is_better", not name.endswith("loss")) else f"-{metric}"}


# --- loss and precision -----------------------------------------------------------------------------------------------


def _clipping(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return both bounds: epsilon_high, or clip_high itself, is more specific than epsilon."""
    clipping = {}
    if "epsilon" in given:
        clipping = {"clip_low": given["epsilon"], "clip_high": given["epsilon"]}
        if "clip_high" in context.explicit:
            del clipping["clip_high"]
    return clipping | ({"clip_high": given["epsilon_high"]} if "epsilon_high" in given else {})


def _precision(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    chosen = [name for name in ("bf16", "fp16") if given.get(name)]
    if len(chosen) > 1:
        raise ConfigError("bf16 and fp16: both are true. Give one of the two.")
    return {"mixed_precision": chosen[0] if chosen else "no"}


# --- the table --------------------------------------------------------------------------------------------------------

RULES: tuple[Rule, ...] = (
    *(_rename(old, new, f"{old} is the old name of {new}") for old, new in RENAMED_SETTINGS.items()),
    _rename("beta", "kl_coef"),
    _rename("max_completion_length", "max_new_tokens"),
    _rename("delta", "dual_clip"),
    _rename("save_total_limit", "keep_last"),
    _rename("resume_from_checkpoint", "resume"),
    Rule(
        names={"epsilon": float, "epsilon_high": float},
        settings=("clip_low", "clip_high"),
        convert=_clipping,
        mapping="epsilon is clip_low and clip_high, and epsilon_high is clip_high",
        reads={"epsilon": attrgetter("clip_low"), "epsilon_high": attrgetter("clip_high")},
    ),
    Rule(
        names={"bf16": bool, "fp16": bool},
        settings=("mixed_precision",),
        convert=_precision,
        mapping="bf16=True is mixed_precision bf16, and fp16=True is mixed_precision fp16",
        reads={
            "bf16": lambda config: config.mixed_precision == "bf16",
            "fp16": lambda config: config.mixed_precision == "fp16",
        },
    ),
    Rule(
        names={"per_device_train_batch_size": int, "steps_per_generation": int, "generation_batch_size": int},
        settings=("batch_size", "micro_batch_size", "gradient_accumulation_steps"),
        convert=_batch,
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
        convert=_max_steps,
        mapping="max_steps counts rollout batches, or optimizer steps if the batch has TRL's names",
        shared=("max_steps",),
    ),
    Rule(
        names={"save_steps": float, "save_strategy": Literal["no", "steps", "epoch", "best"]},
        settings=("save_every",),
        convert=_saving,
        mapping="save_every is save_steps, counted in rollout batches",
        reads={"save_steps": attrgetter("save_every"), "save_strategy": _strategy("save_every")},
    ),
    Rule(
        names={"metric_for_best_model": str, "greater_is_better": bool},
        settings=("keep_best", "load_best_model_at_end"),
        convert=_best,
        mapping="keep_best is metric_for_best_model with the prefix eval_, after a - if the lowest value is best",
        reads={
            "metric_for_best_model": lambda config: config.keep_best and config.keep_best.removeprefix("-"),
            "greater_is_better": lambda config: not (config.keep_best or "").startswith("-"),
        },
    ),
    Rule(
        names={"eval_steps": float, "eval_strategy": Literal["no", "steps", "epoch"]},
        settings=("eval_every",),
        convert=_evaluating,
        mapping="eval_every is eval_steps, counted in rollout batches",
        reads={"eval_steps": attrgetter("eval_every"), "eval_strategy": _strategy("eval_every")},
    ),
)
"""Rules in the order in which they are applied: batches before steps, which are counted in batches."""

VALUES: Mapping[str, Callable[[Any], Any]] = {"max_steps": lambda steps: 0 if steps in (-1, "-1") else steps}
"""Conversions of values that only TRL has, for settings with the same name."""

READ_ONLY: Mapping[str, Callable[[Any], Any]] = {
    "eval_delay": lambda config: 0,
    "logging_strategy": lambda config: "steps",
    "world_size": lambda config: started(),
    "should_save": lambda config: is_main(),
    "should_log": lambda config: is_main(),
}
"""Values that callbacks of transformers read, and that aren't settings here."""
