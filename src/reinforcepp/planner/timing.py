"""Seconds of a training step by phase, from a roofline: FLOPs over peak FLOP/s, or bytes over memory bandwidth.

Each rate is multiplied by the utilization that passes of its kind reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from reinforcepp.config import PlanConfig, ReinforceConfig
from reinforcepp.config.accelerators import ACCELERATORS
from reinforcepp.planner.device import Device, Rates
from reinforcepp.planner.lengths import Floats, Lengths
from reinforcepp.planner.memory import FLOAT, MOMENTS, Job, Rows, chunk_bytes
from reinforcepp.planner.model_costs import TrainedModel

BACKWARD, FROZEN_BACKWARD = 2, 1
"""FLOPs of a backward pass relative to a forward pass; frozen weights need no weight gradients."""
CPU_MEMORY_BANDWIDTH, HOST_LINK_BANDWIDTH = 100e9, 10e9
"""Bytes/s of a server's CPU memory, and between a GPU and unpinned CPU memory. Both are guesses."""
LINK_UTILIZATION = 0.7
"""Fraction of the links' bandwidth that collectives reach: a guess."""
PCIE_BANDWIDTH = 32e9
"""Bytes/s between the GPUs of a node if their link isn't known: PCIe 4, 16 lanes, one direction."""

Gather = Callable[[float], float]
"""Seconds to all-gather a number of bytes of which each device holds an equal part; a reduce-scatter takes the same."""


class Utilization(NamedTuple):
    """Fractions of the peak rates that a training reaches, and the overhead of library calls in seconds."""

    products: float
    """Of peak FLOP/s, in passes over whole rows."""
    decoding: float
    """Of peak FLOP/s, in passes over one token per row."""
    reading: float
    """Of memory bandwidth."""
    call: float
    """Overhead of Python and torch per call in a pass over one token per row; transformers makes thousands of calls."""
    pass_call: float
    """Overhead per call in a pass over whole rows."""


# The first is relative to rates measured by large products and long reads, fitted by benchmarks/scaling.py on one core. The
# second is relative to data sheets: the training of Llama 3 reached 38% to 43% of peak FLOP/s (arXiv 2407.21783, section 3.3),
# and the other numbers are guesses.
UTILIZATION_OF_MEASURED = Utilization(0.84, 0.45, 0.38, 20e-6, 60e-6)
UTILIZATION_OF_DATA_SHEET = Utilization(0.4, 0.4, 0.6, 10e-6, 10e-6)


class Speeds(NamedTuple):
    """Achieved rates per second and call overheads in seconds; the fields are those of :class:`Utilization`."""

    products: float
    decoding: float
    reading: float
    call: float = 0.0
    pass_call: float = 0.0


def achieved(rates: Rates, utilization: Utilization | None = None) -> Speeds:
    """Return what a training achieves of peak ``rates``."""
    of = utilization or (UTILIZATION_OF_MEASURED if rates.measured else UTILIZATION_OF_DATA_SHEET)
    return Speeds(of.products * rates.flops, of.decoding * rates.flops, of.reading * rates.bytes, of.call, of.pass_call)


# --- a step ---------------------------------------------------------------------------------------------------------


def node_seconds(job: Job, rows: Rows, config: PlanConfig, device: Device, lengths: Lengths) -> dict[str, float] | None:
    """Return the seconds of a step on one node by phase, or None if the device's rates aren't known."""
    if device.rates is None:
        return None
    gather = node_gather(config, max(1, device.gpus))
    return parallel_step_seconds(job, rows, config, achieved(device.rates), lengths, gather)


def parallel_step_seconds(
    job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths, gather: Gather
) -> dict[str, float]:
    """Return the seconds of a step by phase, including stragglers ("waiting"), communication, and weight transfer."""
    local = step_seconds(job, rows, config, speeds, lengths)
    elsewhere = job.engine in ("servers", "ray")
    # Under DDP, and with shards, links transfer gradients while passes compute. Sums of separate masters follow the passes.
    overlaps = job.sharded or not (job.has_masters or job.offload)
    hidden = pass_seconds(job, rows, config, speeds, lengths) if overlaps else 0.0
    return {
        "rollout": 0.0 if elsewhere else local["rollout"],
        "waiting": 0.0 if elsewhere else straggler_seconds(job, rows, speeds, lengths),
        "scoring": local["scoring"],
        "update": local["update"],
        "exchange": max(0.0, communication_seconds(job, rows, config, gather) - hidden),
        "sync": weight_transfer_seconds(job, speeds, gather),
    }


def step_seconds(job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths) -> dict[str, float]:
    """Return the seconds of rollout, scoring, and update on the device with the most rows."""
    return {
        "rollout": rollout_seconds(job, rows, speeds, lengths),
        "scoring": scoring_seconds(job, rows, config, speeds, lengths),
        "update": pass_seconds(job, rows, config, speeds, lengths) + adam_seconds(job, rows, config, speeds.reading),
    }


def scoring_seconds(job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths) -> float:
    """Return the seconds of forward passes of the reward model and for log-probabilities; padding is negligible."""
    flops = length_fraction(job, lengths.mean) * (reward_flops(job, rows) + logprob_flops(job, rows, config))
    models = (job.reward.parameters > 0) + 1 + (not reuses_sampling_logprobs(job, config)) + (job.critic is not None)
    passes = models * -(-rows.step // rows.scored)
    return _with_calls(job, flops / speeds.products, speeds.pass_call * passes * job.policy.token_calls)


def pass_seconds(job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths) -> float:
    """Return the seconds of an update's passes. Micro-batches have rows of similar length, so padding is negligible."""
    work = length_fraction(job, lengths.mean) * update_flops(job, rows, config) / speeds.products
    forward = config.updates_per_step * rows.passes * sum(_forward_passes(learner, config) for learner in job.learners)
    return _with_calls(job, work, speeds.pass_call * forward * job.policy.token_calls)


def _with_calls(job: Job, work: float, calls: float) -> float:
    """Combine the seconds of work and call overhead: on a GPU they overlap, on a CPU they add up."""
    return max(work, calls) if job.gpus else work + calls


def length_fraction(job: Job, new: float) -> float:
    """Return the tokens of a row with ``new`` completion tokens relative to the longest possible row."""
    return (job.size.prompt + new) / job.size.length


# --- rollout --------------------------------------------------------------------------------------------------------


def rollout_seconds(job: Job, rows: Rows, speeds: Speeds, lengths: Lengths) -> float:
    """Return the seconds to prefill the prompts and decode all batches, each until its longest completion has finished."""
    decoding = sum(batch_seconds(job, number, speeds, lengths) for number in batches(rows))
    return decoding + prompt_seconds(job, rows.prompts, speeds)


def straggler_seconds(job: Job, rows: Rows, speeds: Speeds, lengths: Lengths) -> float:
    """Return the expected seconds that the slowest rank takes longer than the average rank.

    Lengths are independent, so the difference between ranks grows with the square root of the number of batches.
    """
    number = min(rows.step, rows.concurrent)
    last_T = lengths.any_active(number * job.ranks) - lengths.any_active(number)
    alone = float((last_T * token_seconds(job, np.ones_like(last_T), speeds)).sum())
    return alone * math.sqrt(len(batches(rows)))


def batches(rows: Rows) -> list[int]:
    """Return the sizes of the batches that are generated one after another."""
    full, rest = divmod(rows.step, rows.concurrent)
    return [rows.concurrent] * full + [rest] * (rest > 0)


def prompt_seconds(job: Job, prompts: int, speeds: Speeds) -> float:
    """Return the seconds to prefill ``prompts`` distinct prompts."""
    return prompts * (job.policy.prompt_flops + 2 * job.policy.head) / speeds.products


def batch_seconds(job: Job, number: int, speeds: Speeds, lengths: Lengths) -> float:
    """Return the expected seconds to decode ``number`` completions together."""
    any_T = lengths.any_active(number)
    active_T = number * lengths.active_T / np.maximum(any_T, np.finfo(float).tiny)
    return float((any_T * token_seconds(job, active_T, speeds)).sum())


def token_seconds(job: Job, active_T: Floats, speeds: Speeds) -> Floats:
    """Return the seconds per position to decode one token of each of ``active_T`` completions.

    A pass reads the weights once, and the KV cache of every completion.
    """
    policy = job.policy
    weights = job.dtype.itemsize * policy.packed or policy.stored
    context_T = job.size.prompt + np.arange(len(active_T)) + 0.5
    read_T = (weights + active_T * context_T * job.cache_per_token) / speeds.reading
    work_T = np.maximum(read_T, active_T * policy.token_flops / speeds.decoding)
    calls = speeds.call * policy.token_calls if job.engine == "transformers" else 0.0
    seconds_T: Floats = np.maximum(work_T, calls) if job.gpus else work_T + calls
    return seconds_T


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def forward_flops(learner: TrainedModel, new: int) -> float:
    """Return the FLOPs of a forward pass of one row; separate logits are those of the completion only."""
    return learner.row_flops + (2 * learner.head * new if learner.separate_logits else 0)


def reward_flops(job: Job, rows: Rows) -> float:
    """Return the FLOPs of the reward model per step."""
    return float(rows.step * job.reward.row_flops)


def logprob_flops(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """Return the FLOPs of the reference, of the critic, and of the policy unless sampling gives its log-probabilities."""
    forward = forward_flops(job.policy, job.size.new)
    models = forward if reuses_sampling_logprobs(job, config) else 2 * forward
    return rows.step * (models + (job.critic.row_flops if job.critic is not None else 0))


def update_flops(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """Return the FLOPs of all forward and backward passes, including logits that are recomputed."""
    flops = 0.0
    for learner in job.learners:
        flops += _forward_passes(learner, config) * forward_flops(learner, job.size.new)
        logits = rows.micro * job.size.new * learner.vocabulary * job.dtype.itemsize
        if learner.separate_logits and logits > chunk_bytes(job, learner, rows.micro):
            flops += 2 * learner.head * job.size.new
    return flops * rows.step * config.num_iterations


def _forward_passes(learner: TrainedModel, config: ReinforceConfig) -> int:
    """Return the FLOPs of a forward and a backward pass relative to a forward pass."""
    return 1 + (FROZEN_BACKWARD if learner.adapted else BACKWARD) + config.gradient_checkpointing


def reuses_sampling_logprobs(job: Job, config: ReinforceConfig) -> bool:
    """Return whether the update's own pass gives the log-probabilities of sampling, see ``PolicyUpdate``."""
    shares_forward = job.engine == "transformers"
    return shares_forward and config.learns_as_sampled and config.updates_per_step == 1


# --- optimizer ------------------------------------------------------------------------------------------------------


def adam_seconds(job: Job, rows: Rows, config: ReinforceConfig, reading: float) -> float:
    """Return the seconds of AdamW's steps; with an offloaded optimizer, gradients and weights cross the host link."""
    read = adam_bytes(job, config)
    if not job.offload:
        return read / reading
    later_passes = (rows.passes - 1) * job.dtype.itemsize if job.sums_on_cpu else 0
    each = FLOAT + later_passes + job.dtype.itemsize
    transferred = each * sum(learner.trained for learner in job.learners)
    return read / CPU_MEMORY_BANDWIDTH + transferred * config.updates_per_step / HOST_LINK_BANDWIDTH


def adam_bytes(job: Job, config: ReinforceConfig) -> float:
    """Return the bytes AdamW moves: it reads weight, gradient, and moments, and writes all but the gradient.

    In bfloat16 it also writes the rounded weight.
    """
    each = 2 * (FLOAT + MOMENTS) + FLOAT + (job.dtype.itemsize if job.has_masters else 0)
    return float(each * sum(learner.trained for learner in job.learners) / job.shards * config.updates_per_step)


# --- links ----------------------------------------------------------------------------------------------------------


def link_bandwidth(config: PlanConfig) -> float:
    """Return the bytes/s that each GPU receives from the others of its node."""
    sheet = ACCELERATORS.get(config.device)
    return LINK_UTILIZATION * (PCIE_BANDWIDTH if sheet is None else sheet.link_gigabytes_per_second * 1e9)


def node_gather(config: PlanConfig, gpus: int) -> Gather:
    """Return the all-gather time between the ``gpus`` of one node."""
    return lambda size: size * (gpus - 1) / gpus / link_bandwidth(config)


def communication_seconds(job: Job, rows: Rows, config: ReinforceConfig, gather: Gather) -> float:
    """Return the seconds to reduce the gradients of a step, and to gather sharded weights.

    Unsharded: an all-reduce in float32 per optimizer step, which is a reduce-scatter and an all-gather. Sharded: each pass
    gathers the weights forward and backward, and reduces gradients in float32.
    """
    steps = config.updates_per_step
    passes = steps * rows.passes
    seconds = 0.0
    for learner in job.learners:
        if job.sharded:
            weights = gather(job.dtype.itemsize * learner.parameters)
            seconds += passes * (2 * weights + gather(FLOAT * learner.trained))
        else:
            seconds += steps * 2 * gather(FLOAT * learner.trained)
    return seconds


def weight_transfer_seconds(job: Job, speeds: Speeds, gather: Gather) -> float:
    """Return the seconds until the engine in this process has the new weights.

    Shards are gathered in float32 for the copy that generates and scores. vLLM's own weights are overwritten.
    """
    seconds = sum(gather(FLOAT * learner.parameters) for learner in job.learners) if job.sharded else 0.0
    if job.engine == "vllm":
        seconds += 2 * job.dtype.itemsize * job.policy.parameters / speeds.reading
    return seconds
