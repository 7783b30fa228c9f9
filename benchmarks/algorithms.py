"""The estimators on the built-in model and data, five seeds and a grid of settings, into benchmarks/results/algorithms.json.

python benchmarks/algorithms.py [--processes 2] [--resume]

The reward model is trained first, as the demo does it. An interrupted comparison goes on with --resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from results import write_result

from reinforcepp.algorithm_comparison import compare_algorithms, tell
from reinforcepp.algorithm_page import write_page
from reinforcepp.config import CompareAlgorithmsConfig, RewardModelConfig
from reinforcepp.reward_trainer import train_reward_model
from reinforcepp.rewards.trained import CARD_NAME


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
    reward = folder / "reward_model"
    if not (reward / CARD_NAME).is_file():
        train_reward_model(
            RewardModelConfig(output_dir=str(reward), seed=0, learning_rate=3e-4, num_train_epochs=5, batch_size=16)
        )
    config = CompareAlgorithmsConfig(
        output_dir=str(folder / "comparison"),
        reward_model=str(reward),
        seed=0,
        seeds=arguments.seeds,
        max_steps=arguments.max_steps,
        batch_size=16,
        num_generations=4,
        mini_batch_size=32,
        max_prompt_length=64,
        max_new_tokens=64,
        learning_rate=2e-4,
        lr_scheduler_type="linear",
        critic_learning_rate=1e-3,
        kl_coef=0.05,
        rollout="transformers",
        eval_prompts=1000,
        eval_every=15,
        sensitivity=not arguments.no_sensitivity,
        processes=arguments.processes,
        resume=arguments.resume,
        overwrite=not arguments.resume,
    )
    comparison = compare_algorithms(config)
    tell(comparison)
    write_page(comparison, folder / "comparison" / "comparison.html")
    write_result(arguments.name, comparison)


if __name__ == "__main__":
    main()
