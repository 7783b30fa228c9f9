"""What each verb of the command does, from a checked configuration to files and a few lines for the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from reinforcepp.config import (
    CompareAlgorithmsConfig,
    DemoConfig,
    GenerateConfig,
    LintConfig,
    RewardModelConfig,
    TrainConfig,
)
from reinforcepp.data import load_prompts
from reinforcepp.observe import say
from reinforcepp.reinforce_trainer import ReinforceTrainer


def reward(config: RewardModelConfig) -> None:
    """Train a reward model."""
    from reinforcepp.reward_trainer import train_reward_model

    train_reward_model(config)


def train(config: TrainConfig) -> ReinforceTrainer:
    """Train a policy and tell whether its held-out answers got better."""
    data, train_rows, heldout_rows = load_prompts(
        config.data, heldout_fraction=config.heldout_fraction, seed=config.seed, prompt_column=config.prompt_column
    )
    say(data.summary())
    trainer = ReinforceTrainer(
        model=config.model,
        reward_funcs=config.reward_model,
        args=config,
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
    )
    trainer.train()
    tell_difference(trainer)
    return trainer


def tell_difference(trainer: ReinforceTrainer) -> None:
    """One sentence on the held-out prompts before and after training."""
    if not {"before", "after"} <= set(trainer.evaluations):
        return
    before, after = trainer.evaluations["before"], trainer.evaluations["after"]
    error = (before.reward_error**2 + after.reward_error**2) ** 0.5
    gain = after.reward - before.reward
    shown = "better" if gain > 2 * error else "worse" if gain < -2 * error else "no difference shown"
    say(
        f"Held-out prompts ({len(after.completions)}): reward {before.reward:+.3f} -> {after.reward:+.3f} "
        f"({gain:+.3f} ± {2 * error:.3f}: {shown}), KL to the start {after.kl:.4f} nats per token, "
        f"length {before.length:.0f} -> {after.length:.0f} tokens"
    )


def generate(config: GenerateConfig) -> None:
    """Answer prompts."""
    from reinforcepp.generate import generate as answer

    answer(config)


def demo(config: DemoConfig) -> None:
    """The whole job on the built-in model."""
    from reinforcepp.demo import run_demo

    run_demo(config)


def compare_algorithms(config: CompareAlgorithmsConfig) -> None:
    """Every estimator, several seeds, one page."""
    from reinforcepp import algorithm_comparison, algorithm_page

    comparison = algorithm_comparison.compare_algorithms(config)
    algorithm_comparison.tell(comparison)
    page = Path(config.output_dir).expanduser() / "comparison.html"
    algorithm_page.write_page(comparison, page)
    say(f"{algorithm_page.verdict(comparison)} Everything is on the page {page}.", "green")


def lint(config: LintConfig) -> int:
    """What is wrong with a data file; the exit code tells whether it is too much."""
    from reinforcepp.lint.command import run_lint

    return run_lint(config)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "reward": reward,
    "train": train,
    "generate": generate,
    "compare-algorithms": compare_algorithms,
    "lint": lint,
    "demo": demo,
}
