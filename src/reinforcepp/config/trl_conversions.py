"""Conversions of TRL's settings to ours, one function per group of settings; ``trl_names`` has the table that calls them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from reinforcepp.errors import ConfigError, shown
from reinforcepp.runtime.process import is_main, started
from reinforcepp.runtime.terminal import echo

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


_printed: set[str] = set()


def print_once(line: str) -> None:
    """Print a line on rank 0, once per process."""
    if is_main() and line not in _printed:
        echo(line)
    _printed.add(line)


# --- batches and steps ------------------------------------------------------------------------------------------------


def batch(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
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


def in_batches(name: str, steps: float, context: Context) -> int:
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


def saving(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return save_every; ``save_strategy`` can turn it off or make it once per epoch."""
    strategy = given.get("save_strategy", "steps")
    if strategy in STRATEGIES:
        return {"save_every": STRATEGIES[strategy]}
    if strategy == "best":
        raise ConfigError(
            "save_strategy: 'best' isn't supported, because a run resumes from its latest checkpoint. Give keep_best METRIC, "
            "which also keeps the best one."
        )
    return {"save_every": in_batches("save_steps", given["save_steps"], context)} if "save_steps" in given else {}


def evaluating(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return eval_every; ``eval_strategy`` can turn it off or make it once per epoch."""
    strategy = given.get("eval_strategy", "steps")
    if strategy in STRATEGIES:
        return {"eval_every": STRATEGIES[strategy]}
    if not given.get("eval_steps") and "logging_steps" in context.explicit:  # as in transformers
        return {"eval_every": int(context.view.logging_steps)}
    return {"eval_every": in_batches("eval_steps", given.get("eval_steps") or TRL_LOGGING_STEPS, context)}


def max_steps(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return max_steps in rollout batches."""
    steps = int(given["max_steps"])
    return {"max_steps": in_batches("max_steps", steps, context) if steps > 0 else steps}


def logging_steps(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return rollout batches between logs; one is the least, because its optimizer steps are logged together."""
    return {"logging_steps": max(1, int(given["logging_steps"]) // context.view.updates_per_step)}


def strategy(setting: str) -> Callable[[Any], str]:
    """Return the function that reads a TRL strategy from our interval ``setting``."""
    names = {steps: strategy for strategy, steps in STRATEGIES.items()}
    return lambda config: names.get(getattr(config, setting), "steps")


# --- loss and precision -----------------------------------------------------------------------------------------------


def clipping(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return both bounds: epsilon_high, or clip_high itself, is more specific than epsilon."""
    clipping = {}
    if "epsilon" in given:
        clipping = {"clip_low": given["epsilon"], "clip_high": given["epsilon"]}
        if "clip_high" in context.explicit:
            del clipping["clip_high"]
    return clipping | ({"clip_high": given["epsilon_high"]} if "epsilon_high" in given else {})


def precision(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return mixed_precision."""
    chosen = [name for name in ("bf16", "fp16") if given.get(name)]
    if len(chosen) > 1:
        raise ConfigError("bf16 and fp16: both are true. Give one of the two.")
    return {"mixed_precision": chosen[0] if chosen else "no"}


def best(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
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


def model_init(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
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


def engine(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return rollout and the settings of vLLM."""
    if not given.get("use_vllm"):  # the other settings have no effect in TRL, either
        return {"rollout": "transformers"} if "use_vllm" in given else {}
    if given.get("vllm_mode", "colocate") == "colocate":
        return {"rollout": "vllm"}
    default_host = "0.0.0.0"  # nosec B104  # TRL's default, which is connected to
    host, port = given.get("vllm_server_host", default_host), given.get("vllm_server_port", 8000)
    scheme, _, address = given.get("vllm_server_base_url", f"http://{host}:{port}").rpartition("://")
    prefix = "vllm+https" if scheme == "https" else "vllm"
    return {"rollout": f"{prefix}://{address.rstrip('/')}"}


def turns(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return max_turns for a number of rounds of calls; None, no limit in TRL, leaves the default."""
    rounds = given["max_tool_calling_iterations"]
    return {} if rounds is None else {"max_turns": rounds + 1}


LARGEST_WEIGHT = 1e30
"""An upper bound that no importance weight exceeds, because their exponents are clamped."""
IMPORTANCE_MODES = {"token_truncate": "tis", "token_mask": "icepop"}
"""Our names for TRL's modes; those with one weight per sequence have the same name."""


def importance(given: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """Return the correction of an engine's log-probabilities; TRL's default mode is sequence_mask, with 3 as the bound."""
    if given.get("vllm_importance_sampling_correction") is False:
        return {"importance_correction": "off"}
    mode = given.get("vllm_importance_sampling_mode", "sequence_mask")
    low = given.get("vllm_importance_sampling_clip_min", 0.0)
    high = given.get("vllm_importance_sampling_cap", given.get("vllm_importance_sampling_clip_max", 3.0))
    return {
        "importance_correction": IMPORTANCE_MODES.get(mode, mode),
        "importance_low": low,
        "importance_high": LARGEST_WEIGHT if high is None else high,
    }


def use_cpu(given: Mapping[str, Any], _: Context) -> dict[str, Any]:
    """Return use_cpu."""
    if given["device"] not in ("auto", "cpu"):
        raise ConfigError(
            f"device must be auto (the GPU if this node has one) or cpu, not {shown(given['device'])}. Use auto; the "
            "environment variable CUDA_VISIBLE_DEVICES chooses GPUs."
        )
    return {"use_cpu": given["device"] == "cpu"}
