"""Train a reward model from preference pairs with TRL's RewardTrainer (see ``resumable``).

Ours around it: the split by prompt before training, one framing for training and scoring, the score read where the
attention mask ends, held-out figures, and a card with a fingerprint beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.data import PreferenceData, load_preferences
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_tokenizer, save_model, weights_hash
from reinforcepp.models.lora import with_adapter
from reinforcepp.models.reward_models import load_reward_weights, new_reward_model
from reinforcepp.models.tokenization import encode_example
from reinforcepp.monitoring import echo, reading_progress
from reinforcepp.reports.reward_model import analyse, save_pairs, summary, tell, write_page
from reinforcepp.rewards.card import RewardCard
from reinforcepp.rewards.measure import score_pairs
from reinforcepp.rewards.trained import TrainedReward, save_reward_model
from reinforcepp.training.setup import loading
from reinforcepp.training.supervised_loop import (
    begin,
    check_not_empty,
    join_ranks,
    length_limit,
    longest,
    open_run_dir,
    sample_rows,
    skip_long,
    tokenize_rows,
)
from reinforcepp.types import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "report.html"


def train_reward_model(config: RewardModelConfig) -> RewardCard:
    """Train, measure and save a reward model as ``config`` says; returns its card. Of several processes the first one measures
    and saves.

    Raises:
        ReinforceError: for anything wrong with data, model or folder, before any weight is loaded.
    """
    with TemporaryDirectory() as scratch:
        return _train_reward_model(config, scratch)


def _train_reward_model(config: RewardModelConfig, scratch: str) -> RewardCard:
    join_ranks(config)
    folder, saved = open_run_dir(config)
    with reading_progress(config.streaming) as on_progress:
        data, train, heldout = load_preferences(
            config.data,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            **config.column_names,
            streaming=config.streaming,
            on_progress=on_progress,
        )
    echo(data.summary())
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    limit = length_limit(config)

    def ids_of(pair: Preference) -> dict[str, list[int]]:
        answers = {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
        return {name: encode_example(tokenizer, pair.prompt, answer) for name, answer in answers.items()}

    train, rows = tokenize_rows(train, ids_of, limit, "training pairs", scratch)
    heldout = skip_long(sample_rows(heldout), lambda pair: longest(ids_of(pair)), limit, "held-out pairs")
    check_not_empty(train, "pair", data.source, limit)

    model = new_reward_model(config.model, config.seed, **loading(config))
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if config.use_peft:
        model = with_adapter(model, config, seed=config.seed, head=model.score)
    facts = {"train_pairs": len(train), "heldout_pairs": len(heldout)}
    begun = begin(folder, config, inputs, saved, facts)
    from reinforcepp.distributed.rank_zero import RankZero
    from reinforcepp.training.resumable import ResumableRewardTrainer, fit  # which loads TRL

    fit(ResumableRewardTrainer, model, tokenizer, rows, config, begun)
    return RankZero(begun.ranks, config.watchdog_seconds).run(
        lambda: _measure_and_save(model.eval(), tokenizer, config, folder, data, train, heldout)
    )


def _measure_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardModelConfig,
    folder: Path,
    data: PreferenceData,
    train: Sequence[Preference],
    heldout: Sequence[Preference],
) -> RewardCard:
    """What the model is worth, on the pairs that it learnt and on others, written beside it."""
    used = model
    if config.load_in_4bit:  # whoever uses it adds the adapter to weights in full
        save_model(model, tokenizer, folder)
        used = load_reward_weights(folder)
    scorer = TrainedReward(used, tokenizer, batch_size=config.batch_size * 2)
    on_train = summary(score_pairs(scorer, sample_rows(train)))
    pairs = score_pairs(scorer, heldout)
    analysis = analyse(pairs) if pairs else None
    card = RewardCard(
        base_model=config.model,
        data=data.source,
        data_sha256=data.sha256,
        train_pairs=len(train),
        heldout_pairs=len(heldout),
        figures=asdict(analysis.figures) if analysis else {},
        score_mean=on_train.mean_score,
        score_std=on_train.score_std,
        settings=as_dict(config),
        fingerprint=scorer.fingerprint(),
        train_accuracy=on_train.accuracy,
    )
    if pairs:
        save_pairs(pairs, folder)  # before the card, which tells that all is there
    save_reward_model(TrainedReward(model, tokenizer), card, folder)
    tell(card, analysis)
    if analysis:
        write_page(card, pairs, analysis, folder / REPORT_FILE)
    echo(
        f"Saved the reward model to {folder}" + (f", its report to {folder / REPORT_FILE}" if analysis else ""), "green"
    )
    return card
