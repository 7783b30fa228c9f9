"""Train a reward model on preference pairs with TRL's RewardTrainer (see ``supervised_loop``).

Added to TRL: pairs are split by prompt before training, training and scoring share one chat template, the score is read
at the last attended token, held-out pairs are evaluated, and a card with a fingerprint is saved with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.data import PreferenceData, load_preferences
from reinforcepp.errors import DataError
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_config, load_tokenizer, weights_hash
from reinforcepp.models.lora import with_adapter
from reinforcepp.models.padding import end_conversations_at_turn, separate_pad_token
from reinforcepp.models.reward_models import head_modules, load_reward_weights, new_reward_model
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenization import Answers, encode_examples
from reinforcepp.monitoring import echo, reading_progress
from reinforcepp.reports.reward_model import (
    analyze_by_criterion,
    print_criteria,
    print_summary,
    save_pairs,
    summary,
    write_page,
)
from reinforcepp.rewards.card import CriterionCard, RewardCard, read_card
from reinforcepp.rewards.trained import TrainedReward, decided_pairs, save_reward_model, score_answers
from reinforcepp.training.checkpoint import FinishedRun, finish
from reinforcepp.training.prompt_summary import print_prompt_format
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.setup import loading
from reinforcepp.training.supervised_setup import (
    CheckMemory,
    TokenizedRow,
    begin,
    check_not_empty,
    check_run,
    count_steps,
    join_ranks,
    length_limit,
    longest_row,
    open_run_dir,
    sample_rows,
    tokenize_rows,
)
from reinforcepp.types import Preference, ScoredPair

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "report.html"


def train_reward_model(config: RewardModelConfig, check_memory: CheckMemory | None = None) -> RewardCard:
    """Train, evaluate and save a reward model; return its card. Rank 0 evaluates and saves.

    Raises:
        ReinforceError: the data, the model or the output directory can't be used; raised before weights are loaded.
    """
    with TemporaryDirectory() as scratch:
        return _train_reward_model(config, scratch, check_memory)


def _train_reward_model(config: RewardModelConfig, scratch: str, check_memory: CheckMemory | None) -> RewardCard:
    join_ranks(config)
    folder, saved = open_run_dir(config)
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
        return read_card(folder)
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    end_conversations_at_turn(tokenizer)
    limit = length_limit(config)
    config = with_learning_rate(config, load_config(config.model), saved.state["settings"] if saved else None)

    ids_of = partial(pair_ids, tokenizer)
    train, rows = tokenize_rows(train, ids_of, limit, "training pairs", scratch)
    decided = [pair for pair in sample_rows(heldout) if _is_decided(pair)]
    heldout, _ = tokenize_rows(decided, ids_of, limit, "held-out pairs", scratch)
    check_not_empty(train, "pair", data.source, limit)
    print_prompt_format(tokenizer, train, rows[0]["chosen_ids"])
    criteria = [criterion.name for criterion in config.parsed_criteria]
    counts = _count_judgments(rows, criteria, data.source)
    if check_memory is not None:
        check_memory(config, longest_row(rows))

    model = new_reward_model(config.model, config.seed, criteria, **loading(config))
    separate_pad_token(model, tokenizer, resize=not config.use_peft)
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if config.use_peft:
        model = with_adapter(model, config, seed=config.seed, heads=head_modules(model))
    facts = {"train_pairs": len(train), "heldout_pairs": len(heldout), "inputs": inputs}

    def evaluate_and_save() -> RewardCard:
        card = _evaluate_and_save(model.eval(), tokenizer, config, folder, data, train, heldout, counts)
        finish(folder, config, inputs, count_steps(rows, config))
        return card

    with begin(folder, config, inputs, saved, facts) as run:
        from reinforcepp.distributed.rank_zero import RankZero
        from reinforcepp.training.supervised_loop import ResumableRewardTrainer, fit  # loads TRL

        check_run(run, model, tokenizer, config, rows)
        fit(ResumableRewardTrainer, model, tokenizer, rows, config, run)
        return RankZero(run.ranks, config.watchdog_seconds).run(evaluate_and_save)


def pair_ids(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference]) -> list[TokenizedRow]:
    """Return token ids, judgments and margins of pairs, in the columns of the trainer; a missing judgment is nan."""
    rows = [Answers(pair.conversation, (pair.chosen, pair.rejected), pair.chat_template_kwargs) for pair in pairs]
    encoded = encode_examples(tokenizer, rows)
    return [
        {
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "side": [math.nan if each.side is None else float(each.side) for each in pair.by_output],
            "margin": [float(each.margin) for each in pair.by_output],
        }
        for pair, (chosen, rejected) in zip(pairs, encoded, strict=True)
    ]


@dataclass(frozen=True)
class Counts:
    """Training pairs that an output learns from: with a preference, ties among the others, and pairs with a margin."""

    decided: int
    ties: int
    margins: int


def _count_judgments(rows: Dataset, criteria: Sequence[str], source: str) -> list[Counts]:
    """Return the counts of each output, and print them.

    Raises:
        DataError: no row has a judgment by one of the criteria.
    """
    outputs = max(1, len(criteria))
    sides_NC, margins_NC = (
        rows.data.column(name).combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, outputs)
        for name in ("side", "margin")
    )
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


def _evaluate_and_save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardModelConfig,
    folder: Path,
    data: PreferenceData,
    train: Sequence[Preference],
    heldout: Sequence[Preference],
    counts: Sequence[Counts],
) -> RewardCard:
    """Evaluate the model on training and held-out pairs; save weights, card and report."""
    evaluated, criteria = model, [criterion.name for criterion in config.parsed_criteria]
    if config.load_in_4bit:  # inference merges the adapter into unquantized weights, so evaluate that model
        save_model(model, tokenizer, folder)
        evaluated = load_reward_weights(folder, outputs=None)
    scorer = TrainedReward(evaluated, tokenizer, batch_size=config.batch_size * 2)
    scorer.output_weights = (1 / len(counts),) * len(counts)
    on_train = scored_by_output(scorer, [pair for pair in sample_rows(train) if _is_decided(pair)], criteria)
    on_heldout = scored_by_output(scorer, heldout, criteria)
    pairs = [pair for output in on_heldout.pairs for pair in output]
    card = RewardCard(
        base_model=config.model,
        data=data.source,
        data_sha256=data.sha256,
        train_pairs=len(train),
        heldout_pairs=len(heldout),
        figures=_figures(on_heldout.pairs[0]) if not criteria else {},
        score_mean=on_train.mean,
        score_std=on_train.std,
        settings=as_dict(config),
        fingerprint=scorer.fingerprint(),
        train_accuracy=_accuracy(on_train.pairs[0]) if not criteria else None,
        train_margins=0 if criteria else counts[0].margins,
        train_ties=0 if criteria else counts[0].ties,
        criteria=tuple(
            CriterionCard(
                name=name,
                train_pairs=count.decided,
                train_ties=count.ties,
                train_margins=count.margins,
                heldout_pairs=len(held),
                heldout_ties=sum(pair.by_output[index].side == 0 for pair in heldout),
                figures=_figures(held),
                train_accuracy=_accuracy(trained),
            )
            for index, (name, count, held, trained) in enumerate(
                zip(criteria, counts, on_heldout.pairs, on_train.pairs, strict=True)
            )
        )
        if criteria
        else (),
        score_means=on_train.means if criteria else [],
        score_covariance=on_train.covariance if criteria else [],
        correlations=on_heldout.correlations if criteria else [],
    )
    if pairs:
        save_pairs(pairs, folder)  # before the card, which marks the folder as complete
    save_reward_model(TrainedReward(model, tokenizer), card, folder)
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


def _is_decided(pair: Preference) -> bool:
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


def scored_by_output(scorer: TrainedReward, pairs: Sequence[Preference], criteria: Sequence[str]) -> ScoredOutputs:
    """Score pairs with all outputs."""
    outputs = max(1, len(criteria))
    if not pairs:
        return ScoredOutputs([[] for _ in range(outputs)], 0.0, 0.0, [], [], [])
    scores = score_answers(scorer, pairs)
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
