"""Caveats from the runs that trained the models: prompts seen in training, or a judge used as reward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforcepp.config import CompareConfig
from reinforcepp.config.data_spec import REASONING_GYM, heldout_tasks
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.data.builtin import JUDGE_NAME
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.run_dir import RUN_FILE
from reinforcepp.runtime.redaction import redacted

SPLIT = ("seed", "heldout_fraction", "prompt_column")


def caveats(config: CompareConfig, *, has_folder: bool = True) -> list[str]:
    """Return a sentence for each reason to distrust a metric, from the run records in the models' folders.

    ``has_folder`` is False if a function is the judge.
    """
    found = []
    for side, name in (("A", config.model_a), ("B", config.model_b)):
        run = _run_of(name)
        if has_folder and _trained_on_judge(config, run):
            found.append(
                f"{side} was trained with this judge as its reward, so high scores don't show quality. Use another judge."
            )
        training = run.get("settings", {})
        own_split = config.data.startswith("builtin:") or heldout_tasks(config.data) is not None
        if _same(training.get("data"), config.data) and not own_split:
            found += _seen(config, side, training)
    return found


def _trained_on_judge(config: CompareConfig, run: Mapping[str, Any]) -> bool:
    if config.judge_name in (
        JUDGE_NAME,
        REASONING_GYM,
    ):  # A correct answer is correct, whatever the model was trained on.
        return False
    settings = run.get("settings", {})
    if parse_source(config.judge_name).kind != "model":
        return any(str(reward).endswith(redacted(config.judge_name)) for reward in settings.get("rewards") or ())
    if not settings.get("rewards") and _same(settings.get("reward_model"), config.judge_name):
        return True
    card = check_reward_folder(config.judge_name)
    return card is not None and any(  # also matches a copy in another folder
        (reward.get("card") or {}).get("fingerprint") == card.fingerprint for reward in run.get("rewards", ())
    )


def _seen(config: CompareConfig, side: str, training: Mapping[str, Any]) -> list[str]:
    if training.get("heldout_fraction") == 0:
        return [f"{side} was trained on all prompts of {config.data}, so none of them are held out."]
    if config.heldout_fraction == 0:
        return [f"With heldout_fraction 0, {side} was trained on most of the prompts."]
    differing = [name for name in SPLIT if training.get(name) != getattr(config, name)]
    if not differing:
        return []
    settings = " ".join(f"--{name} {training.get(name)}" for name in differing)
    return [
        f"{side} was trained on another split of {config.data}, which contains some of these prompts. Use {settings}."
    ]


def _run_of(name: str) -> dict[str, Any]:
    """Return the record of the run that wrote the folder or checkpoint; empty if there is none."""
    folder = Path(name).expanduser()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    try:
        return dict(json.loads((run / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _same(recorded: Any, given: str) -> bool:
    return isinstance(recorded, str) and Path(recorded).expanduser().resolve() == Path(given).expanduser().resolve()
