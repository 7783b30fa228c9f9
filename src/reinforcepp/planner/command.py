"""The ``plan`` command: read configurations, compute the plan, and print it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from reinforcepp.config import PlanConfig
from reinforcepp.config.reinforce import RAY, server_addresses
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.errors import RolloutError, option, setting
from reinforcepp.models.loading import load_config, prompt_limit
from reinforcepp.models.precision import compute_dtype, format_flops, slow_precision
from reinforcepp.planner import report
from reinforcepp.planner.device import Device, device_for
from reinforcepp.planner.lengths import lengths_for
from reinforcepp.planner.memory import Job, Rows, phases
from reinforcepp.planner.model_costs import FrozenModel, RowSize, combined, frozen_model, trained_model
from reinforcepp.planner.report import Plan
from reinforcepp.planner.search import largest, with_micro
from reinforcepp.planner.timing import node_seconds
from reinforcepp.rollout.selection import EngineName
from reinforcepp.rollout.vllm.compat import built_for_cpu

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DOES_NOT_FIT = 1
ASSUMED_PROMPT = 512
"""Tokens of a prompt if max_prompt_length isn't set and the context isn't shorter."""
"""Exit code."""
IMPLAUSIBLE_FLOPS, IMPLAUSIBLE_BYTES = 2e9, 5e8
"""Rates per second that every CPU core exceeds in float32 unless other processes use it."""


def run_plan(config: PlanConfig) -> int:
    """Print the plan of the training that ``config`` describes; returns 1 if it doesn't fit, otherwise 0.

    Raises:
        ReinforceError: as :func:`make_plan`.
    """
    plan = make_plan(config)
    if config.format == "json":
        sys.stdout.write(report.as_json(plan))
        sys.stdout.flush()
    else:
        print_text(report.as_text(plan))
    return 0 if plan.fits else DOES_NOT_FIT


def print_text(parts: Iterable[str | Table]) -> None:
    """Print paragraphs and tables."""
    terminal = Console(highlight=False)
    for part in parts:
        terminal.print(part, soft_wrap=isinstance(part, str), markup=False)
    sys.stdout.flush()


def show_plan(plan: Plan) -> None:
    """Print a plan as text."""
    print_text(report.as_text(plan))


def make_plan(config: PlanConfig, ranks_of: Callable[[int], int] = lambda gpus: gpus) -> Plan:
    """Return memory, largest batches, and step time of a training, from the configurations of its models.

    Args:
        config: the training and the device.
        ranks_of: returns the data-parallel ranks for a number of GPUs per node, which is 1 for a CPU.

    Raises:
        ModelError: a model's configuration is missing, or its code doesn't run on the meta device.
        ConfigError: the settings exceed the model's context, or the device's memory isn't known.
        DataError: the run given by ``lengths_from`` has no completions.
    """
    dtype = compute_dtype(config)
    policy_config = load_config(config.model)
    limit = prompt_limit(policy_config, config.max_prompt_length, config.max_new_tokens, config.max_length)
    lengths = lengths_for(config)
    device = device_for(config, dtype)
    ranks = ranks_of(max(1, device.gpus))
    job, notes = _job(config, policy_config, dtype, ranks, limit, on_gpu=device.gpus > 0)
    rows = Rows.of(config, ranks)
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
        notes=(*notes, lengths.note),
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
    config: PlanConfig, policy_config: PreTrainedConfig, dtype: torch.dtype, ranks: int, limit: int, *, on_gpu: bool
) -> tuple[Job, list[str]]:
    """Return the training's models and settings, and the assumptions about them."""
    notes: list[str] = []
    size = RowSize(config.max_prompt_length or min(limit, ASSUMED_PROMPT), config.max_new_tokens)
    if config.max_prompt_length is None:
        notes.append(f"Prompts of {size.prompt} tokens are assumed; {option('max_prompt_length')} sets another length.")
    offload = config.offload_optimizer and on_gpu
    trained = partial(
        trained_model,
        policy_config,
        dtype,
        size,
        config,
        early=ranks == 1 or config.fsdp,
        offload=offload,
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
    sources = [parse_source(text) for text in config.reward_sources]
    models = [source.path or "" for source in sources if source.kind == "model"]
    notes += [f"Memory and time of {source.target} aren't included." for source in sources if source.kind == "function"]
    return Job(
        policy=trained(),
        reward=combined([] if config.reward_workers else [frozen(model, "reward model") for model in models]),
        critic=trained(values=True) if config.estimator_spec.uses_critic else None,
        judge=frozen(judge, "judge") if judge is not None and parse_source(judge).kind == "model" else None,
        size=size,
        dtype=dtype,
        engine=engine,
        gpus=ranks if on_gpu else 0,
        offload=offload,
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
