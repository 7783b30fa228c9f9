"""Fine-tune a language model on answers or plain text with TRL's SFTTrainer, as a warm-up before RL (see ``resumable``).

Ours around it: prompts and answers are framed and tokenised as the reward model and the policy see them, the loss is on
the answer and its EOS alone, and held-out rows are measured before and after by the log-probabilities that RL works with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from reinforcepp.config import SftConfig
from reinforcepp.data import SftRow, load_texts
from reinforcepp.files import write_json
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_policy, load_tokenizer, save_model, weights_hash
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.lora import is_4bit, with_adapter
from reinforcepp.models.tokenization import encode, encode_example, eos_token_id, format_prompt
from reinforcepp.monitoring import echo
from reinforcepp.monitoring.run_record import EVALUATION
from reinforcepp.training.setup import loading
from reinforcepp.training.supervised_loop import (
    RunContext,
    begin,
    check_not_empty,
    join_ranks,
    length_limit,
    open_run_dir,
    skip_long,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""The label of a token on which there is no loss."""
MAX_EXPONENT_LOSS = 700.0
"""Whose exponential is still a number."""


class SftExample(NamedTuple):
    """Tokens that are given, and those that are learnt after them."""

    given: list[int]
    learnt: list[int]
    row: int | str = 0

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.given) + len(self.learnt)


@dataclass(frozen=True)
class HeldOutMetrics:
    """The mean loss of held-out tokens in nats, its exponential, and how many tokens of how many rows it is of."""

    loss: float
    perplexity: float
    tokens: int
    rows: int


def train_language_model(config: SftConfig) -> dict[str, HeldOutMetrics | None]:
    """Fine-tune, measure and save a language model as ``config`` says; returns the figures ``before`` and ``after``,
    None if no row is held out. Of several processes the first one measures and saves.

    Raises:
        ReinforceError: for anything wrong with data, model or folder, before any weight is loaded.
    """
    join_ranks(config)
    folder, saved = open_run_dir(config)
    data, train, heldout = load_texts(
        config.data, heldout_fraction=config.heldout_fraction, seed=config.seed, **config.column_names
    )
    echo(data.summary())
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    limit = length_limit(config)
    lessons, unseen = (
        skip_long([to_example(tokenizer, row) for row in rows], lambda one: one.length, limit, what)
        for rows, what in ((train, "training rows"), (heldout, "held-out rows"))
    )
    check_not_empty(lessons, "row", data.source, limit)

    model = load_policy(config.model, **loading(config))
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if config.use_peft:
        model = with_adapter(model, config, seed=config.seed)
    else:
        model.requires_grad_(True)  # an adapter that was merged leaves them off
    facts = {"kind": type(config).__name__, "rows": len(lessons), "heldout_rows": len(unseen), "inputs": inputs}
    begun = begin(folder, config, inputs, saved, facts)
    from reinforcepp.distributed.rank_zero import RankZero  # which loads Accelerate

    first = RankZero(begun.ranks, config.watchdog_seconds)
    before = first.run(lambda: _figures(model, unseen, tokenizer, config))
    _fit(model, tokenizer, lessons, config, begun)

    def measure_and_save() -> dict[str, HeldOutMetrics | None]:
        figures = {"before": before, "after": _figures(model.eval(), unseen, tokenizer, config)}
        save_model(model, tokenizer, folder)
        write_json(folder / EVALUATION, {when: asdict(of) for when, of in figures.items() if of is not None})
        _tell(figures["before"], figures["after"])
        echo(f"Saved the model to {folder}", "green")
        return figures

    return first.run(measure_and_save)


def to_example(tokenizer: PreTrainedTokenizerBase, row: SftRow) -> SftExample:
    """What is learnt of ``row``: an answer and its EOS after the framed prompt, or all of a text, and that it ends."""
    if row.question is None:
        ids = list(tokenizer(row.completion)["input_ids"])  # as the tokenizer begins texts, which frames do themselves
        if ids[-1] != eos_token_id(tokenizer):
            ids.append(eos_token_id(tokenizer))
        return SftExample(ids[:1], ids[1:], row.row)
    given = encode(tokenizer, format_prompt(tokenizer, row.question))
    return SftExample(given, encode_example(tokenizer, row.question, row.completion)[len(given) :], row.row)


@torch.no_grad()
def evaluate_heldout(
    model: PreTrainedModel, lessons: Sequence[SftExample], *, pad_id: int, at_a_time: int
) -> HeldOutMetrics:
    """How well ``model``, in evaluation mode, foretells what is learnt of ``lessons``, by RL's own log-probabilities."""
    total, tokens = 0.0, 0
    for start in range(0, len(lessons), at_a_time):
        rows = lessons[start : start + at_a_time]
        given, learnt = [row.given for row in rows], [row.learnt for row in rows]
        logprobs_BT, _, mask_BT = response_logprobs(model, given, learnt, pad_id=pad_id)
        total -= float(logprobs_BT.double().sum())
        tokens += int(mask_BT.sum())
    loss = total / tokens
    return HeldOutMetrics(loss, math.exp(min(loss, MAX_EXPONENT_LOSS)), tokens, len(lessons))


def _figures(
    model: PreTrainedModel, lessons: Sequence[SftExample], tokenizer: PreTrainedTokenizerBase, config: SftConfig
) -> HeldOutMetrics | None:
    if not lessons:
        return None
    if torch.accelerator.is_available() and not is_4bit(model):  # which is there already
        model.to(torch.accelerator.current_accelerator())
    return evaluate_heldout(model, lessons, pad_id=eos_token_id(tokenizer), at_a_time=config.effective_micro_batch_size)


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lessons: Sequence[SftExample],
    config: SftConfig,
    begun: RunContext,
) -> None:
    from reinforcepp.training.resumable import ResumableSftTrainer, fit  # which loads TRL

    rows = [
        {"input_ids": [*one.given, *one.learnt], "labels": [*[IGNORED_LABEL] * len(one.given), *one.learnt]}
        for one in lessons
    ]
    fit(ResumableSftTrainer, model, tokenizer, rows, config, begun)


def _tell(before: HeldOutMetrics | None, after: HeldOutMetrics | None) -> None:
    """One sentence on the held-out rows before and after training."""
    if before is None or after is None:
        echo("No row was held out, so nothing is known about this model beyond its training data.", "yellow")
        return
    worse = after.loss > before.loss
    note = (
        ": it got worse on what it hasn't seen; fewer num_train_epochs or a lower learning_rate help" if worse else ""
    )
    echo(
        f"Held-out rows ({after.rows}, {after.tokens:,} tokens): loss {before.loss:.3f} -> {after.loss:.3f} nats per token, "
        f"perplexity {before.perplexity:.4g} -> {after.perplexity:.4g}{note}",
        "yellow" if worse else "",
    )
