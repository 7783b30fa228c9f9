"""The largest batches that fit, all other settings being what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from reinforcepp.config import ReinforceConfig
from reinforcepp.config.reinforce import DEFAULT_MICRO_BATCH
from reinforcepp.plan.memory import PHASES, Job, Rows, phases, total

MOST_PROMPTS = 1 << 16
"""Nobody wants more in a step, and what they take hardly counts."""


@dataclass(frozen=True)
class Largest:
    """Settings at which memory is just enough; 0 where even 1 is too much."""

    micro_batch_size: int
    rollout_batch_size: int
    batch_size: int
    """``MOST_PROMPTS`` or more where it is that."""


def largest(job: Job, config: ReinforceConfig, memory: float) -> Largest:
    """The largest of each setting that fits into ``memory`` bytes.

    A smaller micro_batch_size leaves the rollout as it is, and a smaller rollout_batch_size all other phases, so each is
    looked for in its own phases. A batch_size has to fit in all of them.
    """
    rows = Rows.of(config, job.ranks)
    others = [name for name in PHASES if name != "rollout"]
    micro = most(
        widest_micro(config, rows), lambda size: _fits(job, with_micro(rows, config, size, job.ranks), memory, others)
    )
    stays = job.engine == "vllm" and not job.gpus  # then the cache is there in all phases
    generated = most(
        max(rows.step, rows.evaluated),
        lambda number: _fits(job, replace(rows, at_a_time=number), memory, PHASES if stays else ["rollout"]),
    )
    prompts = most(
        MOST_PROMPTS // job.ranks,
        lambda number: _fits(job, with_prompts(rows, config, number, job.ranks), memory, PHASES),
    )
    return Largest(micro, generated, prompts * job.ranks)


def most(upper: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to ``upper`` that fits, 0 if none does.

    Up to the one before ``upper`` a number that fits means that all smaller ones do. ``upper`` itself may fit where smaller
    ones don't: in a single pass no gradients of earlier ones are held.
    """
    if fits(upper):
        return upper
    low, high = 0, upper
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def widest_micro(config: ReinforceConfig, rows: Rows) -> int:
    """The largest micro_batch_size that makes sense on one device."""
    if config.gradient_accumulation_steps is None:
        return rows.step
    return max(1, min(rows.step, config.completions_per_step // config.gradient_accumulation_steps))


def with_micro(rows: Rows, config: ReinforceConfig, size: int, ranks: int = 1) -> Rows:
    """``rows`` of one of ``ranks`` devices with another micro_batch_size."""
    steps = config.gradient_accumulation_steps
    update = rows.step if steps is None else min(rows.step, -(-size * steps // ranks))
    return replace(rows, micro=size, passes=-(-update // size))


def with_prompts(rows: Rows, config: ReinforceConfig, prompts: int, ranks: int = 1) -> Rows:
    """``rows`` of one of ``ranks`` devices with another number of prompts."""
    step = prompts * config.num_generations
    micro = min(config.micro_batch_size or DEFAULT_MICRO_BATCH, step)
    return with_micro(replace(rows, prompts=prompts, step=step), config, micro, ranks)


def _fits(job: Job, rows: Rows, memory: float, names: Iterable[str]) -> bool:
    parts = phases(job, rows)
    return all(total(parts[name]) <= memory for name in names)
