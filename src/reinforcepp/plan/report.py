"""The plan as a table and a few sentences for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich import box
from rich.table import Table

from reinforcepp.config import PlanConfig
from reinforcepp.plan.exchange import OF_LINKS, links_for
from reinforcepp.plan.machine import GIB, Machine
from reinforcepp.plan.memory import ALLOCATOR, FLOAT, LIBRARIES, MIB, MOMENTS, PARTS, Job, Rows, loading, total
from reinforcepp.plan.memory import standing as standing_parts
from reinforcepp.plan.scaling import Scale
from reinforcepp.plan.search import MOST_PROMPTS, Largest
from reinforcepp.plan.timing import OF_MEASURED, OF_SHEET

SHOWN_IN_GIB = 10 * GIB
ENDLESS = 1 << 40
"""Devices, of which each has next to nothing of what is in shards."""
NARROW = 0.9
"""Share of the memory from which on a fit is no certainty."""


@dataclass(frozen=True)
class Plan:
    """What the planner found."""

    config: PlanConfig
    machine: Machine
    job: Job
    rows: Rows
    phases: dict[str, dict[str, float]]
    """Bytes by phase and part."""
    limits: Largest
    smaller: dict[str, dict[str, float]]
    """The same with the largest micro_batch_size and rollout_batch_size that fit, or with 1 where none does."""
    scales: tuple[Scale, ...]
    """A step on 1, 2, 4, ... machines and, the last, on all; none where the device's speed isn't known."""
    said: tuple[str, ...]
    """What was assumed of this training."""

    @property
    def seconds(self) -> dict[str, float] | None:
        """Of a step, by phase."""
        return self.scales[-1].seconds if self.scales else None

    @property
    def peak_phase(self) -> str:
        """Where the most memory is needed."""
        return max(self.phases, key=lambda name: total(self.phases[name]))

    @property
    def peak(self) -> float:
        """Bytes needed there."""
        return total(self.phases[self.peak_phase])

    @property
    def fits(self) -> bool:
        """Whether there is that much."""
        return self.peak <= self.machine.memory


def verdict(plan: Plan) -> str:
    """One sentence: does it fit, and if not, what would?"""
    needed = f"{gib(plan.peak)} of {gib(plan.machine.memory)} GiB"
    each = " on each GPU" if plan.job.gpus > 1 else ""
    if plan.fits:
        spare = plan.peak < NARROW * plan.machine.memory
        close = "" if spare else " That is close: the estimate may be off by a tenth."
        return f"Fits: {needed}{each}, the most of it in the phase {plan.peak_phase!r}.{close}"
    needed = f"Does not fit: {needed}{each} in the phase {plan.peak_phase!r}"
    limits, rows = plan.limits, plan.rows
    least = max(total(parts) for parts in plan.smaller.values())
    if least > plan.machine.memory:
        fewer = ", fewer eval_prompts" if rows.evaluated > rows.step else ""
        return (
            f"{needed}. Even one completion at a time takes {gib(least)} GiB: take a device with more memory, a smaller "
            f"model{fewer}, or shorter prompts and completions.{_less_standing(plan)}"
        )
    changes = [f"--micro_batch_size {limits.micro_batch_size}"] if limits.micro_batch_size < rows.micro else []
    generated = min(rows.at_a_time, max(rows.step, rows.evaluated))
    if limits.rollout_batch_size < generated:
        changes.append(f"--rollout_batch_size {limits.rollout_batch_size}")
    return f"{needed}. It fits with {' '.join(changes)}: {gib(least)} GiB, and the same result."


def _less_standing(plan: Plan) -> str:
    """What would make the models themselves smaller, where several devices have them."""
    job, memory = plan.job, plan.machine.memory - LIBRARIES[plan.job.place]
    if job.ranks == 1:
        return ""
    whole = job.policy.adapted or job.offload
    cut_up = job if whole else replace(job, sharded=True)
    if not (job.sharded or whole) and _models(cut_up) < min(memory, _models(job)):
        return (
            f" In shards (--fsdp) the models themselves take {gib(_models(cut_up))} GiB instead of {gib(_models(job))}."
        )
    least = _models(replace(cut_up, ranks=ENDLESS))
    if least <= memory:
        more = "GPUs that train (--trainers)" if plan.config.pooled else "machines (--nodes)"
        return f" More {more} make the parts smaller." if job.sharded else ""
    cures = [] if job.policy.adapted else ["adapters to weights of 4 bits (--use_peft --load_in_4bit)"]
    cures += ["a reward model behind a server (--rewards http://HOST:PORT/get_reward)"] if job.reward.parameters else []
    cure = f" Less is taken by {' and '.join(cures)}." if cures else ""
    return f" More GPUs don't help: of the models {gib(least)} GiB are on each, whole.{cure}"


def _models(job: Job) -> float:
    """Bytes of all models, of what they learn with, and of what they are loaded with."""
    return max(total(standing_parts(job)), total(loading(job)))


def as_text(plan: Plan) -> Iterator[str | Table]:
    """The plan for people."""
    yield _subject(plan)
    yield _table(plan)
    yield verdict(plan)
    yield ""
    yield from _limits(plan)
    yield _times(plan)
    if plan.config.nodes is not None and plan.scales:
        yield _scales(plan)
    yield ""
    for sentence in assumptions(plan):
        yield f"- {sentence}"


def as_json(plan: Plan) -> str:
    """The plan for programs; memory in bytes, time in seconds."""
    told: dict[str, Any] = {
        "fits": plan.fits,
        "verdict": verdict(plan),
        "memory": {"peak": round(plan.peak), "available": round(plan.machine.memory), "peak_phase": plan.peak_phase},
        "phases": {phase: {part: round(size) for part, size in parts.items()} for phase, parts in plan.phases.items()},
        # The setting's old name stays for programs that read it.
        "largest_that_fits": asdict(plan.limits) | {"mini_batch_size": plan.limits.micro_batch_size},
        "seconds": plan.seconds and plan.seconds | {"step": sum(plan.seconds.values())},
        "scaling": [
            asdict(scale) | {"speedup": speedup(plan, scale), "efficiency": efficiency(plan, scale)}
            for scale in plan.scales
        ],
        "device": {"name": plan.machine.title, "gpus": plan.machine.gpus},
        "engine": plan.job.engine,
        "parameters": {"policy": plan.job.policy.parameters, "reward_model": plan.job.reward.parameters},
        "assumptions": list(assumptions(plan)),
    }
    return json.dumps(told, indent=2) + "\n"


def gib(size: float) -> str:
    """In GiB, with as many digits as matter."""
    return f"{size / GIB:.1f}" if size >= 10 * GIB else f"{size / GIB:.2f}"


# --- parts of the text ----------------------------------------------------------------------------------------------


def _subject(plan: Plan) -> str:
    rows, config = plan.rows, plan.config
    number = config.trainers if config.pooled else plan.machine.gpus
    devices = f"{number} x {plan.machine.title}" if plan.job.gpus > 1 else plan.machine.title
    nodes = "" if config.pooled or not plan.scales or plan.scales[-1].nodes == 1 else f"{plan.scales[-1].nodes} x "
    devices = nodes + devices
    each = " on each" if plan.job.ranks > 1 else ""
    return (
        f"{config.model}, {_count(plan.job.policy.parameters)} parameters, {config.estimator}, "
        f"{str(plan.job.dtype).removeprefix('torch.')}, on {devices} with {gib(plan.machine.memory)} GiB.\n"
        f"A step{each}: {rows.step} completions of {config.max_new_tokens} tokens to prompts of "
        f"{config.max_prompt_length}, {min(rows.at_a_time, rows.step)} generated and {rows.micro} trained on at a time."
    )


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e9 else f"{number / 1e6:.1f} million"


def _table(plan: Plan) -> Table:
    """Parts down, phases across; the largest phase stands out."""
    unit, name = (GIB, "GiB") if plan.peak >= SHOWN_IN_GIB else (MIB, "MiB")
    form = "{:,.1f}" if unit == GIB else "{:,.0f}"
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    grid.add_column(name, no_wrap=True)
    for phase in plan.phases:
        grid.add_column(phase, justify="right", style="bold" if phase == plan.peak_phase else "")
    for part in PARTS:
        sizes = [parts.get(part, 0.0) for parts in plan.phases.values()]
        if max(sizes) >= unit / 20:
            grid.add_row(part, *(form.format(size / unit) if size else "" for size in sizes))
    grid.add_section()
    grid.add_row("together", *(form.format(total(parts) / unit) for parts in plan.phases.values()))
    return grid


def _limits(plan: Plan) -> Iterator[str]:
    limits, rows = plan.limits, plan.rows
    yield "The largest that fit, each with the other settings as they are:"
    whole = " (all of a step)" if limits.micro_batch_size == rows.step else ""
    yield f"  micro_batch_size    {limits.micro_batch_size or 'none'}{whole}"
    whole = " (all of them)" if limits.rollout_batch_size == max(rows.step, rows.evaluated) else ""
    yield f"  rollout_batch_size  {limits.rollout_batch_size or 'none'}{whole}"
    ranks = plan.job.ranks
    more = " or more" if limits.batch_size >= MOST_PROMPTS // ranks * ranks else ""
    yield f"  batch_size          {limits.batch_size or 'none'}{more}"


def _times(plan: Plan) -> str:
    if plan.seconds is None:
        return "Time of a step: name the GPU (--device) to have it estimated."
    parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in plan.seconds.items() if seconds)
    return f"Time of a step: about {sum(plan.seconds.values()):.1f} s ({parts})."


def speedup(plan: Plan, scale: Scale) -> float:
    """Tokens a second, over those of one machine."""
    return scale.tokens_per_second / plan.scales[0].tokens_per_second


def efficiency(plan: Plan, scale: Scale) -> float:
    """The speed-up, over the devices that there are for each of one machine's."""
    return speedup(plan, scale) * plan.scales[0].devices / scale.devices


def _scales(plan: Plan) -> Table:
    """Phases down, machines across."""
    scales = plan.scales
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    grid.add_column("machines", no_wrap=True)
    for scale in scales:
        grid.add_column(str(scale.nodes), justify="right")
    whose = "workers" if plan.config.pooled else "GPUs" if plan.job.gpus else "processes"
    grid.add_row(whose, *(str(scale.devices) for scale in scales))
    for phase in scales[0].seconds:
        if any(scale.seconds[phase] for scale in scales):
            grid.add_row(f"{phase}, s", *(f"{scale.seconds[phase]:,.2f}" for scale in scales))
    grid.add_section()
    grid.add_row("step, s", *(f"{scale.step:,.2f}" for scale in scales))
    grid.add_row("tokens a second", *(f"{scale.tokens_per_second:,.0f}" for scale in scales))
    grid.add_row("speed-up", *(f"{speedup(plan, scale):.2f}" for scale in scales))
    grid.add_row("efficiency", *(f"{efficiency(plan, scale):.0%}" for scale in scales))
    return grid


def assumptions(plan: Plan) -> Iterator[str]:
    """What the figures rest on."""
    yield from plan.said
    machine, rates = plan.machine, plan.machine.rates
    yield "Memory is counted for prompts and completions of full length; shorter ones take less."
    if plan.job.sharded:
        yield (
            f"Every GPU holds one of {plan.job.ranks} parts of what is learnt, and all of what is asked: a copy of the policy, "
            "the reference and the reward model. While weights are cut up it holds them twice in float32."
        )
    elif plan.job.ranks > 1:
        yield "Training is data-parallel: every GPU holds all weights, gradients and moments, so more GPUs share rows only."
    if plan.job.offload:
        each = 2 * FLOAT + MOMENTS
        beside = min(plan.job.ranks, max(1, machine.gpus))
        needed = each * beside * sum(learner.trained for learner in plan.job.learners)
        yield (
            f"AdamW's step is made in main memory, of which it takes {gib(needed)} GiB, {each} bytes a weight; that isn't "
            "checked, and the time of it is a guess."
        )
    share = ALLOCATOR[plan.job.place]
    if machine.gpus:
        yield (
            f"The CUDA context and {share:.0%} for what the allocator can't use are guesses: the estimate has been checked "
            "against measured peaks on CPUs only."
        )
    else:
        yield f"{share:.0%} of what a phase makes and frees are added for what the allocator can't use."
    if rates is not None:
        shares = OF_MEASURED if rates.measured else OF_SHEET
        whose = "measured here just now" if rates.measured else "from the data sheet"
        yield (
            f"Time: {_tera(rates.operations)} and {rates.bytes / 1e9:,.0f} GB/s, {whose}, of which passes are taken to reach "
            f"{shares.products:.0%} and {shares.reading:.0%}, decoding {shares.decoding:.0%} of the products."
        )
    yield from _of_many(plan)
    if machine.gpus and rates is not None:
        yield "Time on GPUs, on one or on many, was never checked against a measurement."


def _of_many(plan: Plan) -> Iterator[str]:
    """What the time on several devices rests on."""
    if not plan.scales or (plan.scales[-1].devices == 1 and not plan.config.pooled):
        return
    config, machine, scale = plan.config, plan.machine, plan.scales[-1]
    links = links_for(config, scale.nodes, machine.gpus)
    speeds = (
        [f"{links.inside / 1e9:,.0f} GB/s between the GPUs of a machine"]
        if machine.gpus > 1 and (config.trainers > 1 or not config.pooled)
        else []
    )
    speeds += [f"{links.between / 1e9:,.0f} GB/s between machines"] if scale.nodes > 1 or config.pooled else []
    yield (
        f"Links are taken to reach {' and '.join(speeds)}, {OF_LINKS:.0%} of what they could, and to work while passes compute."
    )
    if config.pooled:
        yield (
            f"The pool has {scale.devices} workers on {scale.nodes} machines. The scheduler's own code deals prompts out to "
            "simulated ones."
        )


def _tera(rate: float) -> str:
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
