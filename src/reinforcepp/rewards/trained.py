"""Reward models: score texts and preference pairs, save the model with its card, and check it when loading.

The card holds the scores of eight probe texts. Loading scores them again and refuses a folder with other scores. That
detects a newly initialized score head, replaced weights, another tokenizer and another chat template. A classifier of other
origin has no card; the scores of its first use take its place: see ``calibration``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from reinforcepp.config.reward_spec import ModelSource, parse_model
from reinforcepp.errors import ConfigError, ModelError, TrainingDiverged
from reinforcepp.files import write_json
from reinforcepp.models.conversations import Variables
from reinforcepp.models.encoders import is_encoder
from reinforcepp.models.loading import context_length, load_tokenizer, local_folder, with_fused_gelu
from reinforcepp.models.micro_batches import MicroBatchLimit, micro_batches
from reinforcepp.models.reward_models import (
    ScoreReading,
    load_classifier,
    load_reward_weights,
    prepare_scoring,
    scores_packed_rows,
)
from reinforcepp.models.reward_texts import TextForm, encode_scored, pair_limit, split_scored
from reinforcepp.models.rotary import frequencies_change
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenization import pad
from reinforcepp.rewards.card import HOW_TO_TRAIN, RewardCard, read_card
from reinforcepp.rewards.foreign import calibrate, check_classifier, default_dtype, load_foreign, output_weights
from reinforcepp.run_dir import REWARD_CARD, RUN_FILE
from reinforcepp.runtime.terminal import warn_once
from reinforcepp.types import Conversation, Preference, ScoredPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FINGERPRINT_TOLERANCE = 1e-2
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

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
        model: sequence classifier, which reads its scores at the last attended token.
        tokenizer: the reward model's tokenizer, which can differ from the policy's.
    """

    name = "reward_model"
    plain_text = True

    card: RewardCard | None = None
    """Card of a model that was loaded from a folder."""

    limit: MicroBatchLimit | None = None
    """Largest batch of a forward pass, packed if the model allows it; None is the device's default."""
    given: bool = False
    """Whether the caller loaded the model, which then keeps its dtype."""
    form: TextForm = "answer"
    """Form of the scored texts."""
    text_form: TextForm | None = None
    """Form of texts whose prompt is a text, if it isn't ``form``."""
    reading = ScoreReading()
    """How scores are read from the model."""
    output_weights: tuple[float, ...] = (1.0,)
    """Weight of each output of the model in the score."""
    labels: Sequence[str] = ()
    """Names of the outputs, if there are several."""
    by_output: Mapping[str, list[float]] = MappingProxyType({})
    """Unweighted scores of the last call by output, if there are several."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = with_fused_gelu(model)
        self.tokenizer = tokenizer
        self._scale: tuple[float, float] | None = None

    def __call__(
        self,
        prompts: Sequence[Conversation],
        completions: list[str],
        finish_reason: Sequence[str] | None = None,
        conversations: Sequence[Conversation] | None = None,
        chat_template_kwargs: Sequence[Variables] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return one score per completion. In the form answer, a completion truncated at the length limit gets no end token.

        ``conversations`` are the prompts as the chat template takes them; by default, that is ``prompts``.
        ``chat_template_kwargs`` are the rows' variables of the chat template.
        """
        reasons = finish_reason or ["stop"] * len(prompts)
        texts = zip(
            conversations or prompts,
            completions,
            reasons,
            chat_template_kwargs or [{}] * len(prompts),
            strict=True,
        )
        rows = [
            self.encode(prompt, completion, finished=reason == "stop", variables=variables)
            for prompt, completion, reason, variables in texts
        ]
        if len(self.labels) < 2:
            return self.scaled(self.score_rows(rows))
        scores_NC = self.score_outputs(rows)
        self.by_output = dict(zip(self.labels, scores_NC.T.tolist(), strict=True))
        return self.scaled(self.weighted(scores_NC))

    def encode(
        self, prompt: Conversation, answer: str, *, finished: bool = True, variables: Variables | None = None
    ) -> list[int]:
        """Return the token ids of a prompt and its answer, as the model was trained on them."""
        return encode_scored(
            self.tokenizer,
            prompt,
            answer,
            self._form_of(prompt),
            finished=finished,
            limit=self._pair_limit,
            variables=variables,
        )

    def split(
        self, prompt: Conversation, answer: str, *, finished: bool = True, variables: Variables | None = None
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of :meth:`encode`, up to the answer and from there."""
        return split_scored(
            self.tokenizer,
            prompt,
            answer,
            self._form_of(prompt),
            finished=finished,
            limit=self._pair_limit,
            variables=variables,
        )

    def _form_of(self, prompt: Conversation) -> TextForm:
        return self.text_form if self.text_form is not None and isinstance(prompt, str) else self.form

    @property
    def _pair_limit(self) -> int | None:
        return pair_limit(self.tokenizer, self.model.config) if self.form == "pair" else None

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
        """Return the weighted sum of the outputs for each of formatted, tokenized texts; see :meth:`score_outputs`."""
        return self.weighted(self.score_outputs(rows))

    def weighted(self, scores_NC: Tensor) -> list[float]:
        """Return the weighted sum of the outputs of each text, without normalization."""
        scores: list[float] = (scores_NC * scores_NC.new_tensor(self.output_weights)).sum(-1).tolist()
        return scores

    def score_outputs(self, rows: Sequence[Sequence[int]], report: Callable[[int], None] | None = None) -> Tensor:
        """Return all outputs for formatted, tokenized texts. -> (N, C)

        Texts beyond the model's context are truncated on the left. An encoder keeps the first token, at which it
        can read the score. ``report`` gets the number of texts that a forward pass scored.
        """
        longest = max((len(row) for row in rows), default=0)
        limit = context_length(self.model.config) or longest
        if longest > limit:
            warn_once(
                f"{self.name}: texts longer than the reward model's {limit} tokens are truncated at their beginning."
            )
        if is_encoder(self.model.config):
            rows = [[*row[:1], *row[1 - limit :]] if len(row) > limit else row for row in rows]
        rows = [row[-limit:] for row in rows]
        scores_NC = torch.zeros(len(rows), len(self.output_weights))
        with torch.inference_mode():
            batch_limit = self._batch_limit(rows)
            for batch in micro_batches([(0, len(row)) for row in rows], range(len(rows)), batch_limit):
                scores_NC[batch] = self._logits([rows[i] for i in batch], packed=batch_limit.packed).float().cpu()
                if report is not None:
                    report(len(batch))
        return scores_NC

    def _batch_limit(self, rows: Sequence[Sequence[int]]) -> MicroBatchLimit:
        limit = self.limit or MicroBatchLimit.default(self.model.device.type, packed=True).for_scoring
        lengths = list(map(len, rows)) or [0]
        if frequencies_change(self.model, max(lengths)):
            return replace(limit, rows=1, packed=False)
        return replace(limit, packed=limit.packed and min(lengths) > 0 and scores_packed_rows(self.model, max(lengths)))

    def _logits(self, rows: Sequence[Sequence[int]], *, packed: bool) -> Tensor:
        """Return the outputs of one forward pass, packed or padded on the right. -> (B, C)"""
        device = self.model.device
        if packed:
            logits: Tensor = self.model(packed_rows=rows).logits
            return logits
        ids_BL, mask_BL = pad(rows, int(self.tokenizer.pad_token_id))
        logits = self.model(input_ids=ids_BL.to(device), attention_mask=mask_BL.to(device)).logits
        return logits

    def fingerprint(self) -> list[float]:
        """Return the scores of the probe texts; several outputs of a text follow each other."""
        scores: list[float] = self.score_outputs([self.encode(*probe) for probe in PROBES]).flatten().tolist()
        return scores


def save_reward_model(reward: TrainedReward, card: RewardCard, folder: Path) -> None:
    """Save weights, tokenizer and, last, the card, which marks the folder as a complete reward model."""
    save_model(reward.model, reward.tokenizer, folder)
    write_json(folder / REWARD_CARD, asdict(card))


def check_reward_folder(name: str) -> RewardCard | None:
    """Return the card of a reward model without loading weights; None for a classifier of other origin.

    ``name`` is as in :func:`load_reward_model`. A model of the Hub is downloaded.

    Raises:
        ModelError: the model isn't found, or it isn't a sequence classifier.
        ConfigError: an option isn't valid, or one of several outputs must be chosen.
    """
    source = parse_model(name)
    folder = _folder_of(source)
    if (folder / REWARD_CARD).is_file() or (folder / RUN_FILE).is_file():
        card = read_card(folder)  # a run directory without a card holds a policy or an unfinished reward model
        output_weights(source, card.labels)
        return card
    check_classifier(folder, source)
    return None


def _folder_of(source: ModelSource) -> Path:
    if not Path(source.name).expanduser().is_dir() and not HUB_NAME.fullmatch(source.name):
        raise ModelError(f"{source.name}: reward model folder not found. {HOW_TO_TRAIN}")
    return local_folder(source.name)


def load_reward_model(name: str | os.PathLike[str]) -> TrainedReward:
    """Load a reward model and check that it scores the probe texts as its card, or its first use, says.

    Args:
        name: a folder or a name on the Hugging Face Hub, of a model that this package trained, or of any other sequence
            classifier. Options follow a question mark, as in ``ORG/NAME?output=1``: see ``config.reward_spec``.

    Raises:
        ModelError: a part of the score head is missing, or the probe texts score differently.
        ConfigError: an option isn't valid, or one of several outputs must be chosen.
    """
    name = os.fspath(name)
    source, card = parse_model(name), check_reward_folder(name)
    folder = _folder_of(source)
    tokenizer = load_tokenizer(str(folder))  # first, because it fails without reading weights
    if card is None:
        return _load_foreign(folder, tokenizer, source)
    if source.load_in_4bit:
        raise ConfigError(
            f"{source.name}: load_in_4bit isn't supported for a reward model with a card. Use dtype=bfloat16."
        )
    weights, count = output_weights(source, card.labels), len(card.labels)
    reward = load_trained(folder, tokenizer, card.form, count)
    reward.output_weights, reward.labels = weights, card.labels if count > 1 else ()
    _check_fingerprint(source.name, reward, card)
    reward.model.to(getattr(torch, source.dtype) if source.dtype else default_dtype(folder))
    reward.card = card.weighted(weights)
    return reward


def load_trained(
    folder: Path, tokenizer: PreTrainedTokenizerBase, form: TextForm, outputs: int | None = None
) -> TrainedReward:
    """Load a model that this package trained on texts of ``form``; ``outputs`` is the number of its scores, if it is known."""
    if form == "answer":
        return TrainedReward(load_reward_weights(folder, outputs=outputs), tokenizer)
    model, reading = load_classifier(folder, outputs=outputs)
    reward = TrainedReward(prepare_scoring(model, reading), tokenizer)
    reward.form, reward.reading = form, reading
    return reward


def _load_foreign(folder: Path, tokenizer: PreTrainedTokenizerBase, source: ModelSource) -> TrainedReward:
    parts = load_foreign(folder, tokenizer, source)
    reward = TrainedReward(parts.model, tokenizer)
    reward.form, reward.reading, reward.output_weights = parts.form, parts.reading, parts.output_weights
    reward.labels = parts.labels if len(parts.labels) > 1 else ()
    calibrate(source.name, folder, parts, lambda texts: reward.score_rows([reward.encode(*text) for text in texts]))
    return reward


def _check_fingerprint(name: str, reward: TrainedReward, card: RewardCard) -> None:
    tolerance = FINGERPRINT_TOLERANCE * max(1.0, card.score_std)
    actual = reward.fingerprint()
    differences = [abs(a - b) for a, b in zip(actual, card.fingerprint, strict=False)]
    if len(card.fingerprint) != len(PROBES) * len(card.labels) or max(differences) > tolerance:
        extent = f"by up to {max(differences):.3g}" if differences else "in number"
        raise ModelError(
            f"{name}: the reward model scores its probe texts differently than when it was saved ({extent}), because its "
            "weights, tokenizer or chat template changed or its score head was newly initialized. Restore the folder or "
            "train the reward model again."
        )


# --- preference pairs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairScores:
    """All outputs for both answers of pairs, and the lengths of the answers in tokens."""

    chosen_NC: Tensor
    rejected_NC: Tensor
    lengths: list[tuple[int, int]]


Split = tuple[list[int], list[int]]
"""Token ids of a prompt and of its answer."""
SplitPair = tuple[Split, Split]
"""Token ids of both answers of a pair with their prompt."""


def score_answers(
    reward: TrainedReward,
    pairs: Sequence[Preference],
    ids: Sequence[SplitPair] | None = None,
    report: Callable[[int], None] | None = None,
) -> PairScores:
    """Score both answers of every pair with all outputs, in the order of ``pairs``; ``ids`` are tokenized pairs.

    ``report`` is called as by :meth:`TrainedReward.score_outputs`.

    Raises:
        TrainingDiverged: a score isn't finite.
    """
    if ids is None:
        chosen = [reward.split(p.conversation, p.chosen, variables=p.chat_template_kwargs) for p in pairs]
        rejected = [reward.split(p.conversation, p.rejected, variables=p.chat_template_kwargs) for p in pairs]
    else:
        chosen, rejected = [pair[0] for pair in ids], [pair[1] for pair in ids]
    rows = [context + answer for context, answer in [*chosen, *rejected]]
    chosen_NC, rejected_NC = reward.score_outputs(rows, report).chunk(2)
    finite_N = (chosen_NC + rejected_NC).isfinite().all(-1)
    for pair, finite in zip(pairs, finite_N.tolist(), strict=True):
        if not finite:
            raise TrainingDiverged(f"The score of an answer in row {pair.row} isn't finite. Lower learning_rate.")
    lengths = [(len(one[1]), len(other[1])) for one, other in zip(chosen, rejected, strict=True)]
    return PairScores(chosen_NC, rejected_NC, lengths)


def score_pairs(reward: TrainedReward, pairs: Sequence[Preference]) -> list[ScoredPair]:
    """Score both answers of every pair, in the order of ``pairs``.

    Raises:
        TrainingDiverged: a score isn't finite.
    """
    if not pairs:
        return []
    scores = score_answers(reward, pairs)
    chosen, rejected = reward.weighted(scores.chosen_NC), reward.weighted(scores.rejected_NC)
    return [
        ScoredPair(
            row=pair.row,
            prompt=pair.prompt,
            chosen=pair.chosen,
            rejected=pair.rejected,
            chosen_score=chosen[i],
            rejected_score=rejected[i],
            chosen_length=scores.lengths[i][0],
            rejected_length=scores.lengths[i][1],
            messages=pair.messages,
        )
        for i, pair in enumerate(pairs)
    ]


def decided_pairs(
    pairs: Sequence[Preference], scores: PairScores, output: int, criterion: str = ""
) -> list[ScoredPair]:
    """Return the pairs with a preference by the criterion of ``output``; ``chosen`` is the answer that it prefers."""
    found = []
    for i, pair in enumerate(pairs):
        answers = (pair.chosen, pair.rejected)
        values = (float(scores.chosen_NC[i, output]), float(scores.rejected_NC[i, output]))
        lengths = scores.lengths[i]
        side = pair.by_output[output].side
        if side == -1:
            answers, values, lengths = answers[::-1], values[::-1], lengths[::-1]
        if side:
            found.append(ScoredPair(pair.row, pair.prompt, *answers, *values, *lengths, pair.messages, criterion))
    return found
