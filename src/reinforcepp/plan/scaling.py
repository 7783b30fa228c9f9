"""A training step on more and more machines: the phases of one device, and what comes from being many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from reinforcepp.config import PlanConfig
from reinforcepp.plan.exchange import exchange_seconds, links_for, sync_seconds
from reinforcepp.plan.lengths import Lengths
from reinforcepp.plan.machine import Machine
from reinforcepp.plan.memory import Job, Rows
from reinforcepp.plan.pool import SimulatedPool, rounds
from reinforcepp.plan.timing import (
    Speeds,
    pass_seconds,
    prompt_seconds,
    reached,
    step_seconds,
    token_seconds,
    waiting_seconds,
)

TRIES = 3
"""Simulated rollouts of a pool, of which the mean is told."""


@dataclass(frozen=True)
class Scale:
    """A step on so many machines."""

    nodes: int
    devices: int
    """That train, or with a pool its workers."""
    seconds: dict[str, float]
    """By phase."""
    tokens_per_second: float
    """Of completions, over the whole step."""

    @property
    def step(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


def nodes_of(config: PlanConfig, per_node: int) -> int:
    """How many machines ``config`` means: of a pool as many as its workers need, if it isn't said."""
    gpus = config.rollout_workers * config.vllm_tensor_parallel_size if config.pooled else 0
    return config.nodes or -(-gpus // per_node) or 1


def scales(job: Job, config: PlanConfig, machine: Machine, lengths: Lengths, nodes: int) -> list[Scale]:
    """The step on 1, 2, 4, ... machines up to ``nodes``; none where nothing is known of the device's speed."""
    if machine.rates is None:
        return []
    numbers = sorted({1 << i for i in range(nodes.bit_length()) if 1 << i < nodes} | {nodes})
    return [on_nodes(job, config, machine, lengths, number) for number in numbers]


def on_nodes(job: Job, config: PlanConfig, machine: Machine, lengths: Lengths, nodes: int) -> Scale:
    """The step on so many of ``machine``, whose speed is known."""
    assert machine.rates is not None
    per_node = max(1, machine.gpus)
    devices = nodes * per_node
    links, speeds = links_for(config, nodes, per_node), reached(machine.rates)
    if config.pooled:
        devices = max(1, devices // config.vllm_tensor_parallel_size)
        devices = min(config.rollout_workers or devices, devices)
        among = links_for(config, -(-job.ranks // per_node), min(job.ranks, per_node))
    else:
        job, among = replace(job, ranks=devices, gpus=devices if machine.gpus else 0), links
    rows = Rows.of(config, job.ranks)
    alone = step_seconds(job, rows, config, speeds, lengths)
    if config.pooled:
        own, waiting = pool_seconds(job, config, together(speeds, config), lengths, devices)
    else:
        own, waiting = alone["rollout"], waiting_seconds(job, rows, speeds, lengths)
    # links work while passes compute
    hidden = pass_seconds(job, rows, config, speeds, lengths)
    exchange = max(0.0, exchange_seconds(job, rows, config, among) - hidden)
    seconds = {
        "rollout": own,
        "waiting": waiting,
        "scoring": alone["scoring"],
        "update": alone["update"],
        "exchange": exchange,
        "sync": sync_seconds(job, speeds, among, links),
    }
    return Scale(nodes, devices, seconds, config.completions_per_step * lengths.mean / sum(seconds.values()))


def together(speeds: Speeds, config: PlanConfig) -> Speeds:
    """Of the GPUs that share a worker's model, as if they had nothing to tell each other."""
    size = config.vllm_tensor_parallel_size
    return speeds._replace(
        products=size * speeds.products, decoding=size * speeds.decoding, reading=size * speeds.reading
    )


def pool_seconds(job: Job, config: PlanConfig, speeds: Speeds, lengths: Lengths, workers: int) -> tuple[float, float]:
    """Seconds that a worker of a pool generates in a step, in the mean, and that it waits until the last one has ended."""
    most = max(1, config.rollout_batch_size // config.num_generations)
    generator = np.random.default_rng(config.seed)
    found = []
    for attempt in range(TRIES):
        lengths_PN = lengths.draw(generator, config.completions_per_step).reshape(-1, config.num_generations)
        crew = SimulatedPool(workers, seconds_of_pieces(job, speeds, lengths_PN), seed=attempt)
        found += rounds(crew, config.batch_size, most, 1)
    own = fmean(one.useful for one in found) / workers
    return own, fmean(one.seconds for one in found) - own


def seconds_of_pieces(job: Job, speeds: Speeds, lengths_PN: NDArray[np.int64]) -> Callable[[Sequence[int]], float]:
    """What a worker takes for a piece, by the places of its prompts, whose completions have the lengths of their rows."""

    def seconds(places: Sequence[int]) -> float:
        lengths = lengths_PN[list(places)].ravel()
        going_T = len(lengths) - np.bincount(lengths)[:-1].cumsum()
        return prompt_seconds(job, len(places), speeds) + float(token_seconds(job, going_T, speeds).sum())

    return seconds
