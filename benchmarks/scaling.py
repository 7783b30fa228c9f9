"""Model the time of a training step: fit it on real steps, check it on others, project it to many nodes, simulate a pool.

python benchmarks/scaling.py

Real steps: tiny to small models, trained by the train command on one core, with each phase timed in CPU seconds.
Five constants (``reinforcepp.planner.timing.Utilization``) are fitted on some trainings and predict the others. Projections are
those of benchmarks/forecast.py, for GPUs by data sheets and utilizations that were never checked on a GPU.
The pool: the scheduler's own code
(``rollout.dispatch``) with simulated workers; seconds that the scheduler takes are real ones of this processor.
Written to benchmarks/results/scaling.json, with a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers
from forecast import forecast
from results import FOLDER, write_result
from scaling.cluster import ForecastConfig
from scaling.plot import plot
from scaling.points import CHECKED, FITTED, LARGE, USUAL, save_shape
from scaling.pool_benchmark import pool

from reinforcepp.config import PlanConfig
from reinforcepp.planner import lengths, timing
from reinforcepp.planner.device import Rates
from reinforcepp.planner.memory import Job, Rows, total
from reinforcepp.planner.model_costs import RowSize, frozen_model, trained_model
from reinforcepp.planner.report import verdict

WORKER = Path(__file__).parent / "scaling_worker.py"
PHASES = {"rollout": "rollout", "scoring": "score", "update": "update"}
"""Ours, and the trainer's names for them."""
FIRST_STEP, LAST_STEP = 0.5, 0.004
"""Of the logarithm of a constant, while it is fitted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured_before", action="store_true", help="real steps are those of the result file")
    parser.add_argument("--name", default="scaling")
    arguments = parser.parse_args()
    before = FOLDER / f"{arguments.name}.json"
    kept = json.loads(before.read_text(encoding="utf-8"))["measured"] if arguments.measured_before else None
    found = kept or measured(FITTED | CHECKED)
    result = {"measured": found, "step": fit_and_check(found), "projections": projections(), "pool": pool()}
    write_result(arguments.name, result)
    plot(result, FOLDER / f"{arguments.name}.png")


# --- real steps -----------------------------------------------------------------------------------------------------


def measured(points: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each training took, and the machine's rates, the best there were: who else works here only ever slows it down."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    worker = subprocess.run(
        [sys.executable, str(WORKER)],
        input="".join(json.dumps(point) + "\n" for point in points.values()),
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line.removeprefix("RESULT ") for line in worker.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) < len(points):
        sys.exit(f"{list(points)[len(lines)]} failed")
    found = {name: json.loads(line) for name, line in zip(points, lines, strict=True)}
    rates = {kind: max(row[kind] for row in found.values()) for kind in ("operations", "bytes")}
    return {
        name: rates
        | {phase: row["seconds"][own] for phase, own in PHASES.items()}
        | {"wall_seconds": row["wall_seconds"], "mean_length": row["mean_length"]}
        for name, row in found.items()
    }


class Point:
    """A training as the model of its time sees it."""

    def __init__(self, point: dict[str, Any], found: dict[str, Any]) -> None:
        settings, shape = point["settings"], dict(point["policy"])
        config_class = {"gpt2": transformers.GPT2Config, "llama": transformers.LlamaConfig}[shape.pop("family")]
        config = config_class(**shape, bos_token_id=0, eos_token_id=0)
        self.config = PlanConfig(**settings)
        size = RowSize(settings["max_prompt_length"], settings["max_new_tokens"])
        self.job = Job(
            policy=trained_model(config, torch.float32, size, self.config),
            reward=frozen_model(config, torch.float32, size),
            critic=None,
            judge=None,
            size=size,
            dtype=torch.float32,
            engine="transformers",
            gpus=0,
        )
        self.rows = Rows.of(self.config, self.job)
        # lengths of a completion that goes on with the same chance after each token
        active_T = (1 - point.get("ends", 0.0)) ** np.arange(size.new, dtype=float)
        self.lengths = lengths.Lengths(active_T, "")
        self.rates = Rates(found["operations"], found["bytes"], measured=True)
        self.measured = {phase: found[phase] for phase in PHASES}

    def seconds(self, shares: timing.Utilization) -> dict[str, float]:
        """By phase, with other constants."""
        speeds = timing.achieved(self.rates, shares)
        return timing.step_seconds(self.job, self.rows, self.config, speeds, self.lengths)


def fit_and_check(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Constants from some of the trainings, and what they say of the others."""
    fitted = {name: Point(point, found[name]) for name, point in FITTED.items()}
    checked = {name: Point(point, found[name]) for name, point in CHECKED.items()}
    shares = fit(list(fitted.values()))
    print(shares)
    return {
        "meaning": "seconds of the processor in a step; error is predicted / measured - 1",
        "rates": {kind: next(iter(found.values()))[kind] for kind in ("operations", "bytes")},
        "constants": shares._asdict(),
        "in_planner": timing.UTILIZATION_OF_MEASURED._asdict(),
        "fitted": {name: row(point, shares, found[name]) for name, point in fitted.items()},
        "checked": {name: row(point, shares, found[name]) for name, point in checked.items()},
        "errors": {
            kind: errors(list(points.values()), shares) for kind, points in (("fitted", fitted), ("checked", checked))
        },
        "errors_of_planner": errors(list(checked.values()), timing.UTILIZATION_OF_MEASURED),
    }


def fit(points: Sequence[Point]) -> timing.Utilization:
    """Least squares of the logarithms of predicted over measured seconds, over all phases; one constant at a time."""

    def distance(shares: timing.Utilization) -> float:
        return sum(
            math.log(seconds / point.measured[phase]) ** 2
            for point in points
            for phase, seconds in point.seconds(shares).items()
        )

    shares, step = timing.UTILIZATION_OF_MEASURED, FIRST_STEP
    best = distance(shares)
    while step > LAST_STEP:
        before = best
        for place in range(len(shares)):
            for factor in (math.exp(step), math.exp(-step)):
                tried = shares._replace(**{shares._fields[place]: shares[place] * factor})
                if max(tried[:3]) <= 1 and (found := distance(tried)) < best:
                    shares, best = tried, found
        if best == before:
            step /= 2
    return shares


def row(point: Point, shares: timing.Utilization, found: dict[str, Any]) -> dict[str, Any]:
    predicted = point.seconds(shares)
    whole = {"predicted": sum(predicted.values()), "measured": sum(point.measured.values())}
    return {
        "parameters": point.job.policy.parameters,
        "predicted": predicted,
        "measured": point.measured,
        "step": whole | {"error": whole["predicted"] / whole["measured"] - 1},
        "wall_seconds": found["wall_seconds"],
    }


def errors(points: Sequence[Point], shares: timing.Utilization) -> dict[str, dict[str, float]]:
    """Median and worst of predicted / measured - 1, without its sign, by phase and of the step."""
    ratios: dict[str, list[float]] = {phase: [] for phase in (*PHASES, "step")}
    for point in points:
        predicted = point.seconds(shares)
        for phase in PHASES:
            ratios[phase].append(abs(predicted[phase] / point.measured[phase] - 1))
        ratios["step"].append(abs(sum(predicted.values()) / sum(point.measured.values()) - 1))
    return {phase: {"median": median(values), "worst": max(values)} for phase, values in ratios.items()}


# --- projections ----------------------------------------------------------------------------------------------------

LORA: dict[str, Any] = {"use_peft": True, "lora_r": 64, "lora_alpha": 128}
POOL: dict[str, Any] = {"rollout": "ray://auto", "rollout_workers": 1000}
PROJECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "7B, all weights, on 8 GPUs": ("7B", {"gpus": 8, "nodes": 1, "fsdp": True, "rollout": "vllm"}),
    "7B, all weights, on 64 GPUs": ("7B", {"gpus": 8, "nodes": 8, "fsdp": True, "rollout": "vllm"}),
    "70B, all weights, on 64 GPUs": ("70B", {"gpus": 8, "nodes": 8, "fsdp": True, "rollout": "vllm"}),
    "70B, QLoRA, on 64 GPUs": (
        "70B",
        {"gpus": 8, "nodes": 8, "rollout": "transformers", "load_in_4bit": True, "micro_batch_size": 2} | LORA,
    ),
    "7B, LoRA on one GPU, 1,000 rollout workers": (
        "7B",
        {"gpus": 8, "nodes": 125, "batch_size": 32_000} | POOL | LORA,
    ),
    "7B, all weights, on 64 GPUs, 1,000 rollout workers": (
        "7B",
        {"gpus": 8, "nodes": 125, "batch_size": 32_000, "trainers": 64, "fsdp": True, "micro_batch_size": 16} | POOL,
    ),
}


def projections() -> dict[str, Any]:
    """Return the forecast of each."""
    projected: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in LARGE:
            save_shape(name, f"{folder}/{name}")
        for title, (model, changes) in PROJECTED.items():
            found = forecast(ForecastConfig(**(USUAL | {"model": f"{folder}/{model}"} | changes)))
            plan = found.plan
            projected[title] = {
                "settings": USUAL | changes,
                "parameters": plan.job.policy.parameters,
                "fits": plan.fits,
                "memory_gib": plan.peak_memory / 2**30,
                "verdict": verdict(plan),
                "scales": [
                    {
                        "nodes": scale.nodes,
                        "devices": scale.devices,
                        "seconds": scale.seconds,
                        "step": scale.step,
                        "tokens_per_second": scale.tokens_per_second,
                        "speedup": scale.speedup(found.scales[0]),
                        "efficiency": scale.efficiency(found.scales[0]),
                    }
                    for scale in found.scales
                ],
                "phases_gib": {name: total(parts) / 2**30 for name, parts in plan.phases.items()},
            }
            print(title, json.dumps(projected[title]["scales"][-1]), projected[title]["verdict"], flush=True)
    return projected


if __name__ == "__main__":
    main()
