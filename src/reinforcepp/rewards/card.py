"""The card in a reward model's folder: its origin and evaluation metrics. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.errors import ModelError
from reinforcepp.run_dir import REWARD_CARD

HOW_TO_TRAIN = "Train a reward model: reinforcepp reward --data YOUR.csv --output_dir models/reward_model"


@dataclass(frozen=True)
class RewardCard:
    """Origin and evaluation metrics of a reward model; saved as ``reward_model.json``.

    ``figures`` holds metrics of the held-out pairs. ``score_mean``, ``score_std`` and ``train_accuracy`` describe the
    training pairs; older cards lack the accuracy. ``fingerprint`` holds the scores of the probe texts. ``train_margins`` and
    ``train_ties`` count the training pairs with a margin and those without a preference.
    """

    base_model: str
    data: str
    data_sha256: str
    train_pairs: int
    heldout_pairs: int
    figures: dict[str, Any]
    score_mean: float
    score_std: float
    settings: dict[str, Any]
    fingerprint: list[float]
    train_accuracy: float | None = None
    train_margins: int = 0
    train_ties: int = 0


def read_card(folder: Path) -> RewardCard:
    """Return the card of a reward model's folder.

    Raises:
        ModelError: the folder has no card, or a damaged one.
    """
    path = folder / REWARD_CARD
    if not path.is_file():
        raise ModelError(f"{folder}: not a reward model, because it has no {REWARD_CARD}. {HOW_TO_TRAIN}")
    try:
        return RewardCard(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path}: damaged ({error}). {HOW_TO_TRAIN}") from error
