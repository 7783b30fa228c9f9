"""Dynamic sampling, masking of truncated completions, negative-token filtering, FlashREINFORCE: each against REINFORCE++.

The task is that of the demo, with its model, data and reward model, but the reward is 1 if the reward model's score is above
its mean on the training pairs, otherwise 0, so that completions of a prompt often have equal rewards. Completions have up to 40
tokens, and some are truncated. Scores are those of the gold judge on held-out prompts, which no training sees. Every variant
has the same seeds, and their differences are paired by seed. ``environments.py`` runs it as its part ``filters``.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from staleness import interval

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands.demo import demo_settings
from reinforcepp.config import DemoConfig
from reinforcepp.data import load_prompts
from reinforcepp.files import write_json
from reinforcepp.monitoring import read_metrics
from reinforcepp.rewards.card import REWARD_CARD
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.training.reward_trainer import train_reward_model

SEEDS, STEPS = range(5), 60
PLAIN = "REINFORCE++"
COMMON: dict[str, Any] = {"batch_size": 16, "num_generations": 4, "max_new_tokens": 40, "max_steps": STEPS}
VARIANTS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "dynamic sampling": {"dynamic_sampling": True},
    "masking truncated completions": {"mask_truncated_completions": True},
    "negative-token filtering": {"negative_token_fraction": 0.2},
    "FlashREINFORCE": {"estimator": "flash_reinforce"},
}


def filters(work: Path, processes: int = 2, seeds: Sequence[int] = SEEDS) -> dict[str, Any]:
    """Return the results of all trainings; those that ``work`` has aren't repeated."""
    work.mkdir(parents=True, exist_ok=True)
    reward, _ = demo_settings(DemoConfig(seed=0), work)
    if not (Path(reward.output_dir) / REWARD_CARD).is_file():
        train_reward_model(reward)
    jobs = [(name, seed) for seed in seeds for name in VARIANTS]
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        rows = pool.map(partial(measured, work), jobs, chunksize=1)
    found = {(row["variant"], row["seed"]): row for row in rows}
    return {
        "steps": STEPS,
        "settings": COMMON,
        "variants": [
            {
                "variant": name,
                "settings": settings,
                "gold_before": fmean(found[name, seed]["gold_before"] for seed in seeds),
                "gold_after": interval([found[name, seed]["gold_after"] for seed in seeds]),
                "tokens": fmean(found[name, seed]["tokens"] for seed in seeds),
                "gold_difference": interval(
                    [found[name, seed]["gold_after"] - found[PLAIN, seed]["gold_after"] for seed in seeds]
                ),
            }
            for name, settings in VARIANTS.items()
        ],
        "rows": rows,
    }


def measured(work: Path, job: tuple[str, int]) -> dict[str, Any]:
    """Return the result of one training, from its file if there is one."""
    name, seed = job
    folder = work / f"{name.replace(' ', '_')}-{seed}"
    result = folder.with_suffix(".json")
    if not result.is_file():
        write_json(result, {"variant": name, "seed": seed, **trained(work, folder, VARIANTS[name], seed)})
    return dict(json.loads(result.read_text(encoding="utf-8")))


def trained(work: Path, folder: Path, settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train once, and return gold scores before and after, and the tokens generated."""
    _, demo = demo_settings(DemoConfig(seed=seed, rollout="transformers"), work)
    _, rows, held_out = load_prompts(demo.data, heldout_fraction=0, seed=seed)
    names = (
        "micro_batch_size",
        "max_prompt_length",
        "learning_rate",
        "lr_scheduler_type",
        "kl_coef",
        "rollout",
        "seed",
    )
    shared = {name: getattr(demo, name) for name in names}
    args = ReinforceConfig(
        **(shared | COMMON | settings | {"output_dir": str(folder), "overwrite": True, "eval_prompts": 1000})
    )
    reward = load_rewards(demo.reward_model)
    threshold = reward.trained[0].card.score_mean

    def above_mean(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        """Return 1 for scores of the reward model above its mean, otherwise 0."""
        return [float(score > threshold) for score in reward.trained[0](prompts, completions, **columns)]

    above_mean.plain_text = True  # type: ignore[attr-defined]
    trainer = ReinforceTrainer(demo.model, above_mean, args, rows, held_out, judge=demo.judge_name)
    trainer.train()
    before, after, log = trainer.evaluations["before"], trainer.evaluations["after"], read_metrics(folder)
    return {
        "gold_before": before.judge,
        "gold_after": after.judge,
        "kl": after.kl,
        "length": after.length,
        "truncated": after.truncated,
        "tokens": log[-1]["num_tokens"],
        "groups_without_signal": fmean(row["frac_reward_zero_std"] for row in log if "frac_reward_zero_std" in row),
    }
