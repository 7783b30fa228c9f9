"""Seconds of a training step by its phases: operations over the rate of products, or bytes over that of memory.

A roofline: what the machine could do, times the share of it that a pass of this kind reaches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from reinforcepp.config import ReinforceConfig
from reinforcepp.plan.lengths import Floats, Lengths
from reinforcepp.plan.machine import Rates
from reinforcepp.plan.memory import FLOAT, MOMENTS, Job, Rows, chunk_bytes
from reinforcepp.plan.shapes import Shape

BACKWARD, FROZEN_BACKWARD = 2, 1
"""Operations of a backward pass, in forward passes; weights that don't learn have no gradients of their own."""
MAIN_MEMORY, LINK = 100e9, 10e9
"""Bytes a second of a server's main memory, and between it and a GPU from memory that isn't pinned: guesses."""
CALL_SECONDS = 10e-6
"""Python's and torch's own time for one call of the library; generation by transformers makes thousands for a token."""


class Shares(NamedTuple):
    """Of the rate of products and of that of reading memory, what a pass reaches."""

    products: float
    reading: float


# Of rates measured as large products and long reads: about what benchmarks/peers.py finds of this package's own step.
# Of a data sheet's: the training of Llama 3 reached 38 to 43 % of the products (arXiv 2407.21783, section 3.3); the
# share of reading is a guess.
OF_MEASURED, OF_SHEET = Shares(0.7, 0.7), Shares(0.4, 0.6)


def step_seconds(job: Job, rows: Rows, config: ReinforceConfig, rates: Rates, lengths: Lengths) -> dict[str, float]:
    """Rollout, scoring and update of one step, on the device with the most rows, at ``rates`` that passes reach."""
    share = answered_share(job, lengths)
    return {
        "rollout": rollout_seconds(job, rows, rates, lengths),
        "scoring": share * scoring_operations(job, rows, config) / rates.operations,
        "update": pass_seconds(job, rows, config, rates, lengths) + adam_seconds(job, rows, config, rates.bytes),
    }


def reached(rates: Rates) -> Rates:
    """What passes reach of ``rates``."""
    shares = OF_MEASURED if rates.measured else OF_SHEET
    return Rates(rates.operations * shares.products, rates.bytes * shares.reading, rates.measured)


def answered_share(job: Job, lengths: Lengths) -> float:
    """Tokens of a row over what they can be at the most: rows of similar length are padded to the longest of them alone."""
    return (job.size.prompt + lengths.mean) / job.size.length


def rollout_seconds(job: Job, rows: Rows, rates: Rates, lengths: Lengths) -> float:
    """Prompts once, then a token of each completion at a time, until the longest that are generated together has ended."""
    return sum(batch_seconds(job, number, rates, lengths) for number in batches(rows)) + prompt_seconds(
        job, rows.prompts, rates
    )


def waiting_seconds(job: Job, rows: Rows, rates: Rates, lengths: Lengths) -> float:
    """How much longer the device takes whose completions are the longest of all; the others wait.

    Lengths are independent, so between devices several batches in a row differ by the root of their number times what one
    of them does.
    """
    number = min(rows.step, rows.at_a_time)
    last_T = lengths.any_of(number * job.ranks) - lengths.any_of(number)
    alone = float((last_T * token_seconds(job, np.ones_like(last_T), rates)).sum())
    return alone * math.sqrt(len(batches(rows)))


def batches(rows: Rows) -> list[int]:
    """How many completions are generated together, one batch after the other."""
    whole, left = divmod(rows.step, rows.at_a_time)
    return [rows.at_a_time] * whole + [left] * (left > 0)


def prompt_seconds(job: Job, prompts: int, rates: Rates) -> float:
    """Different prompts before the first token."""
    return prompts * (job.policy.prompt_flops + 2 * job.policy.head) / rates.operations


def batch_seconds(job: Job, number: int, rates: Rates, lengths: Lengths) -> float:
    """Expected seconds of so many completions that are generated together."""
    any_T = lengths.any_of(number)
    going_T = number * lengths.going_T / np.maximum(any_T, np.finfo(float).tiny)
    return float((any_T * token_seconds(job, going_T, rates)).sum())


def token_seconds(job: Job, going_T: Floats, rates: Rates) -> Floats:
    """Seconds for one more token of each of ``going_T`` completions, at each place of them from the first on.

    Weights are read once for all of them, keys and values for each.
    """
    policy = job.policy
    weights = job.dtype.itemsize * policy.packed or policy.stored
    context_T = job.size.prompt + np.arange(len(going_T)) + 0.5
    read_T = (weights + going_T * context_T * policy.cache_per_token) / rates.bytes
    work_T = np.maximum(read_T, going_T * policy.token_flops / rates.operations)
    calls = CALL_SECONDS * policy.token_calls if job.engine == "transformers" else 0.0
    # a GPU works while the next calls are prepared, a CPU can't
    seconds_T: Floats = np.maximum(work_T, calls) if job.gpus else work_T + calls
    return seconds_T


def pass_seconds(job: Job, rows: Rows, config: ReinforceConfig, rates: Rates, lengths: Lengths) -> float:
    """Forward and backward passes of an update."""
    return answered_share(job, lengths) * update_operations(job, rows, config) / rates.operations


def answer_operations(learner: Shape, new: int) -> float:
    """Forward pass of one row, with logits of the completion alone where they are computed apart."""
    return learner.row_flops + (2 * learner.head * new if learner.logits_apart else 0)


def scoring_operations(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """Reward model, reference, the policy where the update doesn't give its log-probabilities, and the critic."""
    own = answer_operations(job.policy, job.size.new)
    passes = [float(job.reward.row_flops), own]
    if not on_policy(job, rows, config):
        passes.append(own)
    if job.critic is not None:
        passes.append(job.critic.row_flops)
    return rows.step * sum(passes)


def update_operations(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """Forward and backward of each learner, and logits again where they were too many to be kept."""
    total = 0.0
    for learner in job.learners:
        passes = 1 + (FROZEN_BACKWARD if learner.adapted else BACKWARD) + config.gradient_checkpointing
        total += passes * answer_operations(learner, job.size.new)
        kept = rows.micro * job.size.new * learner.vocabulary * job.dtype.itemsize <= chunk_bytes(
            job, learner, rows.micro
        )
        if learner.logits_apart and not kept:
            total += 2 * learner.head * job.size.new
    return total * rows.step * config.num_iterations


def adam_seconds(job: Job, rows: Rows, config: ReinforceConfig, reading: float) -> float:
    """AdamW's step where its tensors are; from main memory gradients and weights have to travel."""
    needed = adam_bytes(job, rows, config)
    if not job.offload:
        return needed / reading
    there_and_back = rows.passes + 1
    carried = there_and_back * job.dtype.itemsize * sum(learner.trained for learner in job.learners)
    return needed / MAIN_MEMORY + carried * updates(rows, config) / LINK


def adam_bytes(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """AdamW reads weight, gradient and moments and writes all but the gradient, and in bfloat16 the rounded weight."""
    each = 2 * (FLOAT + MOMENTS) + FLOAT + (job.dtype.itemsize if job.narrow else 0)
    return float(each * sum(learner.trained for learner in job.learners) / job.shards * updates(rows, config))


def updates(rows: Rows, config: ReinforceConfig) -> int:
    """Optimiser steps of a training step."""
    return config.num_iterations * -(-rows.step // min(config.optimizer_batch_size, rows.step))


def on_policy(job: Job, rows: Rows, config: ReinforceConfig) -> bool:
    """Whether the update's own pass gives the log-probabilities of sampling: see ``PolicyUpdate``."""
    own_forward = job.engine == "transformers"
    return own_forward and config.learns_as_sampled and updates(rows, config) == 1
