"""The plan as text and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from reinforcepp.config import PlanConfig
from reinforcepp.errors import option, setting
from reinforcepp.models.precision import format_flops
from reinforcepp.planner.device import GIB, Device
from reinforcepp.planner.memory import (
    ALLOCATOR,
    FLOAT,
    LIBRARIES,
    MIB,
    MOMENTS,
    PARTS,
    Job,
    Rows,
    loading,
    static,
    total,
)
from reinforcepp.planner.search import MAX_PROMPTS, Largest
from reinforcepp.planner.timing import (
    LINK_UTILIZATION,
    UTILIZATION_OF_DATA_SHEET,
    UTILIZATION_OF_MEASURED,
    link_bandwidth,
)
from reinforcepp.reports.run.summary import duration
from reinforcepp.runtime.terminal import Console

GIB_FROM = 10 * GIB
"""The table uses GiB from this peak on, and MiB below."""
UNLIMITED_RANKS = 1 << 40
PAGE_WIDTH = 200
"""Columns of a plan as text, more than any table needs."""
CLOSE = 0.9
"""Fraction of the memory from which on the estimate's error matters."""
LABELS = {
    "copies to sample": "rollout copies",
    "key-value cache": "KV cache",
    "weights handed out": "broadcast weights",
    "waiting": "stragglers",
    "exchange": "communication",
    "sync": "weight transfer",
}
"""Names in the text for keys of the JSON."""


@dataclass(frozen=True)
class Plan:
    """The planner's results."""

    config: PlanConfig
    device: Device
    job: Job
    rows: Rows
    phases: dict[str, dict[str, float]]
    """Bytes by phase and part."""
    limits: Largest
    smaller: dict[str, dict[str, float]]
    """The same with the largest micro_batch_size and rollout_batch_size that fit, or with 1 if none does."""
    seconds: dict[str, float] | None
    """Seconds of a step by phase; None if the device's rates aren't known."""
    mean_length: float
    """Mean tokens of a completion."""
    notes: tuple[str, ...]
    """Assumptions about this training."""
    warnings: tuple[str, ...] = ()
    """Reasons why the time is unusually long or unreliable."""

    def __str__(self) -> str:
        """Return the plan as the command prints it."""
        return to_text(as_text(self))

    @property
    def table(self) -> str:
        """The memory by part and phase, as text."""
        return to_text([_table(self)])

    @property
    def peak_phase(self) -> str:
        """The phase that needs the most memory."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak_memory(self) -> float:
        """Bytes that this phase needs, on each GPU."""
        return total(self.phases[self.peak_phase])

    @property
    def fits(self) -> bool:
        """Whether the device has enough memory."""
        return self.peak_memory <= self.device.memory

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds of a step; None if the device's rates aren't known."""
        return None if self.seconds is None else sum(self.seconds.values())

    @property
    def tokens_per_second(self) -> float | None:
        """Completion tokens per second of a whole step on all ranks."""
        step = self.seconds_per_step
        return None if step is None else self.config.completions_per_step * self.mean_length / step


def to_text(parts: Iterable[str | Table]) -> str:
    """Return paragraphs and tables as text."""
    terminal = Console(file=io.StringIO(), width=PAGE_WIDTH)
    with terminal.capture() as captured:
        for part in parts:
            terminal.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def as_text(plan: Plan) -> Iterator[str | Table]:
    """Yield the parts of the plan as text."""
    yield from memory_text(plan)
    yield _times(plan)
    for warning in plan.warnings:
        yield f"Warning: {warning}"
    yield ""
    for sentence in assumptions(plan):
        yield f"- {sentence}"


def memory_text(plan: Plan) -> Iterator[str | Table]:
    """Yield the training, its memory by part and phase, the verdict, and the largest batch settings."""
    yield _subject(plan)
    yield _table(plan)
    yield verdict(plan)
    yield ""
    yield from _limits(plan)


def as_json(plan: Plan) -> str:
    """Return the plan as JSON, with memory in bytes and time in seconds."""
    values: dict[str, Any] = {
        "fits": plan.fits,
        "verdict": verdict(plan),
        "memory": {
            "peak": round(plan.peak_memory),
            "available": round(plan.device.memory),
            "peak_phase": plan.peak_phase,
        },
        "phases": {phase: {part: round(size) for part, size in parts.items()} for phase, parts in plan.phases.items()},
        "largest_that_fits": asdict(plan.limits)
        | {
            "max_tokens_per_micro_batch": plan.limits.micro_batch_size * plan.job.size.length,
            "mini_batch_size": plan.limits.micro_batch_size,
        },
        "seconds": plan.seconds and plan.seconds | {"step": sum(plan.seconds.values())},
        "tokens_per_second": plan.tokens_per_second,
        "device": {"name": plan.device.title, "gpus": plan.device.gpus},
        "engine": plan.job.engine,
        "mixed_precision": plan.config.mixed_precision,
        "parameters": {"policy": plan.job.policy.parameters, "reward_model": plan.job.reward.parameters},
        "warnings": list(plan.warnings),
        "assumptions": list(assumptions(plan)),
    }
    return json.dumps(values, indent=2) + "\n"


def verdict(plan: Plan) -> str:
    """Return whether the training fits, and otherwise how to make it fit."""
    needed = f"{gib(plan.peak_memory)} of {gib(plan.device.memory)} GiB"
    each = " on each GPU" if plan.job.gpus > 1 else ""
    if plan.fits:
        spare = plan.peak_memory < CLOSE * plan.device.memory
        close = "" if spare else " This is close: the estimate can be off by 10%."
        return f"Fits: {needed}{each}, with the peak in phase {plan.peak_phase!r}.{close}"
    needed = f"Does not fit: {needed}{each} in phase {plan.peak_phase!r}"
    limits, rows = plan.limits, plan.rows
    least = max(total(parts) for parts in plan.smaller.values())
    if least > plan.device.memory:
        fewer = ", fewer eval_prompts" if rows.evaluated > rows.step else ""
        return (
            f"{needed}. Even one completion at a time needs {gib(least)} GiB. Use a device with more memory, a smaller "
            f"model{fewer}, or shorter prompts and completions.{_smaller_models(plan)}"
        )
    changes = [option("micro_batch_size", limits.micro_batch_size)] if limits.micro_batch_size < rows.micro else []
    generated = min(rows.concurrent, max(rows.step, rows.evaluated))
    # vLLM reserves its cache for rollout_batch_size completions, even if there are fewer.
    if limits.rollout_batch_size < generated or total(plan.phases["rollout"]) > plan.device.memory:
        changes.append(option("rollout_batch_size", limits.rollout_batch_size))
    return f"{needed}. It fits with {' '.join(changes)}: {gib(least)} GiB, with the same result."


def _smaller_models(plan: Plan) -> str:
    """Return how to reduce the memory of the models themselves with several ranks."""
    job, memory = plan.job, plan.device.memory - LIBRARIES[plan.job.device_kind]
    if job.ranks == 1:
        return ""
    unshardable = job.policy.adapted or job.offload
    sharded = job if unshardable else replace(job, sharded=True)
    if not (job.sharded or unshardable) and _model_bytes(sharded) < min(memory, _model_bytes(job)):
        needed, now = gib(_model_bytes(sharded)), gib(_model_bytes(job))
        return f" Sharded ({option('fsdp')}), the models need {needed} GiB instead of {now}."
    least = _model_bytes(replace(sharded, ranks=UNLIMITED_RANKS))
    if least <= memory:
        return " More GPUs make the shards smaller." if job.sharded else ""
    fixes = [] if job.policy.adapted else [f"adapters on 4-bit weights ({option('use_peft')} {option('load_in_4bit')})"]
    fixes += (
        [f"a reward model behind a server ({option('rewards', 'http://HOST:PORT/get_reward')})"]
        if job.reward.parameters
        else []
    )
    fix = f" Reduce it with {' and '.join(fixes)}." if fixes else ""
    return f" More GPUs don't help: every GPU holds {gib(least)} GiB of the models unsharded.{fix}"


def _model_bytes(job: Job) -> float:
    """Return the bytes of all models with their optimizers, while training or while loading, whichever is larger."""
    return max(total(static(job)), total(loading(job)))


def gib(size: float) -> str:
    """Return bytes in GiB with three digits or more."""
    return f"{size / GIB:.1f}" if size >= 10 * GIB else f"{size / GIB:.2f}"


# --- parts of the text ----------------------------------------------------------------------------------------------


def _subject(plan: Plan) -> str:
    rows, config = plan.rows, plan.config
    devices = f"{plan.job.gpus} x {plan.device.title}" if plan.job.gpus > 1 else plan.device.title
    each = " on each" if plan.job.ranks > 1 else ""
    return (
        f"{config.model}, {_count(plan.job.policy.parameters)} parameters, {config.estimator}, "
        f"{str(plan.job.dtype).removeprefix('torch.')}, on {devices} with {gib(plan.device.memory)} GiB.\n"
        f"Per step{each}: {rows.step} completion{'s' if rows.step > 1 else ''} of {config.max_new_tokens} tokens for prompts of "
        f"{plan.job.size.prompt}, {min(rows.concurrent, rows.step)} generated and {rows.micro} trained at a time."
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _table(plan: Plan) -> Table:
    """Return the table with a row per part and a column per phase; the largest phase is bold."""
    unit, name = (GIB, "GiB") if plan.peak_memory >= GIB_FROM else (MIB, "MiB")
    form = "{:,.1f}" if unit == GIB else "{:,.0f}"
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    grid.add_column(name, no_wrap=True)
    for phase in plan.phases:
        grid.add_column(phase, justify="right", style="bold" if phase == plan.peak_phase else "")
    for part in PARTS:
        sizes = [parts.get(part, 0.0) for parts in plan.phases.values()]
        if max(sizes) >= unit / 20:
            grid.add_row(LABELS.get(part, part), *(form.format(size / unit) if size else "" for size in sizes))
    grid.add_section()
    grid.add_row("total", *(form.format(total(parts) / unit) for parts in plan.phases.values()))
    return grid


def _limits(plan: Plan) -> Iterator[str]:
    limits, rows = plan.limits, plan.rows
    yield "Largest values that fit, each with the other settings unchanged:"
    full = " (the whole step)" if limits.micro_batch_size == rows.step else ""
    yield f"  max_tokens_per_micro_batch  {limits.micro_batch_size * plan.job.size.length or 'none'}{full}"
    yield f"  micro_batch_size            {limits.micro_batch_size or 'none'}{full}"
    full = " (all of them)" if limits.rollout_batch_size == max(rows.step, rows.evaluated) else ""
    yield f"  rollout_batch_size          {limits.rollout_batch_size or 'none'}{full}"
    ranks = plan.job.ranks
    more = " or more" if limits.batch_size >= MAX_PROMPTS // ranks * ranks else ""
    yield f"  batch_size                  {limits.batch_size or 'none'}{more}"


def _times(plan: Plan) -> str:
    if plan.seconds is None:
        return f"Time per step: unknown. Name the GPU ({setting('device')}) to estimate it."
    parts = ", ".join(f"{LABELS.get(phase, phase)} {_time(value)}" for phase, value in plan.seconds.items() if value)
    return f"Time per step: about {_time(sum(plan.seconds.values()))} ({parts})."


def _time(seconds: float) -> str:
    """Return ``0.4 s``, ``45.0 s``, ``6 min``, or ``2 h 05 min``."""
    return f"{seconds:.1f} s" if seconds < 60 else duration(seconds)


def assumptions(plan: Plan) -> Iterator[str]:
    """Yield the assumptions behind the numbers."""
    yield from plan.notes
    device, rates, job = plan.device, plan.device.rates, plan.job
    yield "Memory assumes prompts and completions of full length; shorter ones need less."
    if job.sharded:
        yield (
            f"Every GPU holds one of {job.ranks} shards of what is trained, and all frozen models: a copy of the policy, the "
            "reference, and the reward model. While weights are sharded, it holds them twice in float32."
        )
    elif job.ranks > 1:
        yield "Training is data-parallel: every GPU holds all weights, gradients, and moments. More GPUs only split the rows."
    if job.offload:
        each = 2 * FLOAT + MOMENTS
        ranks = min(job.ranks, max(1, device.gpus))
        needed = each * ranks * sum(learner.trained for learner in job.learners)
        yield (
            f"The optimizer runs in CPU memory and needs {gib(needed)} GiB of it, {each} bytes per weight. The plan doesn't "
            "check that it is available, and its time is a guess."
        )
    overhead = ALLOCATOR[job.device_kind]
    if device.gpus:
        yield (
            f"The CUDA context and {overhead:.0%} of allocator overhead are guesses: the estimate has been checked against "
            "measured peaks on CPUs only."
        )
    else:
        yield f"{overhead:.0%} of what a phase allocates and frees is added for the allocator's overhead."
    if rates is not None:
        of = UTILIZATION_OF_MEASURED if rates.measured else UTILIZATION_OF_DATA_SHEET
        source = "measured just now" if rates.measured else "from the data sheet"
        yield (
            f"Time assumes {format_flops(rates.flops)} and {rates.bytes / 1e9:,.0f} GB/s, {source}, and a utilization of "
            f"{of.products:.0%} and {of.reading:.0%} in passes; decoding reaches {of.decoding:.0%} of peak FLOP/s."
        )
    if device.gpus > 1 and rates is not None:
        yield (
            f"Communication assumes {link_bandwidth(plan.config) / 1e9:,.0f} GB/s between the GPUs of a node, "
            f"{LINK_UTILIZATION:.0%} of the peak, and overlaps with passes."
        )
    if device.gpus and rates is not None:
        yield "Time on GPUs has never been checked against a measurement."
