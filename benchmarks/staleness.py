"""What generating one step ahead saves in time, and whether it costs in learning, into benchmarks/results/async.json and .png.

    python benchmarks/staleness.py [--parts time learning] [--seeds 0 1 2 3 4]

``time``: a step with ``staleness`` 0 and 1, in alternating rounds, each process with one thread: completions by a copy of the
model in the trainer's process, and by a pool of one worker beside it. ``learning``: the demo's training with both, for each
seed with the same reward model; held-out prompts are graded by the judge that no training sees. A part that isn't measured
keeps what the file says of it; without any, the picture is drawn again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from results import FOLDER, made, write_result

STALENESS = (0, 1)
ENGINES = ("transformers", "ray://local")
ROUNDS, STEPS, WARM_UP = 3, 12, 3
EVAL_EVERY = 10
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's t for a two-sided interval of 95 %, by the number of values."""


# --- time -----------------------------------------------------------------------------------------------------------


def measure(engine: str, staleness: int) -> dict[str, float]:
    """Median seconds of a step and its phases, in this process."""
    from reinforcepp import ReinforceConfig, ReinforceTrainer
    from reinforcepp.data import load_prompts

    with tempfile.TemporaryDirectory() as folder:
        config = ReinforceConfig(
            max_steps=STEPS,
            batch_size=64,
            micro_batch_size=32,
            max_prompt_length=64,
            max_new_tokens=64,
            rollout=engine,
            rollout_workers=1 if engine != "transformers" else 0,
            staleness=staleness,
            eval_prompts=0,
            output_dir=folder,
        )
        rows = load_prompts("builtin:network", heldout_fraction=0, seed=0)[1]
        trainer = ReinforceTrainer("builtin:tiny", ["builtin:judge"], config, rows)
        trainer.train()
        trainer.engine.close()
        lines = (Path(folder) / "timings.jsonl").read_text().splitlines()[WARM_UP : -staleness or None]
        timings = [json.loads(line) for line in lines]  # the last steps have nothing left to generate beside them
        return {name.removeprefix("time/"): median(t[name] for t in timings) for name in timings[0]}


def time_part() -> dict[str, Any]:
    """Each way in a separate process, several times."""
    rounds: dict[tuple[str, int], list[dict[str, float]]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    for number in range(ROUNDS):
        for engine in ENGINES:
            for staleness in STALENESS:
                command = [sys.executable, __file__, "--measure", engine, str(staleness)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                print(f"round {number + 1}, {engine}, staleness {staleness}: {found['step_time']:.2f} s", flush=True)
                rounds.setdefault((engine, staleness), []).append(found)
    rows = [
        {
            "engine": engine,
            "staleness": staleness,
            "seconds": {name: median(one[name] for one in seen) for name in seen[0]},
            "step_by_round": [one["step_time"] for one in seen],
        }
        for (engine, staleness), seen in rounds.items()
    ]
    over = {
        engine: median(
            one["step_time"] / other["step_time"]
            for one, other in zip(rounds[engine, 0], rounds[engine, 1], strict=True)
        )
        for engine in ENGINES
    }
    return {"rows": rows, "step_over_step_ahead": over}


# --- learning -------------------------------------------------------------------------------------------------------


def learning_part(seeds: list[int]) -> dict[str, Any]:
    """Held-out gold scores in the course of training."""
    from reinforcepp import ReinforceTrainer
    from reinforcepp.commands.demo import demo_settings
    from reinforcepp.config import DemoConfig
    from reinforcepp.data import load_prompts
    from reinforcepp.training.reward_trainer import train_reward_model

    rows = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            demo = DemoConfig(output_dir=folder, seed=seed, rollout="transformers")
            reward, train = demo_settings(demo, Path(folder))
            train_reward_model(reward)
            _, prompts, held_out = load_prompts(train.data, heldout_fraction=0, seed=seed)
            for staleness in STALENESS:
                args = replace(train, staleness=staleness, eval_every=EVAL_EVERY, output_dir=f"{folder}/{staleness}")
                trainer = ReinforceTrainer(
                    train.model, train.reward_model, args, prompts, eval_dataset=held_out, judge=train.judge_name
                )
                trainer.train()
                log = [entry for entry in trainer.state.log_history if "step_time" in entry]
                curve = [
                    {"step": at(when, trainer.num_steps), "gold": found.metrics()["judge"], "kl": found.kl}
                    for when, found in trainer.evaluations.items()
                ]
                rows.append(
                    {
                        "seed": seed,
                        "staleness": staleness,
                        "gold_after": curve[-1]["gold"],
                        "curve": curve,
                        "clipped": fmean(m["clip_ratio/region_mean"] for m in log),
                        "kl_to_sampler": fmean(m["approx_kl"] for m in log),
                    }
                )
    final = {(row["seed"], row["staleness"]): row["gold_after"] for row in rows}
    course = {(row["seed"], row["staleness"]): fmean(p["gold"] for p in row["curve"]) for row in rows}
    return {
        "rows": rows,
        "gold_after_difference": interval([final[seed, 1] - final[seed, 0] for seed in seeds]),
        "course_difference": interval([course[seed, 1] - course[seed, 0] for seed in seeds]),
    }


def at(when: str, steps: int) -> int:
    """The step after which an evaluation was made, from its name."""
    ends = {"before": 0, "after": steps}
    return ends[when] if when in ends else int(when.removeprefix("step "))


def interval(values: list[float]) -> dict[str, float]:
    """The mean with its interval of 95 %, by Student's t."""
    mean, reach = fmean(values), T_95[len(values)] * stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - reach, "high": mean + reach}


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out gold score against the step, each seed thin and their mean thick; and what a step is made of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    colours = {0: "#1f5fa8", 1: "#d1662b"}
    for staleness, colour in colours.items():
        own = [row["curve"] for row in result["learning"]["rows"] if row["staleness"] == staleness]
        steps = [point["step"] for point in own[0]]
        for curve in own:
            curves.plot(steps, [point["gold"] for point in curve], color=colour, linewidth=0.6, alpha=0.5)
        mean = [fmean(points) for points in zip(*[[p["gold"] for p in curve] for curve in own], strict=True)]
        curves.plot(steps, mean, color=colour, linewidth=2.2, label=f"staleness {staleness}, mean of {len(own)} seeds")
    curves.set(title="held-out gold score", xlabel="step", ylabel="judge's mean, 0 to 1")
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    rows = result["time"]["rows"]
    names = [f"{row['engine']}\nstaleness {row['staleness']}" for row in rows]
    left = [0.0] * len(rows)
    for phase, shade in (("rollout", "#9db8d9"), ("score", "#e3c27f"), ("update", "#7fa982"), ("sync", "#b5a3c9")):
        seconds = [row["seconds"].get(phase, 0.0) for row in rows]
        bars.barh(
            names, seconds, left=left, color=shade, label="waiting for completions" if phase == "rollout" else phase
        )
        left = [a + b for a, b in zip(left, seconds, strict=True)]
    bars.invert_yaxis()
    bars.set(title="a step of the trainer", xlabel="seconds")
    bars.legend(loc="upper center", ncols=4, bbox_to_anchor=(0.5, -0.14), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["time", "learning"], default=["time", "learning"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    path = FOLDER / "async.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    origin = {name: before[name] for name in made() if name in before}
    found = {part: origin | before[part] for part in ("time", "learning") if part in before}
    if "time" in arguments.parts:
        found["time"] = made() | time_part()
    if "learning" in arguments.parts:
        found["learning"] = made() | learning_part(arguments.seeds)
    if arguments.parts:
        write_result("async", found)
    if len(found) == 2:
        plot(found, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
