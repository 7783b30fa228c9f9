"""The command ``demo``: reward model, REINFORCE++, generation and comparison on the built-in model and data.

The gold judge scores responses to held-out prompts. Neither the reward model nor the policy is trained on its scores.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from rich.table import Table
from rich.text import Text

from reinforcepp.commands.generate import run_generate
from reinforcepp.commands.report import PAGE, read_report
from reinforcepp.config import DemoConfig, GenerateConfig, RewardModelConfig, TrainConfig
from reinforcepp.data import load_prompts
from reinforcepp.files import write_json
from reinforcepp.monitoring import read_metrics
from reinforcepp.monitoring.curve import draw_curve
from reinforcepp.run_dir import check_output, claim_output, clear
from reinforcepp.runtime.terminal import console, echo
from reinforcepp.training.reinforce_trainer import ReinforceTrainer
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.types import Completion

SHOWN = 5
ALL_HELDOUT = 1000


@dataclass(frozen=True)
class DemoResult:
    """Results of a demo run on held-out prompts.

    Gold scores are the mean of the judge, 0 to 1. ``kl`` is in nats per token. ``distinct`` is the number of distinct
    responses divided by the number of topics, with one prompt per topic. ``length_ratio`` is the mean length after
    training divided by the mean length before.
    """

    seed: int
    rm_accuracy: float
    gold_before: float
    gold_after: float
    kl: float
    distinct: float
    length_ratio: float
    seconds: float


def run_demo(config: DemoConfig) -> DemoResult:
    """Run every stage and save all results under ``config.output_dir``."""
    folder = check_output(config.output_dir, overwrite=config.overwrite)
    with claim_output(config.output_dir, overwrite=config.overwrite):
        clear(folder)
        return _run_stages(config, folder)


def _run_stages(config: DemoConfig, folder: Path) -> DemoResult:
    begin = time.monotonic()
    reward_config, train_config = demo_settings(config, folder)

    echo("1/4  Reward model: train on pairs of preferred and rejected responses", "bold")
    card = train_reward_model(reward_config).card

    echo("\n2/4  REINFORCE++: train the policy on the scores of the reward model", "bold")
    _, train_rows, heldout_rows = load_prompts(train_config.data, heldout_fraction=0, seed=config.seed)
    trainer = ReinforceTrainer(
        train_config.model,
        train_config.reward_model,
        train_config,
        train_rows,
        eval_dataset=heldout_rows,
        judge=train_config.judge_name,
    )
    trainer.train()
    metrics = read_metrics(trainer.folder)
    draw_curve(metrics, folder / "training_curve.png", f"REINFORCE++ on {train_config.model}, seed {config.seed}")

    echo("\n3/4  Generation with the trained model", "bold")
    question = heldout_rows[0].prompt
    echo(f"> {question}")
    run_generate(
        GenerateConfig(model=train_config.output_dir, prompt=question, max_new_tokens=64, engine="transformers")
    )

    echo("\n4/4  Before and after training, on held-out prompts scored by the gold judge", "bold")
    before, after = trainer.evaluations["before"], trainer.evaluations["after"]
    gold_before, gold_after = _known(before.judgements), _known(after.judgements)
    _show(before.completions, after.completions, gold_before, gold_after)
    result = DemoResult(
        seed=config.seed,
        rm_accuracy=card.figures["accuracy"],
        gold_before=fmean(gold_before),
        gold_after=fmean(gold_after),
        kl=after.kl,
        distinct=_distinct(after.completions),
        length_ratio=after.length / before.length,
        seconds=time.monotonic() - begin,
    )
    write_json(folder / "result.json", asdict(result))
    rows = zip(before.completions, after.completions, gold_before, gold_after, strict=True)
    write_json(
        folder / "comparison.json",
        [
            {"prompt": a.prompt.text, "before": a.text, "after": b.text, "gold_before": ga, "gold_after": gb}
            for a, b, ga, gb in rows
        ],
    )
    echo(
        f"Reward model, held-out accuracy {result.rm_accuracy:.2f}. Gold score {result.gold_before:.2f} -> "
        f"{result.gold_after:.2f} on {len(gold_after)} held-out prompts, KL {result.kl:.3f} nats/token, "
        f"{result.distinct:.2f} distinct responses per topic, length ratio {result.length_ratio:.2f}, {result.seconds:.0f} s.",
        "bold",
    )
    read_report([folder / "policy"]).save(folder / PAGE)
    echo(f"Saved to {folder}: {PAGE}, reward_model/, policy/, training_curve.png, comparison.json", "green")
    return result


def demo_settings(config: DemoConfig, folder: Path) -> tuple[RewardModelConfig, TrainConfig]:
    """Return the settings of the demo's two trainings."""
    reward = RewardModelConfig(
        output_dir=str(folder / "reward_model"), seed=config.seed, learning_rate=3e-4, num_train_epochs=5, batch_size=16
    )
    train = TrainConfig(
        reward_model=reward.output_dir,
        output_dir=str(folder / "policy"),
        seed=config.seed,
        max_steps=config.max_steps,
        batch_size=64,
        micro_batch_size=32,
        max_prompt_length=64,
        max_new_tokens=64,
        learning_rate=2e-4,
        lr_scheduler_type="linear",  # The policy must converge, because it samples at temperature 1.
        kl_coef=0.05,
        rollout=config.rollout,
        eval_prompts=ALL_HELDOUT,
    )
    return reward, train


def _distinct(completions: Sequence[Completion]) -> float:
    one_per_topic: dict[str, str] = {}
    for completion in completions:
        one_per_topic.setdefault(str(completion.prompt.columns["topic"]), completion.text)
    return len(set(one_per_topic.values())) / len(one_per_topic)


def _known(judgements: list[float | None] | None) -> list[float]:
    assert judgements is not None, "the demo's data has a judge"
    return [score for score in judgements if score is not None]


def _show(
    before: Sequence[Completion], after: Sequence[Completion], gold_before: list[float], gold_after: list[float]
) -> None:
    table = Table(show_lines=True, title=f"{SHOWN} of {len(before)} held-out prompts (gold score in front)")
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1)
    for i in list(range(0, len(before), max(1, len(before) // SHOWN)))[:SHOWN]:
        cells = [
            before[i].prompt.text,
            f"{gold_before[i]:.2f}  {before[i].text}",
            f"{gold_after[i]:.2f}  {after[i].text}",
        ]
        table.add_row(*(Text(cell) for cell in cells))
    console.print(table)
