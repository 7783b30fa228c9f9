"""What each verb of the command does, from a checked configuration to files and a few lines for the user."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.config import (
    ChatConfig,
    CompareAlgorithmsConfig,
    CompareConfig,
    DemoConfig,
    DoctorConfig,
    ExportConfig,
    GenerateConfig,
    LintConfig,
    PlanConfig,
    PushConfig,
    RecipesConfig,
    ReportConfig,
    RewardModelConfig,
    ServeConfig,
    ServeRewardConfig,
    SftConfig,
    TrainConfig,
)
from reinforcepp.monitoring import echo, reading_progress
from reinforcepp.monitoring.metric_delta import change_of

if TYPE_CHECKING:
    from reinforcepp.training.reinforce_trainer import ReinforceTrainer


def reward(config: RewardModelConfig) -> None:
    """Train a reward model."""
    from reinforcepp.training.reward_trainer import train_reward_model

    train_reward_model(config)


def train(config: TrainConfig) -> ReinforceTrainer:
    """Train a policy and tell whether its held-out answers got better."""
    from reinforcepp.data import load_prompts
    from reinforcepp.monitoring.doctor import diagnose
    from reinforcepp.monitoring.run_record import read_run
    from reinforcepp.training.reinforce_trainer import ReinforceTrainer

    with reading_progress(config.streaming) as on_progress:
        data, train_rows, heldout_rows = load_prompts(
            config.data,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            **config.column_names,
            renamed=config.renamed,
            streaming=config.streaming,
            on_progress=on_progress,
        )
    echo(data.summary())
    trainer = ReinforceTrainer(
        model=config.model,
        reward_funcs=config.reward_sources,
        args=config,
        train_dataset=train_rows,
        eval_dataset=heldout_rows,
        judge=config.judge_name,
    )
    trainer.train()
    tell_difference(trainer)
    diagnosis = diagnose(read_run(trainer.folder))
    more = f" reinforcepp doctor {config.output_dir} tells more." if diagnosis.findings else ""
    echo(f"Doctor: {diagnosis.sentence}{more}", "yellow" if diagnosis.worst in ("error", "warning") else "")
    return trainer


def tell_difference(trainer: ReinforceTrainer) -> None:
    """One sentence on the held-out prompts before and after training."""
    if not {"before", "after"} <= set(trainer.evaluations):
        return
    before, after = trainer.evaluations["before"], trainer.evaluations["after"]
    figures = before.figures(), after.figures()
    told = [str(change) for name in ("reward", "judge") if (change := change_of(name, *figures)) is not None]
    echo(
        f"Held-out prompts ({len(after.completions)}): {', '.join(told)}, KL to the start {after.kl:.4f} nats per token, "
        f"length {before.length:.0f} -> {after.length:.0f} tokens"
    )


def generate(config: GenerateConfig) -> None:
    """Answer prompts."""
    from reinforcepp.commands.generate import generate as answer

    answer(config)


def chat(config: ChatConfig) -> int:
    """Talk on the terminal; the exit code tells whether Ctrl-C ended it."""
    from reinforcepp.commands.chat.command import run_chat

    return run_chat(config)


def serve(config: ServeConfig) -> int:
    """Serve a model until a signal comes."""
    from reinforcepp.commands.serve import run_server

    return run_server(config)


def export(config: ExportConfig) -> None:
    """Write a plain folder with a model card."""
    from reinforcepp.commands.export.command import run_export

    run_export(config)


def push(config: PushConfig) -> None:
    """Export and upload."""
    from reinforcepp.commands.export.push import run_push

    run_push(config)


def demo(config: DemoConfig) -> None:
    """The whole job on the built-in model."""
    from reinforcepp.commands.demo import run_demo

    run_demo(config)


def compare(config: CompareConfig) -> None:
    """Two models' answers to the same prompts."""
    from reinforcepp.commands.compare.command import run_compare

    run_compare(config)


def compare_algorithms(config: CompareAlgorithmsConfig) -> None:
    """Every estimator, several seeds, one page."""
    from reinforcepp.commands.compare_estimators import run as algorithm_comparison
    from reinforcepp.reports import estimators as algorithm_page

    comparison = algorithm_comparison.compare_algorithms(config)
    algorithm_comparison.print_summary(comparison)
    page = Path(config.output_dir).expanduser() / "comparison.html"
    algorithm_page.write_page(comparison, page)
    echo(f"{algorithm_page.verdict(comparison)} Everything is on the page {page}.", "green")


def plan(config: PlanConfig) -> int:
    """Memory and time of a training; the exit code tells whether it fits."""
    from reinforcepp.plan.command import run_plan

    return run_plan(config)


def lint(config: LintConfig) -> int:
    """What is wrong with a data file; the exit code tells whether it is too much."""
    from reinforcepp.commands.lint.command import run_lint

    return run_lint(config)


def doctor(config: DoctorConfig) -> int:
    """What went wrong in a training; the exit code tells whether it is too much."""
    from reinforcepp.commands.doctor import run_doctor

    return run_doctor(config)


def report(config: ReportConfig) -> None:
    """What became of a training, as a page."""
    from reinforcepp.commands.report import run_report

    run_report(config)


def recipes(config: RecipesConfig) -> None:
    """The configuration files that ship with the package."""
    from reinforcepp.commands.recipes import run_recipes

    run_recipes(config)


def serve_reward(config: ServeRewardConfig) -> None:
    """Answer requests for a reward model's scores, until a signal comes."""
    from reinforcepp.commands.reward_server import serve

    serve(config)


def _sft_or_show(config: SftConfig) -> None:
    """Fine-tune a language model, or show what it would be trained on."""
    if config.dry_run:
        from reinforcepp.commands.dry_run import show_warm_up

        return show_warm_up(config)
    from reinforcepp.training.sft_trainer import train_language_model

    train_language_model(config)


def _reward_or_show(config: RewardModelConfig) -> None:
    """Train a reward model, or show what it would be trained on."""
    if not config.dry_run:
        return reward(config)
    from reinforcepp.commands.dry_run import show_reward_training

    show_reward_training(config)


def _train_or_show(config: TrainConfig) -> None:
    """Train a policy, or show what it would be trained on."""
    if not config.dry_run:
        from reinforcepp.distributed.ranks import init_process_group

        init_process_group(config.watchdog_seconds)
        train(config)
        return
    from reinforcepp.commands.dry_run import show_training

    show_training(config)


ACTIONS: dict[str, Callable[[Any], Any]] = {
    "sft": _sft_or_show,
    "reward": _reward_or_show,
    "train": _train_or_show,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "export": export,
    "push": push,
    "compare": compare,
    "compare-algorithms": compare_algorithms,
    "plan": plan,
    "lint": lint,
    "doctor": doctor,
    "report": report,
    "serve-reward": serve_reward,
    "recipes": recipes,
    "demo": demo,
}

LOADS = {
    "sft": "reinforcepp.training.sft_trainer",
    "reward": "reinforcepp.training.reward_trainer",
    "train": "reinforcepp.training.reinforce_trainer",
    "generate": "reinforcepp.commands.generate",
    "chat": "reinforcepp.commands.chat.command",
    "serve": "reinforcepp.commands.serve",
    "export": "reinforcepp.commands.export.command",
    "push": "reinforcepp.commands.export.push",
    "compare": "reinforcepp.commands.compare.command",
    "compare-algorithms": "reinforcepp.commands.compare_estimators.run",
    "serve-reward": "reinforcepp.commands.reward_server",
    "demo": "reinforcepp.commands.demo",
}
"""The module that brings a verb's heavy libraries, loaded while a signal ends the process at once; others need none."""
