"""Train a reward model on preference pairs, from files or in memory, with TRL's RewardTrainer (see ``reward_loop``).

Added to TRL for files: pairs are split by prompt before training, training and scoring share one chat template, the score is
read at the last attended token, and held-out pairs are evaluated. A card with a fingerprint is saved with the weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from reinforcepp.config import RewardModelConfig
from reinforcepp.data import load_preferences
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_config, tokenizer_for, weights_hash
from reinforcepp.models.lora import base_model, has_adapter
from reinforcepp.models.padding import end_conversations_at_turn, separate_pad_token
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.reward_models import as_classifier, new_reward_model, prepare_scoring
from reinforcepp.models.tokenization import Answers, encode_examples
from reinforcepp.monitoring import reading_progress
from reinforcepp.rewards.trained import load_reward_model
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.checkpoint import FinishedRun
from reinforcepp.training.precision import with_precision
from reinforcepp.training.prompt_summary import print_prompt_format
from reinforcepp.training.reward_card import NO_WEIGHT, CardData, Counts, RewardResult, ScoredData, is_decided
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.setup import loading_reward_model, with_reward_adapter
from reinforcepp.training.supervised_setup import (
    CheckMemory,
    TokenizedRow,
    check_not_empty,
    join_ranks,
    length_limit,
    longest_row,
    open_run_dir,
    sample_rows,
    tokenize_rows,
)
from reinforcepp.types import Preference

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from reinforcepp.training.reward_loop import ResumableRewardTrainer, Rows


def train_reward_model(
    args: RewardModelConfig | None = None,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    train_dataset: Rows | None = None,
    eval_dataset: Rows | Mapping[str, Rows] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    callbacks: list[TrainerCallback] | None = None,
    peft_config: PeftConfig | None = None,
    *,
    check_memory: CheckMemory | None = None,
) -> RewardResult:
    """Train, evaluate and save a reward model.

    Args:
        args: settings.
        model: default: ``args.model``. Otherwise as in :class:`RewardTrainer`.
        train_dataset: pairs as in :class:`RewardTrainer`; default: the files ``args.data``, of which ``args.heldout_fraction``
            is held out.
        eval_dataset: held-out pairs, or several datasets by name; only with ``train_dataset``.
        processing_class: tokenizer; default: the model's.
        compute_metrics: returns further metrics of the held-out pairs from ``transformers.EvalPrediction``.
        callbacks: of transformers.
        peft_config: adapter to train instead of all weights.
        check_memory: called before the weights of a model are loaded that is given by name, with files.

    Returns:
        The model as a reward function, with ``model``, ``tokenizer``, ``card``, and ``metrics``, such as ``train_loss`` and
        ``eval_accuracy``. Its call with prompts and completions returns scores.

    Raises:
        ReinforceError: data, model or output directory can't be used; raised before weights are loaded.
    """
    config = args or RewardModelConfig()
    extra: dict[str, Any] = {"compute_metrics": compute_metrics, "callbacks": callbacks}
    with TemporaryDirectory() as scratch:
        if train_dataset is None:
            if eval_dataset is not None:
                raise ConfigError(
                    "eval_dataset: only supported with train_dataset; files are split by heldout_fraction."
                )
            trainer = _trainer_of_files(config, scratch, model, processing_class, peft_config, check_memory, extra)
            if trainer is None:
                return RewardResult.of(load_reward_model(config.output_dir))
        else:
            from reinforcepp.training.reward_loop import RewardTrainer  # loads TRL

            trainer = RewardTrainer(
                model or config.model,
                config,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **extra,
            )
        metrics = trainer.train().metrics
        if trainer.eval_dataset is not None:
            metrics |= trainer.evaluate()
        return trainer.result(metrics)


def _trainer_of_files(
    config: RewardModelConfig,
    scratch: str,
    model: str | os.PathLike[str] | PreTrainedModel | None,
    processing_class: PreTrainedTokenizerBase | None,
    peft_config: PeftConfig | None,
    check_memory: CheckMemory | None,
    extra: Mapping[str, Any],
) -> ResumableRewardTrainer | None:
    """Return the trainer for the files ``config.data``, or None if the run is finished."""
    loaded = None if model is None or isinstance(model, str | os.PathLike) else model
    if loaded is not None:
        config = replace(config, model=loaded.config.name_or_path or type(loaded).__name__)
    elif model is not None:
        config = replace(config, model=os.fspath(model))
    config = replace(config, use_peft=config.use_peft or peft_config is not None or has_adapter(loaded))
    if config.trust_remote_code:
        allow_remote_code(config.model, config.output_dir)
    join_ranks(config)
    opened = open_run_dir(config, loaded=loaded is not None)
    _, saved = opened
    with reading_progress(config.streaming) as on_progress:
        data, train, heldout = load_preferences(
            config.data,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            **config.column_names,
            criteria=config.parsed_criteria,
            criteria_margins=config.criteria_margins,
            max_bad_rows=config.max_bad_rows,
            streaming=config.streaming,
            on_progress=on_progress,
        )
    echo(data.summary())
    if isinstance(saved, FinishedRun):
        saved.close(config, {"data": data.sha256})
        return None
    model_config = load_config(config.model) if loaded is None else loaded.config
    tokenizer = with_chat_template(tokenizer_for(model_config, processing_class), config)
    end_conversations_at_turn(tokenizer)
    limit = length_limit(config, model_config)
    began = saved.state["settings"] if saved else None
    config, precision = with_precision(with_learning_rate(config, model_config, began), model_config, began)

    ids_of = partial(pair_ids, tokenizer)
    train, rows = tokenize_rows(train, ids_of, limit, "training pairs", scratch)
    decided = [pair for pair in sample_rows(heldout) if is_decided(pair)]
    heldout, heldout_rows = tokenize_rows(decided, ids_of, limit, "held-out pairs", scratch)
    check_not_empty(train, "pair", data.source, limit)
    print_prompt_format(tokenizer, train, rows[0]["chosen_ids"])
    criteria = [criterion.name for criterion in config.parsed_criteria]
    counts = _count_judgments(rows, criteria, data.source)
    if check_memory is not None:
        check_memory(config, longest_row(rows))

    if loaded is None:
        built = new_reward_model(config.model, config.seed, criteria, **loading_reward_model(config))
    else:
        built = as_classifier(loaded, config.seed, criteria)
        prepare_scoring(base_model(built))
    separate_pad_token(built, tokenizer, resize=not config.use_peft)
    inputs = {"model": weights_hash(built), "data": data.sha256}
    built = with_reward_adapter(built, config, peft_config)
    from reinforcepp.training import reward_loop  # loads TRL

    trainer = reward_loop.ResumableRewardTrainer(
        model=built,
        tokenizer=tokenizer,
        config=config,
        train_dataset=rows,
        eval_dataset=heldout_rows if heldout else None,
        **extra,
    )
    trainer.opened, trainer.inputs, trainer.precision = opened, inputs, precision
    trainer.card_data = CardData(
        source=data.source,
        sha256=data.sha256,
        train_pairs=len(train),
        heldout_pairs=len(heldout),
        counts=counts,
        train=lambda: ScoredData([pair for pair in sample_rows(train) if is_decided(pair)]),
        heldout=lambda: ScoredData(heldout),
    )
    return trainer


def pair_ids(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference]) -> list[TokenizedRow]:
    """Return token ids, judgments, margins and weights of pairs, in the columns of the trainer; a missing judgment is nan."""
    rows = [Answers(pair.conversation, (pair.chosen, pair.rejected), pair.chat_template_kwargs) for pair in pairs]
    encoded = encode_examples(tokenizer, rows)
    return [
        {
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "side": [math.nan if each.side is None else float(each.side) for each in pair.by_output],
            "margin": [float(each.margin) for each in pair.by_output],
            "weight": [float(pair.loss_weight)],
        }
        for pair, (chosen, rejected) in zip(pairs, encoded, strict=True)
    ]


def _count_judgments(rows: Dataset, criteria: Sequence[str], source: str) -> list[Counts]:
    """Return the counts of each output, and print them.

    Raises:
        DataError: no row has a judgment by one of the criteria, or a weight above 0.
    """
    sides_NC, margins_NC, weights_N1 = (
        rows.data.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)
        for name in ("side", "margin", "weight")
    )
    if not weights_N1.any():
        raise DataError(NO_WEIGHT.format(source))
    if (weights_N1 != 1).any():
        low, high, mean = weights_N1.min(), weights_N1.max(), weights_N1.mean()
        echo(f"The weights of the training pairs are {low:g} to {high:g}, on average {mean:g}.")
    found = []
    for sides_N, margins_N in zip(sides_NC.T, margins_NC.T, strict=True):
        decided_N = np.nan_to_num(sides_N) != 0
        graded = int((decided_N & (margins_N != 0)).sum())
        found.append(Counts(int(decided_N.sum()), int((sides_N == 0).sum()), graded))
    if not criteria and (found[0].margins or found[0].ties):
        echo(
            f"{found[0].margins} of {len(rows)} training pairs have a margin, and {found[0].ties} are ties.",
        )
    for name, counts, sides_N in zip(criteria, found, sides_NC.T, strict=False):
        if not counts.decided + counts.ties:
            raise DataError(
                f"{source}: none of the {len(rows)} training pairs has a judgment by the criterion {name}. Fill in its "
                "column, or omit the criterion."
            )
        swapped, missing = int((sides_N == -1).sum()), int(np.isnan(sides_N).sum())
        margins = f", {counts.margins:,} with a margin" if counts.margins else ""
        echo(
            f"Criterion {name}: {counts.decided:,} training pairs{margins}, of which {swapped:,} prefer the rejected "
            f"response; {counts.ties:,} ties; {missing:,} without a judgment"
        )
    return found
