"""What the run that made a model says against judging it so: prompts that it has seen, a judge that it was trained to please."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforcepp.config import CompareConfig
from reinforcepp.data.builtin import JUDGE_NAME
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.run_dir import RUN_FILE

SPLIT = ("seed", "heldout_fraction", "prompt_column")


def doubts(config: CompareConfig) -> list[str]:
    """A sentence for each reason to take a figure with care, from what the models' folders tell of their training."""
    found = []
    for side, name in (("A", config.model_a), ("B", config.model_b)):
        run = _run_of(name)
        if _pleases_the_judge(config, run):
            found.append(
                f"{side} was trained to please this very judge, so high scores say little about how good it is: another "
                "judge would tell more."
            )
        training = run.get("settings", {})
        if _same(training.get("data"), config.data) and not config.data.startswith("builtin:"):
            found += _seen(config, side, training)
    return found


def _pleases_the_judge(config: CompareConfig, run: Mapping[str, Any]) -> bool:
    if config.judge_name == JUDGE_NAME:
        return False
    settings = run.get("settings", {})
    if not settings.get("rewards") and _same(settings.get("reward_model"), config.judge_name):
        return True
    fingerprint = check_reward_folder(config.judge_name).fingerprint  # finds it under another name, too
    return any((reward.get("card") or {}).get("fingerprint") == fingerprint for reward in run.get("rewards", ()))


def _seen(config: CompareConfig, side: str, training: Mapping[str, Any]) -> list[str]:
    if training.get("heldout_fraction") == 0:
        return [f"{side} was trained on all prompts of {config.data}, so none of them is new to it."]
    if config.heldout_fraction == 0:
        return [f"With heldout_fraction 0 most prompts are ones that {side} was trained on."]
    differing = [name for name in SPLIT if training.get(name) != getattr(config, name)]
    if not differing:
        return []
    settings = " ".join(f"--{name} {training.get(name)}" for name in differing)
    return [
        f"{side} was trained on another part of {config.data} and has seen some of these prompts: {settings} avoids them."
    ]


def _run_of(name: str) -> dict[str, Any]:
    """What is noted of the training that wrote the folder, or of the run of which it is a checkpoint; else nothing."""
    folder = Path(name).expanduser()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    try:
        return dict(json.loads((run / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _same(noted: Any, given: str) -> bool:
    return isinstance(noted, str) and Path(noted).expanduser().resolve() == Path(given).expanduser().resolve()
