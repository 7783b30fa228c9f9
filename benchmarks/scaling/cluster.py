"""A training step on more and more nodes: the planner's phases of one device, plus communication and a rollout pool.

GPUs of a node are connected by a switch, nodes by a network. A collective sends its data over the network to each node once,
and inside of a node to each GPU. Links reach a fixed fraction of their bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from reinforcepp.config import PlanConfig
from reinforcepp.config.base import PositiveFloat, PositiveInt
from reinforcepp.config.reinforce import RAY
from reinforcepp.errors import ConfigError
from reinforcepp.planner.device import Device
from reinforcepp.planner.lengths import Lengths
from reinforcepp.planner.memory import Job, Rows
from reinforcepp.planner.timing import (
    HOST_LINK_BANDWIDTH,
    LINK_UTILIZATION,
    Speeds,
    achieved,
    link_bandwidth,
    parallel_step_seconds,
    prompt_seconds,
    token_seconds,
)
from scaling.pool import SimulatedPool, simulate

ATTEMPTS = 3
"""Simulated rollouts of a pool; the forecast is their mean."""


@dataclass(frozen=True)
class ForecastConfig(PlanConfig):
    """Forecast a training step on several nodes. All settings of ``reinforcepp plan`` apply; gpus are those of each node."""

    nodes: PositiveInt | None = None
    """Nodes with this many GPUs each. With --rollout ray://... they are the pool's, and others train. Default: 1."""
    trainers: PositiveInt = 1
    """Data-parallel ranks that train while a pool generates."""
    network_gbps: PositiveFloat = 400.0
    """Network bandwidth of a node in Gbit/s, over all its adapters."""

    @property
    def pooled(self) -> bool:
        """Whether a pool generates the completions."""
        return self.rollout.startswith(RAY)

    def _check_ranks(self) -> None:
        if self.trainers > 1 and not self.pooled:
            raise ConfigError(
                "trainers: requires a pool. Add --rollout ray://..., or omit trainers, and all GPUs train."
            )
        nodes = 1 if self.pooled else self.nodes or 1
        title = f"GPUs ({nodes} nodes x {self.gpus or 1})" if nodes > 1 else "GPUs"
        self._check_shares(self.trainers if self.pooled else nodes * max(1, self.gpus or 1), title)
        if self.fsdp and self.pooled and self.trainers == 1:
            raise ConfigError("fsdp: a single rank has no shards. Set trainers to more than 1, or omit fsdp.")


# --- links ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Links:
    """The links between devices, in achieved bytes/s."""

    nodes: int
    gpus: int
    """GPUs per node."""
    node_bandwidth: float
    """What each GPU receives from the others of its node."""
    network_bandwidth: float
    """What each node receives from the others."""

    def gather_seconds(self, size: float) -> float:
        """Return the seconds of an all-gather of ``size`` bytes; a reduce-scatter takes the same."""
        network = size * (self.nodes - 1) / self.nodes / self.network_bandwidth
        return network + size * (self.gpus - 1) / self.gpus / self.node_bandwidth


def links_for(config: ForecastConfig, nodes: int, gpus: int) -> Links:
    """Return the links that ``config`` describes."""
    return Links(nodes, gpus, link_bandwidth(config), LINK_UTILIZATION * config.network_gbps * 1e9 / 8)


def broadcast_seconds(job: Job, speeds: Speeds, pool: Links) -> float:
    """Return the seconds until the pool's devices have the new weights.

    The weights are copied to CPU memory, broadcast in a tree over the nodes, and copied to the devices.
    """
    weights = float(job.dtype.itemsize * job.policy.parameters)
    copy = weights / (HOST_LINK_BANDWIDTH if job.gpus else speeds.reading)
    return 2 * copy + math.ceil(math.log2(pool.nodes + 1)) * weights / pool.network_bandwidth


# --- a step on several nodes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """A step on a number of nodes."""

    nodes: int
    devices: int
    """Devices that train or, with a pool, its workers."""
    seconds: dict[str, float]
    """Seconds by phase."""
    tokens_per_second: float
    """Completion tokens per second of a whole step."""

    @property
    def step(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())

    def speedup(self, base: Scale) -> float:
        """Return the throughput relative to ``base``."""
        return self.tokens_per_second / base.tokens_per_second

    def efficiency(self, base: Scale) -> float:
        """Return the speedup relative to that of the number of devices."""
        return self.speedup(base) * base.devices / self.devices


def number_of_nodes(config: ForecastConfig, gpus: int) -> int:
    """Return the nodes of ``config``; by default those that a pool's workers need."""
    needed = config.rollout_workers * config.vllm_tensor_parallel_size if config.pooled else 0
    return config.nodes or -(-needed // gpus) or 1


def scales(job: Job, config: ForecastConfig, device: Device, lengths: Lengths, nodes: int) -> list[Scale]:
    """Return the step on 1, 2, 4, ... nodes up to ``nodes``; an empty list if the device's rates aren't known."""
    if device.rates is None:
        return []
    numbers = sorted({1 << i for i in range(nodes.bit_length()) if 1 << i < nodes} | {nodes})
    return [on_nodes(job, config, device, lengths, number) for number in numbers]


def on_nodes(job: Job, config: ForecastConfig, device: Device, lengths: Lengths, nodes: int) -> Scale:
    """Return the step on ``nodes`` nodes with ``device.gpus`` devices each."""
    assert device.rates is not None
    gpus = max(1, device.gpus)
    devices = nodes * gpus
    links, speeds = links_for(config, nodes, gpus), achieved(device.rates)
    if config.pooled:
        devices = max(1, devices // config.vllm_tensor_parallel_size)
        devices = min(config.rollout_workers or devices, devices)
        training_links = links_for(config, -(-job.ranks // gpus), min(job.ranks, gpus))
    else:
        job, training_links = replace(job, ranks=devices, gpus=devices if device.gpus else 0), links
    rows = Rows.of(config, job)
    seconds = parallel_step_seconds(job, rows, config, speeds, lengths, training_links.gather_seconds)
    if config.pooled:
        rollout, waiting = pool_seconds(job, config, tensor_parallel(speeds, config), lengths, devices)
        seconds |= {"rollout": rollout, "waiting": waiting}
        seconds["sync"] += broadcast_seconds(job, speeds, links)
    return Scale(nodes, devices, seconds, config.completions_per_step * lengths.mean / sum(seconds.values()))


# --- a rollout pool -------------------------------------------------------------------------------------------------


def tensor_parallel(speeds: Speeds, config: ForecastConfig) -> Speeds:
    """Return the speeds of the GPUs of one worker together, without communication between them."""
    size = config.vllm_tensor_parallel_size
    return speeds._replace(
        products=size * speeds.products, decoding=size * speeds.decoding, reading=size * speeds.reading
    )


def pool_seconds(
    job: Job, config: ForecastConfig, speeds: Speeds, lengths: Lengths, workers: int
) -> tuple[float, float]:
    """Return the mean seconds that a pool's worker generates per step, and that it waits until the last one has finished."""
    chunk_size = max(1, config.effective_rollout_batch_size // config.num_generations)
    generator = np.random.default_rng(config.seed)
    rollouts = []
    for attempt in range(ATTEMPTS):
        lengths_PN = sample_lengths(lengths, generator, config.completions_per_step)
        chunk_seconds = seconds_of_chunks(job, speeds, lengths_PN.reshape(-1, config.num_generations))
        pool = SimulatedPool(workers, chunk_seconds, seed=attempt)
        rollouts += simulate(pool, config.batch_size, chunk_size, 1)
    busy = fmean(one.useful for one in rollouts) / workers
    return busy, fmean(one.seconds for one in rollouts) - busy


def sample_lengths(lengths: Lengths, generator: np.random.Generator, number: int) -> NDArray[np.int64]:
    """Return ``number`` completion lengths at random."""
    # The probability of a length above t tokens is the fraction of completions with a token at position t.
    sampled: NDArray[np.int64] = np.searchsorted(-lengths.active_T, -generator.random(number), side="left")
    return sampled


def seconds_of_chunks(job: Job, speeds: Speeds, lengths_PN: NDArray[np.int64]) -> Callable[[Sequence[int]], float]:
    """Return the seconds of a chunk by the indices of its prompts, whose completions have the lengths of their rows."""

    def seconds(indices: Sequence[int]) -> float:
        lengths = lengths_PN[list(indices)].ravel()
        active_T = len(lengths) - np.bincount(lengths)[:-1].cumsum()
        return prompt_seconds(job, len(indices), speeds) + float(token_seconds(job, active_T, speeds).sum())

    return seconds
