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
from reinforcepp.rewards.trained import SCORING_BATCH_SIZE

BACKWARD, FROZEN_BACKWARD = 2, 1
"""Operations of a backward pass, in forward passes; weights that don't learn have no gradients of their own."""
MAIN_MEMORY, LINK = 100e9, 10e9
"""Bytes a second of a server's main memory, and between it and a GPU from memory that isn't pinned: guesses."""


class Shares(NamedTuple):
    """Of the rates of large products and of reading memory, what a training reaches, and seconds of a call of the library."""

    products: float
    """In passes over whole rows."""
    decoding: float
    """In products with one token of each row."""
    reading: float
    call: float
    """Python's and torch's own time where one token of each row goes through the model; transformers makes thousands."""
    pass_call: float
    """The same with whole rows."""


# Of rates measured as large products and long reads: fitted by benchmarks/scaling.py on one core.
# Of a data sheet's: the training of Llama 3 reached 38 to 43 % of the products (arXiv 2407.21783, section 3.3); all else is a
# guess.
OF_MEASURED, OF_SHEET = Shares(0.84, 0.45, 0.38, 20e-6, 60e-6), Shares(0.4, 0.4, 0.6, 10e-6, 10e-6)


class Speeds(NamedTuple):
    """What is done in a second, and the seconds of a call, as in ``Shares``."""

    products: float
    decoding: float
    reading: float
    call: float = 0.0
    pass_call: float = 0.0


def reached(rates: Rates, shares: Shares | None = None) -> Speeds:
    """What a training reaches of ``rates``."""
    of = shares or (OF_MEASURED if rates.measured else OF_SHEET)
    operations = rates.operations
    return Speeds(of.products * operations, of.decoding * operations, of.reading * rates.bytes, of.call, of.pass_call)


def step_seconds(job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths) -> dict[str, float]:
    """Rollout, scoring and update of one step, on the device with the most rows."""
    return {
        "rollout": rollout_seconds(job, rows, speeds, lengths),
        "scoring": scoring_seconds(job, rows, config, speeds, lengths),
        "update": pass_seconds(job, rows, config, speeds, lengths) + adam_seconds(job, rows, config, speeds.reading),
    }


def scoring_seconds(job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths) -> float:
    """Forward passes of the reward model, whose rows are padded to the longest, and of those that give log-probabilities."""
    padded = lengths.longest(min(rows.step, SCORING_BATCH_SIZE))
    rewards = answered_share(job, padded) * rewarding_operations(job, rows)
    asked = answered_share(job, lengths.mean) * asking_operations(job, rows, config)
    models = 1 + (not on_policy(job, config)) + (job.critic is not None)
    passes = -(-rows.step // SCORING_BATCH_SIZE) * (job.reward.parameters > 0) + models * -(-rows.step // rows.micro)
    return _with_calls(job, (rewards + asked) / speeds.products, speeds.pass_call * passes * job.policy.token_calls)


def pass_seconds(job: Job, rows: Rows, config: ReinforceConfig, speeds: Speeds, lengths: Lengths) -> float:
    """Forward and backward passes of an update; rows of similar length are together, so hardly anything is padding."""
    work = answered_share(job, lengths.mean) * update_operations(job, rows, config) / speeds.products
    forward = config.updates_per_step * rows.passes * sum(_passes(learner, config) for learner in job.learners)
    return _with_calls(job, work, speeds.pass_call * forward * job.policy.token_calls)


def _with_calls(job: Job, work: float, calls: float) -> float:
    """A GPU works while the next calls are prepared, a CPU can't."""
    return max(work, calls) if job.gpus else work + calls


def answered_share(job: Job, new: float) -> float:
    """Tokens of a row with so many ``new`` ones, over what they can be at the most."""
    return (job.size.prompt + new) / job.size.length


def rollout_seconds(job: Job, rows: Rows, speeds: Speeds, lengths: Lengths) -> float:
    """Prompts once, then a token of each completion at a time, until the longest that are generated together has ended."""
    answers = sum(batch_seconds(job, number, speeds, lengths) for number in batches(rows))
    return answers + prompt_seconds(job, rows.prompts, speeds)


def waiting_seconds(job: Job, rows: Rows, speeds: Speeds, lengths: Lengths) -> float:
    """How much longer the device takes whose completions are the longest of all; the others wait.

    Lengths are independent, so between devices several batches in a row differ by the root of their number times what one
    of them does.
    """
    number = min(rows.step, rows.at_a_time)
    last_T = lengths.any_of(number * job.ranks) - lengths.any_of(number)
    alone = float((last_T * token_seconds(job, np.ones_like(last_T), speeds)).sum())
    return alone * math.sqrt(len(batches(rows)))


def batches(rows: Rows) -> list[int]:
    """How many completions are generated together, one batch after the other."""
    whole, left = divmod(rows.step, rows.at_a_time)
    return [rows.at_a_time] * whole + [left] * (left > 0)


def prompt_seconds(job: Job, prompts: int, speeds: Speeds) -> float:
    """Different prompts before the first token."""
    return prompts * (job.policy.prompt_flops + 2 * job.policy.head) / speeds.products


def batch_seconds(job: Job, number: int, speeds: Speeds, lengths: Lengths) -> float:
    """Expected seconds of so many completions that are generated together."""
    any_T = lengths.any_of(number)
    going_T = number * lengths.going_T / np.maximum(any_T, np.finfo(float).tiny)
    return float((any_T * token_seconds(job, going_T, speeds)).sum())


def token_seconds(job: Job, going_T: Floats, speeds: Speeds) -> Floats:
    """Seconds for one more token of each of ``going_T`` completions, at each place of them from the first on.

    Weights are read once for all of them, keys and values for each.
    """
    policy = job.policy
    weights = job.dtype.itemsize * policy.packed or policy.stored
    context_T = job.size.prompt + np.arange(len(going_T)) + 0.5
    read_T = (weights + going_T * context_T * policy.cache_per_token) / speeds.reading
    work_T = np.maximum(read_T, going_T * policy.token_flops / speeds.decoding)
    calls = speeds.call * policy.token_calls if job.engine == "transformers" else 0.0
    seconds_T: Floats = np.maximum(work_T, calls) if job.gpus else work_T + calls
    return seconds_T


def answer_operations(learner: Shape, new: int) -> float:
    """Forward pass of one row, with logits of the completion alone where they are computed apart."""
    return learner.row_flops + (2 * learner.head * new if learner.logits_apart else 0)


def rewarding_operations(job: Job, rows: Rows) -> float:
    """Of the reward model."""
    return float(rows.step * job.reward.row_flops)


def asking_operations(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """Of the reference, the policy where the update doesn't give its log-probabilities, and the critic."""
    own = answer_operations(job.policy, job.size.new)
    asked = own if on_policy(job, config) else 2 * own
    return rows.step * (asked + (job.critic.row_flops if job.critic is not None else 0))


def update_operations(job: Job, rows: Rows, config: ReinforceConfig) -> float:
    """Forward and backward of each learner, and logits again where they were too many to be kept."""
    total = 0.0
    for learner in job.learners:
        total += _passes(learner, config) * answer_operations(learner, job.size.new)
        kept = rows.micro * job.size.new * learner.vocabulary * job.dtype.itemsize <= chunk_bytes(
            job, learner, rows.micro
        )
        if learner.logits_apart and not kept:
            total += 2 * learner.head * job.size.new
    return total * rows.step * config.num_iterations


def _passes(learner: Shape, config: ReinforceConfig) -> int:
    """What a forward and a backward pass take, in forward passes."""
    return 1 + (FROZEN_BACKWARD if learner.adapted else BACKWARD) + config.gradient_checkpointing


def adam_seconds(job: Job, rows: Rows, config: ReinforceConfig, reading: float) -> float:
    """AdamW's step where its tensors are; from main memory gradients and weights have to travel."""
    needed = adam_bytes(job, config)
    if not job.offload:
        return needed / reading
    there_and_back = rows.passes + 1
    carried = there_and_back * job.dtype.itemsize * sum(learner.trained for learner in job.learners)
    return needed / MAIN_MEMORY + carried * config.updates_per_step / LINK


def adam_bytes(job: Job, config: ReinforceConfig) -> float:
    """AdamW reads weight, gradient and moments and writes all but the gradient, and in bfloat16 the rounded weight."""
    each = 2 * (FLOAT + MOMENTS) + FLOAT + (job.dtype.itemsize if job.narrow else 0)
    return float(each * sum(learner.trained for learner in job.learners) / job.shards * config.updates_per_step)


def on_policy(job: Job, config: ReinforceConfig) -> bool:
    """Whether the update's own pass gives the log-probabilities of sampling: see ``PolicyUpdate``."""
    own_forward = job.engine == "transformers"
    return own_forward and config.learns_as_sampled and config.updates_per_step == 1
