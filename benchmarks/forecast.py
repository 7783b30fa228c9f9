"""Forecast a training step on several nodes, or with a pool of rollout workers: speedup, efficiency, and memory per GPU.

python benchmarks/forecast.py --model models/7b --device h100 --gpus 8 --nodes 8 --fsdp --mixed_precision bf16

The settings are those of `reinforcepp plan`, with --nodes, --trainers, and --network_gbps; --config FILE reads them from YAML.
Nothing is loaded but the models' configurations. The forecast for GPUs has never been checked against a measurement.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tyro
from rich import box
from rich.table import Table
from scaling.cluster import ForecastConfig, Scale, links_for, number_of_nodes, scales

from reinforcepp.config import read_yaml
from reinforcepp.errors import ReinforceError, command_line
from reinforcepp.planner.command import make_plan, print_text
from reinforcepp.planner.lengths import lengths_for
from reinforcepp.planner.report import LABELS, Plan, as_json, assumptions, memory_text

DOES_NOT_FIT, USAGE_ERROR = 1, 2


@dataclass(frozen=True)
class Forecast:
    """The plan of one device, and the step on more and more nodes."""

    plan: Plan
    config: ForecastConfig
    scales: list[Scale]
    """The step on 1, 2, 4, ... nodes, and last on all; empty if the device's rates aren't known."""


def forecast(config: ForecastConfig) -> Forecast:
    """Return the forecast; errors are those of :func:`~reinforcepp.planner.command.make_plan`."""
    plan = make_plan(config, lambda gpus: config.trainers if config.pooled else number_of_nodes(config, gpus) * gpus)
    nodes = number_of_nodes(config, max(1, plan.device.gpus))
    return Forecast(plan, config, scales(plan.job, config, plan.device, lengths_for(config), nodes))


def text(found: Forecast) -> Iterator[str | Table]:
    """Yield the parts of the forecast as text."""
    yield from memory_text(found.plan)
    if found.scales:
        yield _table(found)
    else:
        yield "Time per step: unknown. Name the GPU (--device) to estimate it."
    yield ""
    for sentence in (*assumptions(found.plan), *_assumptions(found)):
        yield f"- {sentence}"


def _table(found: Forecast) -> Table:
    """Return the table with a row per phase and a column per number of nodes."""
    base = found.scales[0]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    grid.add_column("nodes", no_wrap=True)
    for scale in found.scales:
        grid.add_column(str(scale.nodes), justify="right")
    devices = "workers" if found.config.pooled else "GPUs" if found.plan.job.gpus else "ranks"
    grid.add_row(devices, *(str(scale.devices) for scale in found.scales))
    for phase in base.seconds:
        if any(scale.seconds[phase] for scale in found.scales):
            title = f"{LABELS.get(phase, phase)}, s"
            grid.add_row(title, *(f"{scale.seconds[phase]:,.2f}" for scale in found.scales))
    grid.add_section()
    grid.add_row("step, s", *(f"{scale.step:,.2f}" for scale in found.scales))
    grid.add_row("tokens/s", *(f"{scale.tokens_per_second:,.0f}" for scale in found.scales))
    grid.add_row("speedup", *(f"{scale.speedup(base):.2f}" for scale in found.scales))
    grid.add_row("efficiency", *(f"{scale.efficiency(base):.0%}" for scale in found.scales))
    return grid


def _assumptions(found: Forecast) -> Iterator[str]:
    if not found.scales:
        return
    last = found.scales[-1]
    if last.nodes > 1 or found.config.pooled:
        bandwidth = links_for(found.config, last.nodes, 1).network_bandwidth
        yield f"Communication assumes {bandwidth / 1e9:,.0f} GB/s between nodes."
    if found.config.pooled:
        yield (
            f"The pool has {last.devices} workers on {last.nodes} nodes; each device is as fast as one that trains, and runs "
            "vLLM. The real dispatch code distributes prompts to simulated workers."
        )


def as_values(found: Forecast) -> dict[str, Any]:
    """Return the forecast for JSON: that of the plan, with the step on all nodes, and a list of scales."""
    values: dict[str, Any] = json.loads(as_json(found.plan))
    values["assumptions"] += _assumptions(found)
    values["scaling"] = [
        asdict(scale) | {"speedup": scale.speedup(found.scales[0]), "efficiency": scale.efficiency(found.scales[0])}
        for scale in found.scales
    ]
    if found.scales:
        last = found.scales[-1]
        values |= {"seconds": last.seconds | {"step": last.step}, "tokens_per_second": last.tokens_per_second}
    return values


def parse(arguments: Sequence[str]) -> ForecastConfig:
    """Return the configuration of the command line; flags win over the file that ``--config`` names."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config")
    known, flags = parser.parse_known_args(arguments)
    values = read_yaml(known.config, ForecastConfig) if known.config else {}
    return tyro.cli(ForecastConfig, args=[*_flags(values), *flags], description=__doc__, use_underscores=True)


def _flags(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, list):
            yield from (f"--{name}", *map(str, value))
        elif isinstance(value, bool):
            yield f"--{name}" if value else f"--no_{name}"
        elif value is not None:
            yield f"--{name}={value}"


def main(arguments: Sequence[str]) -> int:
    """Print the forecast; returns 0 if the training fits, 1 if it doesn't, and 2 for wrong settings."""
    with command_line():
        try:
            config = parse(arguments)
            found = forecast(config)
        except ReinforceError as error:
            print(f"error: {error}", file=sys.stderr)
            return USAGE_ERROR
        if config.format == "json":
            print(json.dumps(as_values(found), indent=2))
        else:
            print_text(text(found))
        return 0 if found.plan.fits else DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
