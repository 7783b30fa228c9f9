"""Evaluate a trained reward model, and save it with its card and report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.models.lora import base_model, has_adapter, is_quantized
from reinforcepp.models.reward_texts import TextForm
from reinforcepp.models.saving import save_model
from reinforcepp.monitoring import Progress
from reinforcepp.reports.reward_model import (
    analyze_by_criterion,
    print_criteria,
    print_summary,
    save_pairs,
    summary,
    write_page,
)
from reinforcepp.rewards.card import CriterionCard, RewardCard
from reinforcepp.rewards.trained import (
    SplitPair,
    TrainedReward,
    decided_pairs,
    load_trained,
    save_reward_model,
    score_answers,
)
from reinforcepp.runtime.terminal import echo
from reinforcepp.types import Conversation, Preference, ScoredPair

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "report.html"
NO_WEIGHT = "{}: no pair has a weight above 0. Raise some of the weights."


@dataclass(frozen=True)
class Counts:
    """Training pairs that an output learns from: with a preference, ties among the others, and pairs with a margin."""

    decided: int
    ties: int
    margins: int


@dataclass(frozen=True)
class ScoredData:
    """Pairs whose scores the card describes, and their token ids if they are known."""

    pairs: Sequence[Preference]
    ids: Sequence[SplitPair] | None = None


@dataclass(frozen=True)
class CardData:
    """Data of a training, for its card.

    Attributes:
        source: name of the data.
        sha256: hash of the data.
        train_pairs: number of training pairs.
        heldout_pairs: number of pairs that the model wasn't trained on.
        counts: of each output.
        train: returns training pairs, or a sample of them.
        heldout: returns held-out pairs, or a sample of them.
    """

    source: str
    sha256: str
    train_pairs: int
    heldout_pairs: int
    counts: Sequence[Counts]
    train: Callable[[], ScoredData]
    heldout: Callable[[], ScoredData]


class RewardResult(TrainedReward):
    """A trained reward model; calling it with prompts and completions returns scores.

    Attributes of its card, such as ``figures``, are also attributes of the result.

    Attributes:
        card: origin and evaluation metrics of the model.
        metrics: of the training and the held-out pairs, by their names in TRL, such as ``train_loss`` and ``eval_accuracy``.
    """

    card: RewardCard
    metrics: dict[str, float]

    @classmethod
    def of(cls, reward: TrainedReward, metrics: dict[str, float] | None = None) -> RewardResult:
        """Return the result of a training that has made ``reward``."""
        result = cls(reward.model, reward.tokenizer)
        vars(result).update(vars(reward))
        result.metrics = metrics or {}
        return result

    def score(self, prompts: Sequence[Conversation], completions: Sequence[str]) -> list[float]:
        """Return one score per completion. A prompt is a text or a list of messages."""
        return self(prompts, list(completions))

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the card."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.card, name)


def evaluate_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardModelConfig,
    folder: Path,
    data: CardData,
    form: TextForm = "answer",
) -> RewardCard:
    """Evaluate the model on training and held-out pairs; save weights, card and report."""
    criteria = [criterion.name for criterion in config.parsed_criteria]
    scorer = TrainedReward(model, tokenizer)
    scorer.form = form
    if is_quantized(model) or model.dtype != torch.float32:  # evaluate the model as it is loaded, in float32
        save_model(savable(model), tokenizer, folder)
        scorer = load_trained(folder, tokenizer, form)
    scorer.output_weights = (1 / len(data.counts),) * len(data.counts)
    heldout = data.heldout()
    on_train = scored_by_output(scorer, data.train(), criteria, "training")
    on_heldout = scored_by_output(scorer, heldout, criteria, "held-out")
    pairs = [pair for output in on_heldout.pairs for pair in output]
    card = RewardCard(
        base_model=config.model,
        data=data.source,
        data_sha256=data.sha256,
        train_pairs=data.train_pairs,
        heldout_pairs=data.heldout_pairs,
        figures=_figures(on_heldout.pairs[0]) if not criteria else {},
        score_mean=on_train.mean,
        score_std=on_train.std,
        settings=as_dict(config),
        fingerprint=scorer.fingerprint(),
        train_accuracy=_accuracy(on_train.pairs[0]) if not criteria else None,
        train_margins=0 if criteria else data.counts[0].margins,
        train_ties=0 if criteria else data.counts[0].ties,
        criteria=tuple(
            CriterionCard(
                name=name,
                train_pairs=count.decided,
                train_ties=count.ties,
                train_margins=count.margins,
                heldout_pairs=len(held),
                heldout_ties=sum(pair.by_output[index].side == 0 for pair in heldout.pairs),
                figures=_figures(held),
                train_accuracy=_accuracy(trained),
            )
            for index, (name, count, held, trained) in enumerate(
                zip(criteria, data.counts, on_heldout.pairs, on_train.pairs, strict=True)
            )
        )
        if criteria
        else (),
        score_means=on_train.means if criteria else [],
        score_covariance=on_train.covariance if criteria else [],
        correlations=on_heldout.correlations if criteria else [],
        form=form,
    )
    if pairs:
        save_pairs(pairs, folder)  # before the card, which marks the folder as complete
    save_reward_model(TrainedReward(savable(model), tokenizer), card, folder)
    analyses = analyze_by_criterion(pairs)
    if criteria:
        print_criteria(card, analyses)
    else:
        print_summary(card, analyses.get(""))
    if pairs:
        write_page(card, pairs, analyses, folder / REPORT_FILE)
    report = f", report to {folder / REPORT_FILE}" if pairs else ""
    echo(f"Saved reward model to {folder}{report}", "green")
    return card


def savable(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model to save: an adapter is merged if its base model exists only in memory."""
    if not has_adapter(model) or base_model(model).config.name_or_path:
        return model
    echo("The base model of the adapter exists only in memory, so the merged model is saved.")
    merged: PreTrainedModel = copy.deepcopy(model).merge_and_unload()
    return merged


def is_decided(pair: Preference) -> bool:
    """Return whether the pair has a right order by any output."""
    return any(judgment.side for judgment in pair.by_output)


def _figures(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    return asdict(summary(pairs)) if pairs else {}


def _accuracy(pairs: Sequence[ScoredPair]) -> float | None:
    return summary(pairs).accuracy if pairs else None


@dataclass(frozen=True)
class ScoredOutputs:
    """The decided pairs of each output, and statistics of the scores of all responses.

    ``mean`` and ``std`` are those of the mean over the outputs, ``means`` and ``covariance`` those of the single outputs.
    """

    pairs: list[list[ScoredPair]]
    mean: float
    std: float
    means: list[float]
    covariance: list[list[float]]
    correlations: list[list[float]]


def scored_by_output(scorer: TrainedReward, data: ScoredData, criteria: Sequence[str], which: str) -> ScoredOutputs:
    """Score ``which`` pairs with all outputs, and show the progress."""
    pairs, outputs = data.pairs, max(1, len(criteria))
    if not pairs:
        return ScoredOutputs([[] for _ in range(outputs)], 0.0, 0.0, [], [], [])
    with Progress(f"scoring {which} responses", 2 * len(pairs)) as progress:
        scores = score_answers(scorer, pairs, data.ids, lambda scored: progress.step(units=scored))
    values_NC = np.concatenate([scores.chosen_NC.numpy(), scores.rejected_NC.numpy()]).astype(np.float64)
    covariance_CC = np.cov(values_NC, rowvar=False, ddof=0).reshape(outputs, outputs)
    deviation_C = np.sqrt(np.diag(covariance_CC))
    scale_CC = np.maximum(np.outer(deviation_C, deviation_C), np.finfo(np.float64).tiny)
    mean_N = values_NC.mean(axis=1)
    return ScoredOutputs(
        [decided_pairs(pairs, scores, index, (*criteria, "")[index]) for index in range(outputs)],
        float(mean_N.mean()),
        float(mean_N.std()),
        values_NC.mean(axis=0).tolist(),
        covariance_CC.tolist(),
        (covariance_CC / scale_CC).tolist(),
    )
