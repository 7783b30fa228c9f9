"""Compare estimators with the same model, reward, prompts, samples and steps, over several seeds, each run in its own process.

Results are means over seeds with 95% intervals (Student's t).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from reinforcepp.config import CompareAlgorithmsConfig, TrainConfig, as_dict
from reinforcepp.errors import ModelError
from reinforcepp.files import write_json
from reinforcepp.models.loading import load_config
from reinforcepp.monitoring import Progress
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.run_dir import (
    check_output,
    check_unchanged,
    claim_output,
    clear,
    describe_run,
    noted_settings,
    rename_settings,
)
from reinforcepp.runtime.process import python_path
from reinforcepp.runtime.redaction import without_secrets
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.precision import with_precision
from reinforcepp.training.schedule import with_learning_rate

LEARNING_RATE_FACTORS = (1 / 3, 1.0, 3.0)
COMPLETIONS_PER_STEP = (4, 8, 32)
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, two-sided 95%, for 1 to 9 degrees of freedom; beyond that, the normal 1.96 is at most 10% too small."""


# --- the runs -------------------------------------------------------------------------------------------------------


def compare_algorithms(config: CompareAlgorithmsConfig) -> dict[str, Any]:
    """Run all unfinished runs, write ``comparison.json``, and return its contents."""
    if not config.rewards:
        check_reward_folder(config.reward_model)
    folder = Path(config.output_dir).expanduser()
    if config.resume:
        check_unchanged(noted_settings(folder), as_dict(config))
    else:
        check_output(config.output_dir, overwrite=config.overwrite)
    model_config, began = load_config(config.model), noted_settings(folder) if config.resume else None
    config, precision = with_precision(with_learning_rate(config, model_config, began), model_config, began)
    with claim_output(config.output_dir, overwrite=config.overwrite, resume=config.resume):
        return _compare(config, folder, precision)


def _compare(config: CompareAlgorithmsConfig, folder: Path, facts: dict[str, str]) -> dict[str, Any]:
    if not config.resume:
        clear(folder)
        describe_run(folder, as_dict(config), dict(facts))
    main = {run_folder(folder, run): run for run in planned(config, folder)}
    grid = {run_folder(folder, run): run for run in (planned_grid(config, folder) if config.sensitivity else ())}
    results = _all_results(config, main | grid)
    comparison = {
        "settings": as_dict(config),
        "estimators": summary(config, [results[path] for path in main]),
        "sensitivity": sensitivity([results[path] for path in grid]),
        "runs": [results[path] for path in main],
        "grid_runs": [results[path] for path in grid],
    }
    write_json(folder / "comparison.json", comparison)
    return comparison


def planned(config: CompareAlgorithmsConfig, folder: Path) -> Iterator[TrainConfig]:
    """Yield the main runs, seed by seed, so that a change in hardware speed affects all estimators alike."""
    for seed in range(config.seed, config.seed + config.seeds):
        for name in config.names:
            yield _training(config, folder, estimator=name, seed=seed)


def planned_grid(config: CompareAlgorithmsConfig, folder: Path) -> Iterator[TrainConfig]:
    """Yield one seed of each estimator for each learning rate and number of completions per step."""
    for factor in LEARNING_RATE_FACTORS:
        for completions in COMPLETIONS_PER_STEP:
            for name in config.names:
                yield _training(
                    config,
                    folder,
                    estimator=name,
                    learning_rate=config.peak_learning_rate * factor,
                    batch_size=max(1, completions // config.num_generations),
                    eval_every=0,
                )


def _training(config: CompareAlgorithmsConfig, folder: Path, **changes: Any) -> TrainConfig:
    shared = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    fresh = {"overwrite": True, "resume": False, "allow_changes": None, "save_every": 0, "keep_best": None}
    training = TrainConfig(**(shared | changes | fresh))
    return replace(training, output_dir=str(run_folder(folder, training) / "work"))


def run_folder(folder: Path, run: TrainConfig) -> Path:
    """Return the folder of a run, named after its estimator, learning rate, batch size and seed."""
    kind = f"{run.estimator}-lr{run.peak_learning_rate:.2e}-completions{run.completions_per_step}-seed{run.seed}"
    return folder / "runs" / kind


def _all_results(config: CompareAlgorithmsConfig, runs: Mapping[Path, TrainConfig]) -> dict[Path, dict[str, Any]]:
    done = {path: _read(path / "result.json") for path, run in runs.items() if _is_done(path, _job(config, run))}
    with Progress("runs", len(runs), len(done)) as progress, ThreadPoolExecutor(config.processes) as pool:
        waiting = {path: run for path, run in runs.items() if path not in done}
        jobs = zip(waiting, pool.map(lambda item: _run(config, *item), waiting.items()), strict=True)
        for path, result in jobs:
            done[path] = result
            last = result["evaluations"][-1] if result["evaluations"] else {}
            progress.step(f"{path.name}: {_shown(last)}" + (" (diverged)" if result["diverged"] else ""))
    return {path: done[path] for path in runs}


def _run(config: CompareAlgorithmsConfig, path: Path, run: TrainConfig) -> dict[str, Any]:
    """Run one training in its own process, so that its peak memory is measured separately."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "job.json", _job(config, run))
    settings = json.dumps({"settings": asdict(run), "split_seed": config.seed})  # unlike the file, with secrets
    threads = max(1, (os.cpu_count() or 1) // config.processes)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": python_path()}
    command = [sys.executable, "-P", "-m", "reinforcepp.commands.compare_estimators.worker", str(path)]
    done = subprocess.run(
        command,
        input=settings,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ModelError(f"{path.name}: the run ended with exit code {done.returncode} ({last}).")
    return _read(path / "result.json")


def _job(config: CompareAlgorithmsConfig, run: TrainConfig) -> dict[str, Any]:
    job: dict[str, Any] = json.loads(json.dumps({"settings": as_dict(run), "split_seed": config.seed}))
    return job  # in the form that reading its file returns


def _is_done(path: Path, job: dict[str, Any]) -> bool:
    """Return whether this exact run was finished before."""
    if not (path / "result.json").is_file():
        return False
    done = _read(path / "job.json")
    return done | {"settings": without_secrets(rename_settings(done["settings"]))} == job


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


def _shown(evaluation: Mapping[str, float]) -> str:
    return "  ".join(f"{key} {evaluation[key]:.3f}" for key in ("reward", "judge", "kl") if key in evaluation)


# --- statistics -----------------------------------------------------------------------------------------------------


def mean_and_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean and the half width of its 95% interval, 0 for a single value."""
    if len(values) < 2:
        return {"mean": fmean(values), "interval": 0.0}
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
    return {"mean": fmean(values), "interval": t * stdev(values) / math.sqrt(len(values))}


def summary(config: CompareAlgorithmsConfig, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return outcome, cost and stability over the seeds of each estimator."""
    measure = "judge" if config.judge_name else "reward"
    starts = [run["evaluations"][0][measure] for run in runs if run["evaluations"]]
    by_name = {name: [run for run in runs if run["estimator"] == name] for name in config.names}
    finals = {name: [run["evaluations"][-1][measure] for run in group] for name, group in by_name.items()}
    target = fmean(starts) + 0.9 * (max(map(fmean, finals.values())) - fmean(starts))
    return {
        name: {
            "final": {
                key: mean_and_interval([run["evaluations"][-1][key] for run in group])
                for key in group[0]["evaluations"][-1]
                if key not in ("step", "seconds", "tokens")
            },
            "measure": measure,
            "worst_seed": min(finals[name]),
            "target": target,
            "to_target": {
                key: _mean_or_none([_reached(run["evaluations"], measure, target, key) for run in group])
                for key in ("seconds", "tokens")
            },
            "reached_target": sum(_reached(run["evaluations"], measure, target, "step") is not None for run in group),
            "step_seconds": mean_and_interval([run["step_seconds"] for run in group if run["step_seconds"]]),
            "phase_seconds": {
                phase: fmean(run["phase_seconds"][phase] for run in group) for phase in group[0]["phase_seconds"]
            },
            "peak_rss_mib": mean_and_interval([run["peak_rss_mib"] for run in group]),
            "diverged": sum(bool(run["diverged"]) for run in group),
        }
        for name, group in by_name.items()
    }


def _reached(evaluations: Iterable[Mapping[str, float]], measure: str, target: float, key: str) -> float | None:
    """Return ``key`` where the target is first reached, by linear interpolation between evaluations."""
    before: Mapping[str, float] | None = None
    for now in evaluations:
        if now[measure] >= target:
            if before is None:
                return now[key]
            share = (target - before[measure]) / (now[measure] - before[measure])
            return before[key] + share * (now[key] - before[key])
        before = now
    return None


def _mean_or_none(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return mean and interval over the runs; None if not all reached the target."""
    reached = [value for value in values if value is not None]
    return mean_and_interval(reached) if len(reached) == len(values) else None


def sensitivity(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the outcome in each cell of the grid, the worst outcome, and the spread, by estimator."""
    result: dict[str, Any] = {}
    for run in runs:
        last = run["evaluations"][-1]
        cell = {
            "learning_rate": run["learning_rate"],
            "completions": run["completions"],
            "final": last.get("judge", last["reward"]),
            "kl": last["kl"],
            "diverged": bool(run["diverged"]),
        }
        result.setdefault(run["estimator"], {"cells": []})["cells"].append(cell)
    for metrics in result.values():
        finals = [cell["final"] for cell in metrics["cells"]]
        metrics |= {"worst": min(finals), "best": max(finals), "spread": stdev(finals), "mean": fmean(finals)}
    return result


def print_summary(comparison: Mapping[str, Any]) -> None:
    """Print one line per estimator."""
    for name, metrics in comparison["estimators"].items():
        final, kl = metrics["final"][metrics["measure"]], metrics["final"]["kl"]
        echo(
            f"{name}: {metrics['measure']} {final['mean']:.3f} ± {final['interval']:.3f} at KL {kl['mean']:.3f}, "
            f"{metrics['step_seconds']['mean']:.2f} s/step, {metrics['peak_rss_mib']['mean']:.0f} MiB"
            + (f", {metrics['diverged']} runs diverged" if metrics["diverged"] else "")
        )
