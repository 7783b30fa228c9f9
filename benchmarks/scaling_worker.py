"""Trainings in a process of their own, for benchmarks/scaling.py: seconds of each phase of a step, and of the machine's rates.

Seconds are those of the processor: others may work on this machine, and one process on one core does nothing else.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from planner_worker import EOS, make
from transformers import AutoModelForCausalLM

from reinforcepp.commands.train import train
from reinforcepp.config import TrainConfig
from reinforcepp.models.precision import compute_dtype
from reinforcepp.monitoring import Clock
from reinforcepp.planner import device

STEPS, WARM_UP = 4, 1


def main() -> None:
    watch()
    for line in sys.stdin:
        job = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            print("RESULT " + json.dumps(trained(job, Path(folder))), flush=True)


def trained(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Of the steps after the first the quickest, or where completions end by chance the median; the rates before and after."""
    make(folder, job)
    if "ends" in job:
        end_by_chance(folder / "policy", job["ends"])
    inputs = {"model": f"{folder}/policy", "reward_model": f"{folder}/reward", "data": f"{folder}/prompts.csv"}
    config = TrainConfig(**job["settings"], **inputs, output_dir=f"{folder}/run", max_steps=STEPS)
    before = device.measured_rates("cpu", compute_dtype(config))
    run = train(config).folder
    rates = [before, device.measured_rates("cpu", compute_dtype(config))]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    walls = [json.loads(line) for line in (run / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
    taken, usual = LAPS[-STEPS:], median if "ends" in job else min
    return {
        "operations": max(rate.flops for rate in rates),
        "bytes": max(rate.bytes for rate in rates),
        "seconds": {phase: usual(lap[phase] for lap in taken[WARM_UP:]) for phase in taken[0]},
        "wall_seconds": median(row["step_time"] for row in walls[WARM_UP:]),
        "mean_length": sum(row["completions/mean_length"] for row in metrics[WARM_UP:]) / (STEPS - WARM_UP),
    }


@torch.no_grad()
def end_by_chance(folder: Path, chance: float) -> None:
    """The last token of a completion may be any with the same ``chance``: EOS gets the logit for it, all others nearly none."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    final, embeddings = model.transformer.ln_f, model.transformer.wte
    final.weight.zero_()
    final.bias.zero_()
    final.bias[0] = 1
    embeddings.weight[:, 0] = 0
    embeddings.weight[EOS, 0] = torch.log(torch.tensor(chance / (1 - chance) * (len(embeddings.weight) - 1)))
    model.save_pretrained(folder)


LAPS: list[dict[str, float]] = []


def watch() -> None:
    """Have each clock of a step also count the processor's seconds, and the rates be those of its seconds."""
    device.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    begin, lap = Clock.__init__, Clock.lap

    def begun(clock: Clock) -> None:
        begin(clock)
        LAPS.append({})
        clock.processor = time.process_time()  # type: ignore[attr-defined]

    def lapped(clock: Clock, phase: str) -> None:
        lap(clock, phase)
        now = time.process_time()
        LAPS[-1][phase] = now - clock.processor  # type: ignore[attr-defined]
        clock.processor = now  # type: ignore[attr-defined]

    Clock.__init__, Clock.lap = begun, lapped  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
