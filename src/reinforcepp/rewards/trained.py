"""A trained reward model: scoring texts, the card saved beside it, and the proof that a folder is what it says.

The card holds the scores of eight probe texts. Loading scores them again and refuses a folder that answers otherwise:
a head that was freshly initialised, weights swapped underneath, another tokenizer or another frame all show there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import ConfigError, ModelError
from reinforcepp.files import write_json
from reinforcepp.models.loading import context_length, load_tokenizer, resolve, save_model
from reinforcepp.models.reward_models import load_reward_weights
from reinforcepp.models.tokenization import encode_example, pad
from reinforcepp.rewards.card import HOW_TO_TRAIN, RewardCard, read_card
from reinforcepp.run_dir import REWARD_CARD

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
    """A reward model as a reward function; framing and ending of texts are those it was trained with.

    Args:
        model: sequence classifier with one output, reading its score at the last attended token.
        tokenizer: its own tokenizer, which may be another one than the policy's.
        batch_size: texts scored at a time.
    """

    name = "reward_model"

    card: RewardCard | None = None
    """What it was made from, where it was loaded from a folder."""

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
        """One score per completion. A completion cut off at the length limit gets no EOS that it didn't say."""
        reasons = finish_reason or ["stop"] * len(prompts)
        rows = [
            encode_example(self.tokenizer, prompt, completion, ended=reason == "stop")
            for prompt, completion, reason in zip(prompts, completions, reasons, strict=True)
        ]
        return self.scaled(self.score_rows(rows))

    def normalize(self) -> None:
        """From now on give scores less the mean, over the deviation, that the card holds of the training pairs.

        Raises:
            ConfigError: if there is no card, or its deviation is 0.
        """
        if self.card is None or not self.card.score_std > 0:
            lack = "no card" if self.card is None else "scores without any spread on its card"
            raise ConfigError(
                f"reward_normalize needs mean and deviation from a reward model's card, but {self.name} has {lack}: leave it out."
            )
        self._scale = self.card.score_mean, self.card.score_std

    def scaled(self, scores: list[float]) -> list[float]:
        """What a caller is given for ``scores``: themselves, or normalised."""
        if self._scale is None:
            return scores
        mean, deviation = self._scale
        return [(score - mean) / deviation for score in scores]

    def score_rows(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """Scores of framed, tokenised texts; one over the model's context loses tokens from the left."""
        limit = context_length(self.model.config) or max(len(row) for row in rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = [0.0] * len(rows)
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                ids_BL, mask_BL = pad([rows[i][-limit:] for i in chosen], int(self.tokenizer.pad_token_id))
                device = self.model.device
                logits_B1 = self.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device)).logits
                for i, score in zip(chosen, logits_B1.float().squeeze(-1).tolist(), strict=True):
                    scores[i] = score
        return scores

    def fingerprint(self) -> list[float]:
        """The scores of the probe texts."""
        return self.score_rows([encode_example(self.tokenizer, prompt, answer) for prompt, answer in PROBES])


def save_reward_model(reward: TrainedReward, card: RewardCard, folder: Path) -> None:
    """Weights, tokenizer and, last of all, the card that makes the folder a reward model."""
    save_model(reward.model, reward.tokenizer, folder)
    write_json(folder / REWARD_CARD, asdict(card))


def check_reward_folder(name: str) -> RewardCard:
    """The card of a reward-model folder, read without loading weights.

    Raises:
        ModelError: if the folder is missing or has no card, with the cure.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ModelError(f"There is no reward model folder {name}. {HOW_TO_TRAIN}")
    resolve(name)
    return read_card(folder)


def load_reward_model(name: str) -> TrainedReward:
    """Load a reward model and prove that it is the one its card describes.

    Raises:
        ModelError: for a folder whose head is missing, of another shape, or scores the probe texts differently.
    """
    card = check_reward_folder(name)
    folder = Path(name).expanduser()
    tokenizer = load_tokenizer(str(folder))  # first: it is checked against the vocabulary without reading weights
    reward = TrainedReward(load_reward_weights(folder), tokenizer)
    tolerance = FINGERPRINT_TOLERANCE * max(1.0, card.score_std)
    actual = reward.fingerprint()
    gaps = [abs(a - b) for a, b in zip(actual, card.fingerprint, strict=False)]
    if len(card.fingerprint) != len(PROBES) or max(gaps) > tolerance:
        worst = f"by up to {max(gaps):.3g}" if gaps else "entirely"
        raise ModelError(
            f"The reward model in {name} scores its probe texts differently than when it was saved ({worst}): its weights, "
            "tokenizer or template were changed since, or its head was freshly initialised. Restore the folder or train "
            "the reward model again."
        )
    reward.card = card
    return reward
