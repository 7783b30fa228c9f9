"""Find the largest batch settings that fit into memory, each with all other settings unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from reinforcepp.config import ReinforceConfig
from reinforcepp.planner.memory import PHASES, Job, Rows, longest_rows, phases, total

MAX_PROMPTS = 1 << 16
"""Upper limit of the search: larger steps aren't useful, and a prompt takes hardly any memory."""


@dataclass(frozen=True)
class Largest:
    """The largest settings that fit; 0 if not even 1 does."""

    micro_batch_size: int
    rollout_batch_size: int
    batch_size: int
    """At most ``MAX_PROMPTS``, which means that or more."""


def largest(job: Job, config: ReinforceConfig, memory: float) -> Largest:
    """Return the largest value of each setting that fits into ``memory`` bytes.

    micro_batch_size doesn't change the rollout, and rollout_batch_size doesn't change other phases, so each is searched in its
    own phases. batch_size must fit in all phases.
    """
    rows = Rows.of(config, job)
    others = [name for name in PHASES if name != "rollout"]
    micro = largest_fitting(
        largest_micro(config, rows), lambda size: _fits(job, with_micro(rows, config, size, job.ranks), memory, others)
    )
    in_all_phases = job.engine == "vllm" and not job.gpus  # On a CPU, vLLM's cache stays allocated.
    generated = largest_fitting(
        max(rows.step, rows.evaluated),
        lambda number: _fits(job, replace(rows, concurrent=number), memory, PHASES if in_all_phases else ["rollout"]),
    )
    prompts = largest_fitting(
        MAX_PROMPTS // job.ranks,
        lambda number: _fits(job, with_prompts(rows, config, number, job), memory, PHASES),
    )
    return Largest(micro, generated, prompts * job.ranks)


def largest_fitting(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number up to ``limit`` that fits, or 0.

    Below ``limit``, every number smaller than one that fits also fits. ``limit`` itself can fit although smaller numbers
    don't, because a single pass holds no gradients of earlier passes.
    """
    if fits(limit):
        return limit
    low, high = 0, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def largest_micro(config: ReinforceConfig, rows: Rows) -> int:
    """Return the largest useful micro_batch_size on one device."""
    if config.gradient_accumulation_steps is None:
        return rows.step
    return max(1, min(rows.step, config.completions_per_step // config.gradient_accumulation_steps))


def with_micro(rows: Rows, config: ReinforceConfig, size: int, ranks: int = 1) -> Rows:
    """Return ``rows``, which are those of one of ``ranks`` devices, with another micro_batch_size."""
    steps = config.gradient_accumulation_steps
    update = rows.step if steps is None else min(rows.step, -(-size * steps // ranks))
    return replace(rows, micro=size, passes=-(-update // size))


def with_prompts(rows: Rows, config: ReinforceConfig, prompts: int, job: Job) -> Rows:
    """Return ``rows``, which are those of one device of a job, with another number of prompts."""
    step = prompts * config.num_generations
    micro = min(longest_rows(config, job), step)
    return with_micro(replace(rows, prompts=prompts, step=step), config, micro, job.ranks)


def _fits(job: Job, rows: Rows, memory: float, names: Iterable[str]) -> bool:
    parts = phases(job, rows)
    return all(total(parts[name]) <= memory for name in names)
