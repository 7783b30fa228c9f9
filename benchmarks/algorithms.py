"""The estimators on the built-in model and data, five seeds and a grid of settings, into benchmarks/results/algorithms.json.

python benchmarks/algorithms.py [--processes 2] [--resume]

The reward model is trained first, as the demo does it. An interrupted comparison goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from results import write_result

from reinforcepp.commands.compare_estimators.run import compare_algorithms, print_summary
from reinforcepp.commands.demo import demo_settings
from reinforcepp.config import CompareAlgorithmsConfig, DemoConfig
from reinforcepp.reports.estimators import evaluations_by_step, write_page
from reinforcepp.rewards.card import REWARD_CARD
from reinforcepp.training.reward_trainer import train_reward_model

COLORS = ("#1f5fa8", "#2a9d6f", "#d1812e", "#7b5ea7", "#c0395a")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default="runs/algorithms_benchmark")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--max_steps", type=int, default=60)
    parser.add_argument("--no_sensitivity", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--name", default="algorithms")
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    reward, train = demo_settings(DemoConfig(seed=0), folder)
    if not (Path(reward.output_dir) / REWARD_CARD).is_file():
        train_reward_model(reward)
    changes = {
        "output_dir": str(folder / "comparison"),
        "batch_size": 16,
        "num_generations": 4,
        "max_steps": arguments.max_steps,
        "critic_learning_rate": 5 * train.learning_rate,
        "rollout": "transformers",
        "eval_every": 15,
        "resume": arguments.resume,
        "overwrite": not arguments.resume,
    }
    config = CompareAlgorithmsConfig(
        **(asdict(train) | changes),
        seeds=arguments.seeds,
        sensitivity=not arguments.no_sensitivity,
        processes=arguments.processes,
    )
    comparison = compare_algorithms(config)
    print_summary(comparison)
    write_page(comparison, folder / "comparison" / "comparison.html")
    plot(write_result(arguments.name, comparison))


def plot(result: Path) -> None:
    """Plot score against KL and against the step, next to the result file."""
    comparison = json.loads(result.read_text(encoding="utf-8"))
    figure = Figure(figsize=(11, 4), layout="constrained")
    frontier, curves = figure.subplots(1, 2)
    for (name, metrics), color in zip(comparison["estimators"].items(), COLORS, strict=False):
        steps = evaluations_by_step(comparison, name)
        kl = [fmean(evaluation["kl"] for evaluation in step) for step in steps]
        scores = [[evaluation[metrics["measure"]] for evaluation in step] for step in steps]
        means, x = list(map(fmean, scores)), [step[0]["step"] for step in steps]
        frontier.plot(kl, means, marker="o", markersize=4, color=color, label=name)
        curves.plot(x, means, color=color, label=name)
        curves.fill_between(x, list(map(min, scores)), list(map(max, scores)), color=color, alpha=0.12, linewidth=0)
    for axes, x_name in ((frontier, "KL to the reference policy, nats per token"), (curves, "step")):
        axes.set(xlabel=x_name, ylabel=f"held-out {metrics['measure']} score")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(result.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
