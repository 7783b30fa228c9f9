"""The ``plan`` command and function: read configurations and compute the plan."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from reinforcepp.config import PlanConfig, ReinforceConfig
from reinforcepp.config.accelerators import DeviceName
from reinforcepp.config.reinforce import RAY, server_addresses
from reinforcepp.config.reward_spec import RewardSource, parse_source
from reinforcepp.errors import ConfigError, RolloutError, option, setting
from reinforcepp.models.devices import choose_device
from reinforcepp.models.loading import load_config, parameter_count, prompt_limit
from reinforcepp.models.master_weights import sums_fit
from reinforcepp.models.precision import automatic_precision, compute_dtype, format_flops, slow_precision
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.planner import report
from reinforcepp.planner.device import Device, device_for, precision_device
from reinforcepp.planner.lengths import lengths_for
from reinforcepp.planner.memory import Job, Rows, phases
from reinforcepp.planner.model_costs import FrozenModel, RowSize, combined, frozen_model, trained_model
from reinforcepp.planner.report import Plan
from reinforcepp.planner.search import largest, with_micro
from reinforcepp.planner.timing import node_seconds
from reinforcepp.rewards.functions import RewardFunction, function_name
from reinforcepp.rollout.engine import preserve_random_state
from reinforcepp.rollout.selection import EngineName
from reinforcepp.rollout.vllm.compat import built_for_cpu
from reinforcepp.runtime.process import silence
from reinforcepp.runtime.terminal import Console, print_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DOES_NOT_FIT = 1
"""Exit code."""
ASSUMED_PROMPT = 512
"""Tokens of a prompt if max_prompt_length isn't set and the context isn't shorter."""
IMPLAUSIBLE_FLOPS, IMPLAUSIBLE_BYTES = 2e9, 5e8
"""Rates per second that every CPU core exceeds in float32 unless other processes use it."""


def run_plan(config: PlanConfig) -> int:
    """Print the plan of the training that ``config`` describes; returns 1 if it doesn't fit, otherwise 0.

    Raises:
        ReinforceError: as :func:`make_plan`.
    """
    estimate = make_plan(config)
    if config.format == "json":
        print_json(report.as_json(estimate))
    else:
        print_text(report.as_text(estimate))
    return 0 if estimate.fits else DOES_NOT_FIT


def print_text(parts: Iterable[str | Table]) -> None:
    """Print paragraphs and tables."""
    terminal = Console()
    for part in parts:
        terminal.print(part, soft_wrap=isinstance(part, str))


def show_plan(plan: Plan) -> None:
    """Print a plan as text."""
    print_text(report.as_text(plan))


def plan(
    model: str | Path = PlanConfig.model,
    reward_funcs: str | Path | RewardFunction | Sequence[str | Path | RewardFunction] | None = None,
    args: ReinforceConfig | None = None,
    *,
    judge: str = "none",
    gpus: int | None = None,
    fsdp: bool = PlanConfig.fsdp,
    mean_new_tokens: float | None = None,
    lengths_from: str | Path | None = None,
    device: DeviceName = "auto",
    gpu_memory: float | None = None,
) -> Plan:
    """Estimate, without loading a model, whether a training fits into one node's memory and how long a step takes.

    The first three arguments are those of :class:`~reinforcepp.ReinforceTrainer`.

    Example:
        >>> from reinforcepp import ReinforceConfig, plan
        >>> estimate = plan("builtin:tiny", args=ReinforceConfig(max_new_tokens=32), device="h100")
        >>> estimate.fits, round(estimate.peak_memory / 2**30), estimate.seconds_per_step < 60
        (True, 2, True)

    Args:
        model: Policy and reference model: builtin:tiny, a folder or a Hub name.
        reward_funcs: Rewards of the training. Folders of reward models count, functions don't.
        args: Settings of the training.
        judge: Scores held-out responses: builtin:judge, a reward, none, or auto.
        gpus: GPUs that train; 0 is the CPU. Default: all of this node, 1 of a named device.
        fsdp: Shard weights, gradients and optimizer state over the GPUs (FSDP2).
        mean_new_tokens: Mean completion length for time, in tokens; default: max_new_tokens.
        lengths_from: Folder of a run whose completion lengths are used instead.
        device: Device to plan for; auto is this node, cpu its CPU, others are GPUs.
        gpu_memory: Memory of each GPU, or of the CPU, in GiB. Default: measured, or the data sheet.

    Returns:
        The plan: ``peak_memory`` in bytes, ``fits``, ``seconds_per_step``, ``table``, and by ``print(plan)`` all of it.

    Raises:
        ConfigError: A setting is invalid, or the settings exceed the model's context.
        ModelError: A model's configuration is missing, or transformers has no such model.
        DataError: The run given by ``lengths_from`` has no completions.
    """
    rewards: list[Any] = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    sources = [
        parse_source(str(reward))
        if isinstance(reward, (str, Path))
        else RewardSource("function", function_name(reward))
        for reward in rewards
        if reward is not None
    ]
    training = args or ReinforceConfig()
    if not isinstance(training, ReinforceConfig):
        raise ConfigError(
            f"args: {type(args).__name__} isn't a ReinforceConfig. Give the settings of a policy training."
        )
    own: dict[str, Any] = {
        "model": str(model),
        "reward_weights": (),
        "judge": judge,
        "gpus": gpus,
        "fsdp": fsdp,
        "mean_new_tokens": mean_new_tokens,
        "lengths_from": lengths_from,
        "device": device,
        "gpu_memory": gpu_memory,
    }
    config = PlanConfig(**{field.name: getattr(training, field.name) for field in fields(training)} | own)
    with silence(), preserve_random_state():
        return make_plan(config, sources=sources)


def make_plan(
    config: PlanConfig,
    ranks_of: Callable[[int], int] = lambda gpus: gpus,
    sources: Sequence[RewardSource] | None = None,
) -> Plan:
    """Return memory, largest batches, and step time of a training, from the configurations of its models.

    Args:
        config: the training and the device.
        ranks_of: returns the data-parallel ranks for a number of GPUs per node, which is 1 for a CPU.
        sources: rewards of the training; default: those of ``config``.

    Raises:
        ModelError: a model's configuration is missing, or its code doesn't run on the meta device.
        ConfigError: the settings exceed the model's context, or the device's memory isn't known.
        DataError: the run given by ``lengths_from`` has no completions.
    """
    if config.uses_this_node:
        choose_device(config.use_cpu)
    if config.trust_remote_code:
        allow_remote_code(config.model)
    policy_config = load_config(config.model)
    precision = []
    if config.mixed_precision == "auto":
        chosen, reason = automatic_precision(config, parameter_count(policy_config), precision_device(config))
        config = replace(config, mixed_precision=chosen)
        precision = [f"Mixed precision {chosen}: {reason}."]
    dtype = compute_dtype(config)
    limit = prompt_limit(policy_config, config.max_prompt_length, config.max_new_tokens, config.max_length)
    lengths = lengths_for(config)
    device = device_for(config, dtype)
    ranks = ranks_of(max(1, device.gpus))
    if sources is None:
        sources = [parse_source(text) for text in config.reward_sources]
    job, notes = _job(config, policy_config, dtype, ranks, limit, sources, device)
    rows = Rows.of(config, job)
    limits = largest(job, config, device.memory)
    smaller = with_micro(rows, config, max(1, min(rows.micro, limits.micro_batch_size)), ranks)
    smaller = replace(smaller, concurrent=max(1, min(rows.concurrent, limits.rollout_batch_size)))
    return Plan(
        config=config,
        device=device,
        job=job,
        rows=rows,
        phases=phases(job, rows),
        limits=limits,
        smaller=phases(job, smaller),
        seconds=node_seconds(job, rows, config, device, lengths),
        mean_length=lengths.mean,
        notes=(*precision, *notes, lengths.note),
        warnings=tuple(_warnings(config, device)),
    )


def _warnings(config: PlanConfig, device: Device) -> Iterator[str]:
    """Yield reasons why the time, from rates measured on this CPU, is unusually long or unreliable."""
    if device.gpus or device.rates is None:
        return
    if slow := slow_precision(config):
        yield slow
    elif device.rates.flops < IMPLAUSIBLE_FLOPS or device.rates.bytes < IMPLAUSIBLE_BYTES:
        yield (
            f"The time isn't reliable: this CPU reached only {format_flops(device.rates.flops)} and "
            f"{device.rates.bytes / 1e9:.2g} GB/s. Other processes probably use it. Stop them and run the plan again."
        )


def _job(
    config: PlanConfig,
    policy_config: PreTrainedConfig,
    dtype: torch.dtype,
    ranks: int,
    limit: int,
    sources: Sequence[RewardSource],
    device: Device,
) -> tuple[Job, list[str]]:
    """Return the training's models and settings, and the assumptions about them."""
    notes: list[str] = []
    on_gpu, memory = device.gpus > 0, device.memory
    size = RowSize(config.max_prompt_length or min(limit, ASSUMED_PROMPT), config.max_new_tokens)
    if config.max_prompt_length is None:
        notes.append(
            f"Prompts of {size.prompt} tokens are assumed; {setting('max_prompt_length')} sets another length."
        )
    offload = config.offload_optimizer and on_gpu
    trained = partial(
        trained_model,
        policy_config,
        dtype,
        size,
        config,
        shards=ranks if config.fsdp else 1,
    )

    def frozen(name: str, role: str) -> FrozenModel:
        if Path(name).expanduser().is_dir():
            return frozen_model(load_config(name), dtype, size)
        notes.append(f"The {role} {name} doesn't exist yet, so its size is assumed to be that of the policy.")
        return frozen_model(policy_config, dtype, size)

    engine, reason = _engine(config, on_gpu=on_gpu)
    notes.append(reason)
    if config.staleness:
        notes.append(
            "With staleness, rollouts on devices of their own overlap with the rest. A step then takes as long as the rollout "
            "or as the rest, whichever is longer, instead of the sum."
        )
    judge = config.judge_name
    models = [source.path or "" for source in sources if source.kind == "model"]
    notes += [
        f"Memory and time of {source.target} aren't included."
        for source in sources
        if source.kind in ("function", "judge")
    ]
    policy, has_critic = trained(), config.estimator_spec.uses_critic
    if cpu_sums := offload and not sums_fit(policy.trained * (1 + has_critic), memory):
        policy = trained(cpu_sums=True)
    return Job(
        policy=policy,
        reward=combined([] if config.reward_workers else [frozen(model, "reward model") for model in models]),
        critic=trained(values=True, cpu_sums=cpu_sums) if has_critic else None,
        judge=frozen(judge, "judge") if judge is not None and parse_source(judge).kind == "model" else None,
        size=size,
        dtype=dtype,
        engine=engine,
        gpus=ranks if on_gpu else 0,
        offload=offload,
        sums_on_cpu=cpu_sums,
        rollout_copies=config.staleness,
        ranks=ranks,
        sharded=config.fsdp,
    ), notes


def _engine(config: PlanConfig, *, on_gpu: bool) -> tuple[EngineName, str]:
    """Return the engine that the training would choose, as far as it is known without starting it, and a note."""
    if config.rollout.startswith(RAY):
        return "ray", "Rollouts run on a pool of Ray workers; their memory and time aren't included."
    if server_addresses(config.rollout):
        return "servers", "Rollouts run on vLLM servers; their memory and time aren't included."
    installed = importlib.util.find_spec("vllm") is not None
    if config.load_in_4bit:
        return "transformers", "Rollouts use transformers, because vLLM can't share 4-bit weights."
    if config.rollout == "transformers" or (config.rollout == "auto" and not installed):
        return "transformers", "Rollouts use transformers."
    if installed and not (on_gpu or built_for_cpu()):
        if config.rollout == "auto":
            return "transformers", "Rollouts use transformers, because the installed vLLM needs a GPU."
        raise RolloutError(
            f"{setting('rollout')} vllm: the installed vLLM needs a GPU. Plan with {option('rollout', 'transformers')}."
        )
    if not installed:
        raise RolloutError(
            f"rollout: vllm isn't installed. Plan with {option('rollout', 'transformers')}, or install vllm."
        )
    reason = ", which is installed" if config.rollout == "auto" else ""
    return "vllm", f"Rollouts use vLLM{reason}."
