"""Train a reward model on preference pairs with TRL's RewardTrainer (see ``supervised_loop``).

Added to TRL: pairs are split by prompt before training, training and scoring share one chat template, the score is read
at the last attended token, held-out pairs are evaluated, and a card with a fingerprint is saved with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.data import PreferenceData, load_preferences
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_config, load_tokenizer, weights_hash
from reinforcepp.models.lora import with_adapter
from reinforcepp.models.padding import end_conversations_at_turn, separate_pad_token
from reinforcepp.models.reward_models import head_modules, load_reward_weights, new_reward_model
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenization import Answers, encode_examples
from reinforcepp.monitoring import echo, reading_progress
from reinforcepp.reports.reward_model import analyze, print_summary, save_pairs, summary, write_page
from reinforcepp.rewards.card import RewardCard, read_card
from reinforcepp.rewards.trained import TrainedReward, save_reward_model, score_pairs
from reinforcepp.training.checkpoint import FinishedRun, finish
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.setup import loading
from reinforcepp.training.supervised_setup import (
    begin,
    check_not_empty,
    check_run,
    count_steps,
    join_ranks,
    length_limit,
    open_run_dir,
    sample_rows,
    tokenize_rows,
)
from reinforcepp.types import Preference

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "report.html"


def train_reward_model(config: RewardModelConfig) -> RewardCard:
    """Train, evaluate and save a reward model; return its card. Rank 0 evaluates and saves.

    Raises:
        ReinforceError: the data, the model or the output directory can't be used; raised before weights are loaded.
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
            max_bad_rows=config.max_bad_rows,
            streaming=config.streaming,
            on_progress=on_progress,
        )
    echo(data.summary())
    if isinstance(saved, FinishedRun):
        saved.close(config, {"data": data.sha256})
        return read_card(folder)
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    end_conversations_at_turn(tokenizer)
    limit = length_limit(config)
    config = with_learning_rate(config, load_config(config.model), saved.state["settings"] if saved else None)

    ids_of = partial(pair_ids, tokenizer)
    train, rows = tokenize_rows(train, ids_of, limit, "training pairs", scratch)
    decided = [pair for pair in sample_rows(heldout) if not pair.tie]  # a tie has no right order
    heldout, _ = tokenize_rows(decided, ids_of, limit, "held-out pairs", scratch)
    check_not_empty(train, "pair", data.source, limit)
    grades = _count_grades(rows)

    model = new_reward_model(config.model, config.seed, **loading(config))
    separate_pad_token(model, tokenizer, resize=not config.use_peft)
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if config.use_peft:
        model = with_adapter(model, config, seed=config.seed, heads=head_modules(model))
    facts = {"train_pairs": len(train), "heldout_pairs": len(heldout), "inputs": inputs}

    def evaluate_and_save() -> RewardCard:
        card = _evaluate_and_save(model.eval(), tokenizer, config, folder, data, train, heldout, grades)
        finish(folder, config, inputs, count_steps(rows, config))
        return card

    with begin(folder, config, inputs, saved, facts) as run:
        from reinforcepp.distributed.rank_zero import RankZero
        from reinforcepp.training.supervised_loop import ResumableRewardTrainer, fit  # loads TRL

        check_run(run, model, tokenizer, config, rows)
        fit(ResumableRewardTrainer, model, tokenizer, rows, config, run)
        return RankZero(run.ranks, config.watchdog_seconds).run(evaluate_and_save)


def pair_ids(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference]) -> list[dict[str, list[int] | float]]:
    """Return the token ids and margins of pairs in the columns that TRL trains on; the margin of a tie is nan."""
    rows = [Answers(pair.conversation, (pair.chosen, pair.rejected), pair.chat_template_kwargs) for pair in pairs]
    encoded = encode_examples(tokenizer, rows)
    return [
        {"chosen_ids": chosen, "rejected_ids": rejected, "margin": math.nan if pair.tie else pair.margin}
        for pair, (chosen, rejected) in zip(pairs, encoded, strict=True)
    ]


def _count_grades(rows: Dataset) -> tuple[int, int]:
    """Return the numbers of pairs with a margin and of ties, and print them if there are any."""
    margins = rows.data.column("margin").to_numpy() if len(rows) else np.zeros(0)
    ties = int(np.isnan(margins).sum())
    graded = int(np.count_nonzero(margins)) - ties  # nan isn't zero
    if graded or ties:
        echo(f"{graded} of {len(rows)} training pairs have a margin, and {ties} are ties.")
    return graded, ties


def _evaluate_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardModelConfig,
    folder: Path,
    data: PreferenceData,
    train: Sequence[Preference],
    heldout: Sequence[Preference],
    grades: tuple[int, int],
) -> RewardCard:
    """Evaluate the model on training and held-out pairs; save weights, card and report."""
    evaluated = model
    if config.load_in_4bit:  # inference merges the adapter into unquantized weights, so evaluate that model
        save_model(model, tokenizer, folder)
        evaluated = load_reward_weights(folder)
    scorer = TrainedReward(evaluated, tokenizer, batch_size=config.batch_size * 2)
    on_train = summary(score_pairs(scorer, [pair for pair in sample_rows(train) if not pair.tie]))
    pairs = score_pairs(scorer, heldout)
    analysis = analyze(pairs) if pairs else None
    card = RewardCard(
        base_model=config.model,
        data=data.source,
        data_sha256=data.sha256,
        train_pairs=len(train),
        heldout_pairs=len(heldout),
        figures=asdict(analysis.metrics) if analysis else {},
        score_mean=on_train.mean_score,
        score_std=on_train.score_std,
        settings=as_dict(config),
        fingerprint=scorer.fingerprint(),
        train_accuracy=on_train.accuracy,
        train_margins=grades[0],
        train_ties=grades[1],
    )
    if pairs:
        save_pairs(pairs, folder)  # before the card, which marks the folder as complete
    save_reward_model(TrainedReward(model, tokenizer), card, folder)
    print_summary(card, analysis)
    if analysis:
        write_page(card, pairs, analysis, folder / REPORT_FILE)
    report = f", report to {folder / REPORT_FILE}" if analysis else ""
    echo(f"Saved reward model to {folder}{report}", "green")
    return card
