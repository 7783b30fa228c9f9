"""The card in a reward model's folder: its origin and evaluation metrics. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.errors import ModelError
from reinforcepp.run_dir import REWARD_CARD

if TYPE_CHECKING:
    from reinforcepp.models.reward_texts import TextForm  # loads torch

REWARD_MODEL = "a reward model"
"""Public name of a reward model whose own name can be that of a folder."""
HOW_TO_TRAIN = "Train a reward model: reinforcepp reward --data YOUR.csv --output_dir models/reward_model"


@dataclass(frozen=True)
class CriterionCard:
    """Training data and evaluation metrics of one of several outputs.

    ``train_pairs`` and ``heldout_pairs`` count pairs with a preference, ``train_ties`` and ``heldout_ties`` those without one.
    """

    name: str
    train_pairs: int
    train_ties: int
    train_margins: int
    heldout_pairs: int
    heldout_ties: int
    figures: dict[str, Any]
    train_accuracy: float | None = None


@dataclass(frozen=True)
class RewardCard:
    """Origin and evaluation metrics of a reward model; saved as ``reward_model.json``.

    ``figures`` holds metrics of the held-out pairs. ``score_mean``, ``score_std`` and ``train_accuracy`` describe the
    training pairs; older cards lack the accuracy. ``fingerprint`` holds the scores of the probe texts. ``train_margins`` and
    ``train_ties`` count the training pairs with a margin and those without a preference.

    A model with several outputs has ``criteria``. Its figures are those of each criterion, and ``score_mean`` and ``score_std``
    those of the unweighted mean. ``score_means`` and ``score_covariance`` describe the outputs on the training pairs,
    ``correlations`` on the held-out pairs.

    ``form`` is the form of the texts. A model of the form conversation reads its score as transformers does: see
    ``models.reward_texts``.
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
    criteria: tuple[CriterionCard, ...] = ()
    score_means: list[float] = field(default_factory=list)
    score_covariance: list[list[float]] = field(default_factory=list)
    correlations: list[list[float]] = field(default_factory=list)
    form: TextForm = "answer"

    @property
    def labels(self) -> list[str]:
        """Names of the outputs."""
        return [criterion.name for criterion in self.criteria] or ["0"]

    def weighted(self, weights: Sequence[float]) -> RewardCard:
        """Return the card of a weighted sum of the outputs: that of a criterion if it is the only one with a weight."""
        if not self.criteria or not self.score_means:
            return self
        mean = sum(weight * value for weight, value in zip(weights, self.score_means, strict=True))
        variance = sum(
            one * other * self.score_covariance[i][j]
            for i, one in enumerate(weights)
            for j, other in enumerate(weights)
        )
        scaled = replace(self, score_mean=mean, score_std=math.sqrt(max(0.0, variance)))
        chosen = [criterion for criterion, weight in zip(self.criteria, weights, strict=True) if weight]
        if len(chosen) != 1 or sum(weights) <= 0:
            return scaled
        only = chosen[0]
        return replace(
            scaled,
            train_pairs=only.train_pairs,
            train_ties=only.train_ties,
            heldout_pairs=only.heldout_pairs,
            figures=only.figures,
            train_accuracy=only.train_accuracy,
        )


def read_card(folder: Path) -> RewardCard:
    """Return the card of a reward model's folder.

    Raises:
        ModelError: the folder has no card, or a damaged one.
    """
    path = folder / REWARD_CARD
    if not path.is_file():
        raise ModelError(f"{folder}: not a reward model, because it has no {REWARD_CARD}. {HOW_TO_TRAIN}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        criteria = tuple(CriterionCard(**each) for each in values.pop("criteria", ()))
        return RewardCard(**values, criteria=criteria)
    except (TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: damaged ({error}). {HOW_TO_TRAIN}") from error
