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

from reinforcepp.config.trl_unsupported import (
    NEUTRAL,
    NO_EFFECT,
    SUPERVISED_NEUTRAL,
    JsonText,
    Neutral,
)
from reinforcepp.errors import ConfigError, shown
from reinforcepp.run_dir import RENAMED_SETTINGS
from reinforcepp.runtime.process import is_main, started
from reinforcepp.runtime.redaction import without_secrets
from reinforcepp.runtime.terminal import echo

if TYPE_CHECKING:
    import torch

TRL_DEVICE_BATCH = 8
"""Default of per_device_train_batch_size in transformers."""
EVERY_EPOCH = -1
"""Value of save_every and eval_every for once per epoch."""
TRL_LOGGING_STEPS = 10
"""Default of logging_steps in TRL, whose value eval_strategy="steps" uses if eval_steps isn't given."""


@dataclass(frozen=True)
class Context:
    """What a rule can know about the other settings.

    Attributes:
        view: All settings so far, as attributes of an unchecked configuration.
        explicit: Names that the user gave, TRL's and ours.
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


_printed: set[str] = set()


def print_once(line: str) -> None:
    """Print a line on rank 0, once per process."""
    if is_main() and line not in _printed:
        echo(line)
    _printed.add(line)


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


STRATEGIES = {"no": 0, "epoch": EVERY_EPOCH}


def _saving(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    strategy = given.get("save_strategy", "steps")
    if strategy in STRATEGIES:
        return {"save_every": STRATEGIES[strategy]}
    if strategy == "best":
        raise ConfigError(
            "save_strategy: 'best' isn't supported, because a run resumes from its latest checkpoint. Give keep_best METRIC, "
            "which also keeps the best one."
        )
    return {"save_every": _in_batches("save_steps", given["save_steps"], context)} if "save_steps" in given else {}


def _evaluating(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    strategy = given.get("eval_strategy", "steps")
    if strategy in STRATEGIES:
        return {"eval_every": STRATEGIES[strategy]}
    if not given.get("eval_steps") and "logging_steps" in context.explicit:  # as in transformers
        return {"eval_every": int(context.view.logging_steps)}
    return {"eval_every": _in_batches("eval_steps", given.get("eval_steps") or TRL_LOGGING_STEPS, context)}


def _max_steps(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    steps = int(given["max_steps"])
    return {"max_steps": _in_batches("max_steps", steps, context) if steps > 0 else steps}


def _logging_steps(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return rollout batches between logs; one is the least, because its optimizer steps are logged together."""
    return {"logging_steps": max(1, int(given["logging_steps"]) // context.view.updates_per_step)}


def _strategy(setting: str) -> Callable[[Any], str]:
    names = {steps: strategy for strategy, steps in STRATEGIES.items()}
    return lambda config: names.get(getattr(config, setting), "steps")


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


def _best(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return keep_best: a metric of evaluations, with a minus if lower is better, by transformers' defaults."""
    metric = given.get("metric_for_best_model")
    if metric is None:
        raise ConfigError(
            "greater_is_better needs metric_for_best_model. Give the name of a metric, for example reward."
        )
    if not hasattr(context.view, "num_generations"):
        raise ConfigError(
            f"metric_for_best_model: {metric!r} is a metric of evaluations, but SFT and reward models choose by metrics of the "
            "training steps. Give keep_best, for example -loss."
        )
    if metric.removeprefix("eval_") == "loss":
        raise ConfigError(
            "metric_for_best_model: evaluations of a policy measure no loss. Give reward, kl, length or another of their metrics."
        )
    greater = given.get("greater_is_better", not metric.endswith("loss"))
    return {"keep_best": ("" if greater else "-") + "eval_" + metric.removeprefix("eval_")}


# --- models and engines -----------------------------------------------------------------------------------------------

DTYPES = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def _model_init(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return the settings for the parts of model_init_kwargs that have one."""
    try:
        kwargs = dict(json.loads(given["model_init_kwargs"]))
    except (TypeError, ValueError):
        raise ConfigError(
            f"model_init_kwargs: {given['model_init_kwargs']!r} isn't a JSON object. Write it like "
            '{"attn_implementation": "sdpa"}.'
        ) from None
    settings = {}
    for name, value in kwargs.items():
        dtype = str(value).removeprefix("torch.")
        if value is None or (name, value) == ("revision", "main"):
            continue  # the defaults of TRL's ModelConfig, which its scripts pass on
        if name in ("dtype", "torch_dtype") and dtype in DTYPES and hasattr(context.view, "dtype"):
            settings["dtype"] = dtype
        elif name in ("dtype", "torch_dtype") and dtype in ("bfloat16", "float16"):
            settings["mixed_precision"] = DTYPES[dtype]
            print_once(
                f"model_init_kwargs: dtype {dtype} is mixed_precision {DTYPES[dtype]} here, which computes in 16 bits and "
                "keeps the optimizer's weights in float32."
            )
        elif name in ("attn_implementation", "trust_remote_code") and hasattr(context.view, name):
            settings[name] = value
        elif name in ("dtype", "torch_dtype") and dtype == "auto":
            print_once("model_init_kwargs: dtype auto has no effect here, because weights are trained in float32.")
        elif name in ("dtype", "torch_dtype") and dtype == "float32":
            continue  # the dtype of the weights, as in TRL, which computes in bf16 unless bf16 is False
        elif name == "use_cache":
            print_once("use_cache has no effect here, because generation has a cache and training has none.")
        else:
            raise ConfigError(
                f"model_init_kwargs: {name} {value!r} isn't supported, only dtype (float32, bfloat16, float16) and "
                "attn_implementation. Give the trainer a loaded model for other options, or load_in_4bit for 4-bit weights."
            )
    return settings


def _engine(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    if not given.get("use_vllm"):  # the other settings have no effect in TRL, either
        return {"rollout": "transformers"} if "use_vllm" in given else {}
    if given.get("vllm_mode", "colocate") == "colocate":
        return {"rollout": "vllm"}
    default_host = "0.0.0.0"  # nosec B104  # TRL's default, which is connected to
    host, port = given.get("vllm_server_host", default_host), given.get("vllm_server_port", 8000)
    scheme, _, address = given.get("vllm_server_base_url", f"http://{host}:{port}").rpartition("://")
    prefix = "vllm+https" if scheme == "https" else "vllm"
    return {"rollout": f"{prefix}://{address.rstrip('/')}"}


LARGEST_WEIGHT = 1e30
"""An upper bound that no importance weight exceeds, because their exponents are clamped."""
IMPORTANCE_MODES = {"token_truncate": "tis", "token_mask": "icepop"}


def _importance(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return the correction of an engine's log-probabilities; TRL's default mode is sequence_mask, with 3 as the bound."""
    if given.get("vllm_importance_sampling_correction") is False:
        return {"importance_correction": "off"}
    mode = given.get("vllm_importance_sampling_mode", "sequence_mask")
    if mode not in IMPORTANCE_MODES:
        raise ConfigError(
            f"vllm_importance_sampling_mode: {mode}, TRL's default, has one weight per sequence, which isn't supported. Give "
            "token_truncate or token_mask, or omit it for importance_correction auto."
        )
    low = given.get("vllm_importance_sampling_clip_min", 0.0)
    high = given.get("vllm_importance_sampling_cap", given.get("vllm_importance_sampling_clip_max", 3.0))
    return {
        "importance_correction": IMPORTANCE_MODES[mode],
        "importance_low": low,
        "importance_high": LARGEST_WEIGHT if high is None else high,
    }


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


def _use_cpu(given: Mapping[str, Any], _: Context) -> dict[str, Any]:
    if given["device"] not in ("auto", "cpu"):
        raise ConfigError(
            f"device must be auto (the GPU if this node has one) or cpu, not {shown(given['device'])}. Use auto; the "
            "environment variable CUDA_VISIBLE_DEVICES chooses GPUs."
        )
    return {"use_cpu": given["device"] == "cpu"}


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
        convert=_use_cpu,
        mapping="device cpu is use_cpu",
        needs=(),
    ),
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
        names={},
        settings=("logging_steps",),
        convert=_logging_steps,
        mapping="logging_steps counts rollout batches, or optimizer steps if the batch has TRL's names",
        shared=("logging_steps",),
        needs=("updates_per_step",),
    ),
    Rule(
        names={"save_steps": float, "save_strategy": Literal["no", "steps", "epoch", "best"]},
        settings=("save_every",),
        convert=_saving,
        mapping="save_every is save_steps, counted in rollout batches; 0 for no and -1 for epoch",
        reads={"save_steps": attrgetter("save_every"), "save_strategy": _strategy("save_every")},
    ),
    Rule(
        names={"eval_steps": float, "eval_strategy": Literal["no", "steps", "epoch"]},
        settings=("eval_every",),
        convert=_evaluating,
        mapping="eval_every is eval_steps, counted in rollout batches; 0 for no and -1 for epoch",
        reads={"eval_steps": attrgetter("eval_every"), "eval_strategy": _strategy("eval_every")},
    ),
    Rule(
        names={"metric_for_best_model": str, "greater_is_better": bool},
        settings=("keep_best",),
        convert=_best,
        mapping="keep_best is metric_for_best_model with eval_, and with a minus if lower is better",
        reads={
            "metric_for_best_model": lambda config: config.keep_best and config.keep_best.removeprefix("-"),
            "greater_is_better": lambda config: not (config.keep_best or "").startswith("-"),
        },
    ),
    Rule(
        names={"model_init_kwargs": JsonText},
        settings=("mixed_precision", "attn_implementation"),
        convert=_model_init,
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
        convert=_engine,
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
        convert=_importance,
        mapping=(
            "importance_correction is off, tis (token_truncate) or icepop (token_mask), importance_low is clip_min, and "
            "importance_high is clip_max"
        ),
        reads={
            "vllm_importance_sampling_clip_min": attrgetter("importance_low"),
            "vllm_importance_sampling_clip_max": attrgetter("importance_high"),
        },
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
