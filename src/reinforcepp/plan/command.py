"""The verb: read configurations, count, tell."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from reinforcepp.config import PlanConfig
from reinforcepp.config.reinforce import server_addresses
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.errors import RolloutError
from reinforcepp.models.loading import check_context, load_config
from reinforcepp.models.precision import compute_dtype
from reinforcepp.plan import report
from reinforcepp.plan.lengths import lengths_for
from reinforcepp.plan.machine import machine_for
from reinforcepp.plan.memory import Job, Rows, phases
from reinforcepp.plan.report import Plan
from reinforcepp.plan.scaling import nodes_of, scales
from reinforcepp.plan.search import largest, with_micro
from reinforcepp.plan.shapes import Body, Size, asked_shape, together, trained_shape
from reinforcepp.rollout.selection import EngineName

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TOO_LARGE = 1


def run_plan(config: PlanConfig) -> int:
    """Show the plan of the training that ``config`` describes; returns 1 where it doesn't fit, else 0.

    Raises:
        ReinforceError: As :func:`make_plan`.
    """
    plan = make_plan(config)
    if config.format == "json":
        sys.stdout.write(report.as_json(plan))
        sys.stdout.flush()
    else:
        show_plan(plan)
    return 0 if plan.fits else TOO_LARGE


def show_plan(plan: Plan) -> None:
    """Tell a plan to people."""
    terminal = Console(highlight=False)
    for part in report.as_text(plan):
        terminal.print(part, soft_wrap=isinstance(part, str), markup=False)
    sys.stdout.flush()


def make_plan(config: PlanConfig) -> Plan:
    """Memory, largest batches and time of a training, from the configurations of its models.

    Raises:
        ModelError: a model's configuration is missing or can't be counted.
        ConfigError: the settings exceed the model's context, or nobody knows how large the device is.
        DataError: there are no completions where lengths are to be from.
    """
    dtype = compute_dtype(config)
    policy_config = load_config(config.model)
    check_context(policy_config, config.max_prompt_length, config.max_new_tokens)
    lengths = lengths_for(config)
    machine = machine_for(config, dtype)
    nodes = nodes_of(config, max(1, machine.gpus))
    ranks = config.trainers if config.pooled else nodes * max(1, machine.gpus)
    job, said = _job(config, policy_config, dtype, ranks, on_gpu=machine.gpus > 0)
    rows = Rows.of(config, ranks)
    limits = largest(job, config, machine.memory)
    fewer = with_micro(rows, config, max(1, min(rows.micro, limits.micro_batch_size)), ranks)
    fewer = replace(fewer, at_a_time=max(1, min(rows.at_a_time, limits.rollout_batch_size)))
    return Plan(
        config=config,
        machine=machine,
        job=job,
        rows=rows,
        phases=phases(job, rows),
        limits=limits,
        smaller=phases(job, fewer),
        scales=tuple(scales(job, config, machine, lengths, nodes)),
        said=(*said, lengths.said),
    )


def _job(
    config: PlanConfig, policy_config: PreTrainedConfig, dtype: torch.dtype, ranks: int, *, on_gpu: bool
) -> tuple[Job, list[str]]:
    """What is trained with what, and which of it is assumed."""
    said: list[str] = []
    size = Size(config.max_prompt_length, config.max_new_tokens)
    offload = config.offload_optimizer and on_gpu
    shards = ranks if config.fsdp else 1
    trained = partial(
        trained_shape,
        policy_config,
        dtype,
        size,
        config,
        early=ranks == 1 or config.fsdp,
        offload=offload,
        shards=shards,
    )

    def asked(name: str, what: str) -> Body:
        if Path(name).expanduser().is_dir():
            return asked_shape(load_config(name), dtype, size)
        said.append(f"There is no folder {name} yet: the {what} is taken to be as large as the policy.")
        return asked_shape(policy_config, dtype, size)

    engine, reason = _engine(config)
    said.append(reason)
    if config.staleness:
        said.append(
            "With staleness, whoever generates on a device of their own does so beside the rest: a step then takes as long as "
            "the rollout or as the rest, whichever is longer, and not the sum."
        )
    judge = config.judge_name
    sources = [parse_source(text) for text in config.reward_sources]
    models = [source.target for source in sources if source.kind == "model"]
    said += [f"What {source.target} takes for itself isn't counted." for source in sources if source.kind == "function"]
    return Job(
        policy=trained(),
        reward=together([] if config.reward_workers else [asked(model, "reward model") for model in models]),
        critic=trained(values=True) if config.estimator_spec.uses_critic else None,
        judge=asked(judge, "judge") if judge is not None and parse_source(judge).kind == "model" else None,
        size=size,
        dtype=dtype,
        engine=engine,
        gpus=ranks if on_gpu else 0,
        offload=offload,
        ahead=config.staleness,
        ranks=ranks,
        sharded=config.fsdp,
    ), said


def _engine(config: PlanConfig) -> tuple[EngineName, str]:
    """The engine that the training would take, as far as can be told without starting it."""
    if config.pooled:
        return (
            "ray",
            "Completions come from a pool of Ray workers elsewhere: what they take isn't counted. Each of their devices is taken "
            "to be as fast as one that trains, with vLLM.",
        )
    if server_addresses(config.rollout):
        return "servers", "Completions come from vLLM's servers: what they take and how long isn't counted."
    installed = importlib.util.find_spec("vllm") is not None
    if config.load_in_4bit:
        return "transformers", "Completions come from transformers, because vLLM can't share weights of 4 bits."
    if config.rollout == "transformers" or (config.rollout == "auto" and not installed):
        return "transformers", "Completions come from transformers."
    if not installed:
        raise RolloutError(
            "rollout is vllm, which isn't installed here: plan with --rollout transformers, or install it."
        )
    why = ", which is installed here" if config.rollout == "auto" else ""
    return "vllm", f"Completions come from vLLM{why}."
