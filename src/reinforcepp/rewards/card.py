"""The card in a reward model's folder: what it was made from and how well it does. Read without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.errors import ModelError
from reinforcepp.run_dir import REWARD_CARD

HOW_TO_TRAIN = "Train one first: reinforcepp reward --data YOUR.csv --output_dir models/reward_model"


@dataclass(frozen=True)
class RewardCard:
    """What a reward model was made from and how well it does; saved as ``reward_model.json``.

    ``figures`` are those of the held-out pairs, ``score_mean`` and ``score_std`` of the training pairs' scores, as is
    ``train_accuracy``, which older cards lack.
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


def read_card(folder: Path) -> RewardCard:
    """The card of a reward model's folder.

    Raises:
        ModelError: if there is none or it is damaged, with the cure.
    """
    path = folder / REWARD_CARD
    if not path.is_file():
        raise ModelError(f"The folder {folder} is not a reward model: it has no {REWARD_CARD}. {HOW_TO_TRAIN}")
    try:
        return RewardCard(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error}). {HOW_TO_TRAIN}") from error
