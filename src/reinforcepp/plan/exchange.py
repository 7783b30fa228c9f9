"""What devices tell each other in a step, and how long that takes: bytes over the speed of links.

Devices of a machine are linked by a switch, machines by a network. What all devices hold in the end goes over the network
to each machine once, and inside of it to each device. As for all that a step is made of, this is a share of what the
links could do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from reinforcepp.config import PlanConfig
from reinforcepp.config.accelerators import ACCELERATORS
from reinforcepp.plan.memory import FLOAT, Job, Rows
from reinforcepp.plan.timing import LINK, Speeds

OF_LINKS = 0.7
"""Of the speed of links, what exchanges reach: a guess."""
PCIE = 32e9
"""Bytes a second between the GPUs of a machine where it isn't known what links them: PCIe 4, 16 lanes, one way."""


@dataclass(frozen=True)
class Links:
    """How devices are linked."""

    nodes: int
    per_node: int
    """Devices of a machine."""
    inside: float
    """Bytes a second that each device gets from the others of its machine."""
    between: float
    """Bytes a second that each machine gets from the others."""


def links_for(config: PlanConfig, nodes: int, per_node: int) -> Links:
    """What ``config`` says of them."""
    sheet = ACCELERATORS.get(config.device)
    inside = PCIE if sheet is None else sheet.link_gigabytes_per_second * 1e9
    return Links(nodes, per_node, OF_LINKS * inside, OF_LINKS * config.network_gbps * 1e9 / 8)


def gather_seconds(size: float, links: Links) -> float:
    """Until each device has all of ``size`` bytes of which each had a part; adding up and cutting up takes the same."""
    between = size * (links.nodes - 1) / links.nodes / links.between
    return between + size * (links.per_node - 1) / links.per_node / links.inside


def exchange_seconds(job: Job, rows: Rows, config: PlanConfig, links: Links) -> float:
    """For the gradients of a step, and for the weights where they are in shards.

    Whole weights: gradients are added up and handed out, in 16 bits after every pass, in float32 once for each optimiser
    step. Shards: each pass gathers the weights forward and again backward, and adds gradients up in float32.
    """
    steps = config.updates_per_step
    passes = steps * rows.passes
    seconds = 0.0
    for learner in job.learners:
        if job.sharded:
            weights = gather_seconds(job.dtype.itemsize * learner.parameters, links)
            seconds += passes * (2 * weights + gather_seconds(FLOAT * learner.trained, links))
        else:
            times = passes if job.narrow else steps
            seconds += times * 2 * gather_seconds(job.dtype.itemsize * learner.trained, links)
    return seconds


def sync_seconds(job: Job, speeds: Speeds, links: Links, pool: Links) -> float:
    """Until whoever generates has the new weights, over ``links`` of those that train and those of a ``pool``.

    Shards are gathered in float32 for the copy that generates and scores. vLLM in the same process has its own weights
    overwritten. A pool's weights go to main memory, to one machine after the other where those that have them hand them on,
    and to the devices.
    """
    weights = float(job.dtype.itemsize * job.policy.parameters)
    seconds = sum(gather_seconds(FLOAT * learner.parameters, links) for learner in job.learners) if job.sharded else 0.0
    if job.engine == "vllm":
        seconds += 2 * weights / speeds.reading
    if job.engine == "ray":
        carried = weights / (LINK if job.gpus else speeds.reading)
        seconds += 2 * carried + math.ceil(math.log2(pool.nodes + 1)) * weights / pool.between
    return seconds
