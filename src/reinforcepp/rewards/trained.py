"""Trained reward models: score texts and preference pairs, save the model with its card, and check it when loading.

The card holds the scores of eight probe texts. Loading scores them again and refuses a folder with other scores. That
detects a newly initialized score head, replaced weights, another tokenizer and another chat template.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import ConfigError, ModelError, TrainingDiverged
from reinforcepp.files import write_json
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import context_length, load_tokenizer, resolve
from reinforcepp.models.reward_models import load_reward_weights
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenization import encode_example, pad, split_example
from reinforcepp.rewards.card import HOW_TO_TRAIN, RewardCard, read_card
from reinforcepp.run_dir import REWARD_CARD
from reinforcepp.types import Preference, ScoredPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINGERPRINT_TOLERANCE = 1e-2
SCORING_BATCH_SIZE = 64

PROBES = [
    ("How do I see which process listens on port 443?", "Run ss -ltnp 'sport = :443' and read the last column."),
    ("How do I see which process listens on port 443?", "Just restart the server."),
    ("What does a default route do?", "It says where packets go when no other route matches."),
    ("What does a default route do?", ""),
    ("Why is the Wi-Fi slow?", "Measure signal and channel load before changing anything; 5 GHz often helps."),
    ("Why is the Wi-Fi slow?", "slow slow slow slow slow slow"),
    ("Schreib mir ein Gedicht.", "Über allen Gipfeln ist Ruh, das ist von Goethe."),
    ("x", "y"),
]


class TrainedReward:
    """A reward model as a reward function. It formats texts and ends them as in its training.

    Args:
        model: sequence classifier with one output, which reads its score at the last attended token.
        tokenizer: the reward model's tokenizer, which can differ from the policy's.
        batch_size: texts per forward pass.
    """

    name = "reward_model"

    card: RewardCard | None = None
    """Card of a model that was loaded from a folder."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = SCORING_BATCH_SIZE
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._scale: tuple[float, float] | None = None

    def __call__(
        self, prompts: list[str], completions: list[str], finish_reason: Sequence[str] | None = None, **_: Any
    ) -> list[float]:
        """Return one score per completion. A completion truncated at the length limit gets no end token."""
        reasons = finish_reason or ["stop"] * len(prompts)
        rows = [
            encode_example(self.tokenizer, prompt, completion, finished=reason == "stop")
            for prompt, completion, reason in zip(prompts, completions, reasons, strict=True)
        ]
        return self.scaled(self.score_rows(rows))

    def normalize(self) -> None:
        """Standardize scores from now on: (score - mean) / std, with the mean and std of the training pairs.

        Raises:
            ConfigError: there is no card, or its std is 0.
        """
        if self.card is None or not self.card.score_std > 0:
            problem = "no card" if self.card is None else "a card with score_std 0"
            raise ConfigError(f"reward_normalize: {self.name} has {problem}, so scores can't be standardized. Omit it.")
        self._scale = self.card.score_mean, self.card.score_std

    def scaled(self, scores: list[float]) -> list[float]:
        """Return ``scores``, standardized after :meth:`normalize`."""
        if self._scale is None:
            return scores
        mean, std = self._scale
        return [(score - mean) / std for score in scores]

    def score_rows(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Return scores of formatted, tokenized texts; texts beyond the model's context are truncated on the left.

        An encoder keeps the first token, at which it can read the score.
        """
        limit = context_length(self.model.config) or max(len(row) for row in rows)
        if is_encoder(self.model.config):
            rows = [[*row[:1], *row[1 - limit :]] if len(row) > limit else row for row in rows]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                ids_BL, mask_BL = pad([rows[i][-limit:] for i in batch], int(self.tokenizer.pad_token_id))
                device = self.model.device
                logits_B1 = self.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device)).logits
                for i, score in zip(batch, logits_B1.float().squeeze(-1).tolist(), strict=True):
                    scores[i] = score
        return scores

    def fingerprint(self) -> list[float]:
        """Return the scores of the probe texts."""
        return self.score_rows([encode_example(self.tokenizer, prompt, answer) for prompt, answer in PROBES])


def save_reward_model(reward: TrainedReward, card: RewardCard, folder: Path) -> None:
    """Save weights, tokenizer and, last, the card, which marks the folder as a complete reward model."""
    save_model(reward.model, reward.tokenizer, folder)
    write_json(folder / REWARD_CARD, asdict(card))


def check_reward_folder(name: str) -> RewardCard:
    """Return the card of a reward model's folder without loading weights.

    Raises:
        ModelError: the folder is missing or has no card.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{name}: reward model folder not found. {HOW_TO_TRAIN}")
    resolve(name)
    return read_card(folder)


def load_reward_model(name: str) -> TrainedReward:
    """Load a reward model and check that it scores the probe texts as its card says.

    Raises:
        ModelError: the score head is missing or has another shape, or the probe texts score differently.
    """
    card = check_reward_folder(name)
    folder = Path(name).expanduser()
    tokenizer = load_tokenizer(str(folder))  # first, because it fails without reading weights
    reward = TrainedReward(load_reward_weights(folder), tokenizer)
    tolerance = FINGERPRINT_TOLERANCE * max(1.0, card.score_std)
    actual = reward.fingerprint()
    differences = [abs(a - b) for a, b in zip(actual, card.fingerprint, strict=False)]
    if len(card.fingerprint) != len(PROBES) or max(differences) > tolerance:
        extent = f"by up to {max(differences):.3g}" if differences else "in number"
        raise ModelError(
            f"{name}: the reward model scores its probe texts differently than when it was saved ({extent}), because its "
            "weights, tokenizer or chat template changed or its score head was newly initialized. Restore the folder or "
            "train the reward model again."
        )
    reward.card = card
    return reward


# --- preference pairs -------------------------------------------------------------------------------------------------


def score_pairs(reward: TrainedReward, pairs: Sequence[Preference]) -> list[ScoredPair]:
    """Score both answers of every pair, in the order of ``pairs``.

    Raises:
        TrainingDiverged: a score isn't finite.
    """
    if not pairs:
        return []
    tokenizer = reward.tokenizer
    chosen = [split_example(tokenizer, p.prompt, p.chosen) for p in pairs]
    rejected = [split_example(tokenizer, p.prompt, p.rejected) for p in pairs]
    chosen_scores = reward.score_rows([context + answer for context, answer in chosen])
    rejected_scores = reward.score_rows([context + answer for context, answer in rejected])
    for pair, *scores in zip(pairs, chosen_scores, rejected_scores, strict=True):
        if not all(map(math.isfinite, scores)):
            raise TrainingDiverged(f"The score of an answer in row {pair.row} isn't finite. Lower learning_rate.")
    return [
        ScoredPair(
            row=pair.row,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            chosen_score=chosen_scores[i],
            rejected_score=rejected_scores[i],
            chosen_length=len(chosen[i][1]),
            rejected_length=len(rejected[i][1]),
        )
        for i, pair in enumerate(pairs)
    ]
