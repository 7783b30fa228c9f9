"""Fine-tune a language model on answers or plain text with TRL's SFTTrainer, before RL (see ``supervised_loop``).

Added to TRL: prompts and answers are formatted and tokenized as RL and the reward model see them, only the answer and its
EOS have a loss, and held-out rows are evaluated before and after training with RL's log-probabilities.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import torch

from reinforcepp.config import SftConfig
from reinforcepp.data import DataFiles, DataSource, GivenRows, SftRow, load_texts
from reinforcepp.errors import ConfigError
from reinforcepp.files import write_json
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.given import check_loaded, name_of
from reinforcepp.models.loading import load_config, load_policy, load_tokenizer, tokenizer_for, weights_hash
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.lora import has_adapter, is_4bit, with_adapter
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenization import Answers, encode_texts, eos_token_id, split_examples
from reinforcepp.monitoring.run_record import EVALUATION
from reinforcepp.rollout.engine import preserve_random_state
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.checkpoint import FinishedRun, finish
from reinforcepp.training.precision import with_precision
from reinforcepp.training.prompt_summary import print_prompt_format
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.setup import FROZEN_ADAPTER, loading
from reinforcepp.training.supervised_setup import (
    CheckMemory,
    begin,
    check_not_empty,
    check_run,
    count_steps,
    join_ranks,
    length_limit,
    longest_row,
    open_run_dir,
    tokenize_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED_LABEL = -100
"""Label of a token without a loss."""
MAX_EXPONENT_LOSS = 700.0
"""Largest loss whose exponential is finite in float64."""


class SftExample(NamedTuple):
    """Token ids of the context, which have no loss, and of the target that follows it."""

    context: list[int]
    target: list[int]

    def as_row(self) -> dict[str, list[int]]:
        """Return the columns that TRL trains on."""
        labels = [*[IGNORED_LABEL] * len(self.context), *self.target]
        return {"input_ids": [*self.context, *self.target], "labels": labels}


class DiskExamples(Sequence[SftExample]):
    """Examples whose token ids are read from disk on access."""

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> SftExample: ...

    @overload
    def __getitem__(self, index: slice) -> list[SftExample]: ...

    def __getitem__(self, index: int | slice) -> SftExample | list[SftExample]:
        """Return one example, or a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self._rows[index]
        start = row["labels"].count(IGNORED_LABEL)
        return SftExample(row["input_ids"][:start], row["input_ids"][start:])


@dataclass(frozen=True)
class HeldOutMetrics:
    """Mean loss of held-out target tokens in nats, its exponential, and the numbers of tokens and rows."""

    loss: float
    perplexity: float
    tokens: int
    rows: int


@dataclass(frozen=True)
class SftResult:
    """A fine-tuned model.

    Attributes:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer, with the chat template that it was trained with.
        folder: The folder that holds both.
        before: Metrics of the held-out rows before the training; None if no row is held out.
        after: The same after the training.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    before: HeldOutMetrics | None
    after: HeldOutMetrics | None

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics of the held-out rows after the training, with TRL's keys; empty if no row is held out."""
        return {f"eval_{name}": float(value) for name, value in (asdict(self.after) if self.after else {}).items()}


def sft(
    args: SftConfig | None = None,
    model: str | os.PathLike[str] | PreTrainedModel | None = None,
    train_dataset: Dataset | Iterable[Mapping[str, Any]] | None = None,
    eval_dataset: Dataset | Iterable[Mapping[str, Any]] | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> SftResult:
    """Fine-tune a language model on answers, conversations or plain text; save it to ``args.output_dir``.

    Example:
        >>> from reinforcepp import SftConfig, sft
        >>> rows = [{"prompt": "What is DNS?", "completion": "The phone book of the internet."}]
        >>> result = sft(SftConfig(output_dir="tuned", num_train_epochs=1), "builtin:tiny", rows, rows)
        >>> sorted(result.metrics)
        ['eval_loss', 'eval_perplexity', 'eval_rows', 'eval_tokens']

    Args:
        args: Settings.
        model: Name, folder, or a loaded model, which is trained in place; default: ``args.model``.
        train_dataset: Rows with a ``prompt`` and a ``completion``, with ``messages``, or with a ``text``; all are trained on.
            Default: the files ``args.data``, of which ``args.heldout_fraction`` is held out.
        eval_dataset: Held-out rows, evaluated before and after training; only with ``train_dataset``.
        processing_class: The tokenizer; default: the model's.

    Raises:
        ReinforceError: The data, the model or the output directory can't be used; raised before weights are loaded.
    """
    config = args or SftConfig()
    loaded = None if model is None else check_loaded(model, "model")
    if model is not None:
        config = replace(config, model=name_of(model), use_peft=config.use_peft or has_adapter(loaded))
    data: DataSource | None = None
    if train_dataset is not None:
        data = DataFiles(
            GivenRows.of(train_dataset, "train_dataset"),
            None if eval_dataset is None else GivenRows.of(eval_dataset, "eval_dataset"),
        )
        config = replace(config, data="train_dataset", heldout_fraction=0.0)
    elif eval_dataset is not None:
        raise ConfigError("eval_dataset: only supported with train_dataset; files are split by heldout_fraction.")
    with TemporaryDirectory() as scratch, preserve_random_state():
        trained, metrics = _train_language_model(config, scratch, None, loaded, processing_class, data)
        folder = Path(config.output_dir).expanduser()
        if trained is None:  # The run was finished before.
            trained = load_policy(str(folder)), load_tokenizer(str(folder))
        return SftResult(*trained, folder, metrics["before"], metrics["after"])


def train_language_model(
    config: SftConfig, check_memory: CheckMemory | None = None
) -> dict[str, HeldOutMetrics | None]:
    """Fine-tune, evaluate and save a language model. Rank 0 evaluates and saves.

    Returns:
        Metrics of the held-out rows ``before`` and ``after`` training; None if no row is held out.

    Raises:
        ReinforceError: the data, the model or the output directory can't be used; raised before weights are loaded.
    """
    with TemporaryDirectory() as scratch:
        return _train_language_model(config, scratch, check_memory)[1]


Trained = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


def _train_language_model(
    config: SftConfig,
    scratch: str,
    check_memory: CheckMemory | None,
    loaded: PreTrainedModel | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    source: DataSource | None = None,
) -> tuple[Trained | None, dict[str, HeldOutMetrics | None]]:
    """Return model and tokenizer, or None if the run is finished, and the metrics."""
    if config.trust_remote_code:
        allow_remote_code(config.model, config.output_dir)
    join_ranks(config)
    folder, saved = open_run_dir(config, loaded=loaded is not None)
    data, train, heldout = load_texts(
        config.data if source is None else source,
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
        **config.column_names,
        max_bad_rows=config.max_bad_rows,
    )
    echo(data.summary())
    if isinstance(saved, FinishedRun):
        saved.close(config, {"data": data.sha256})
        return None, _saved_metrics(folder)
    model_config = load_config(config.model) if loaded is None else loaded.config
    given = loaded is not None or processing_class is not None
    tokenizer = tokenizer_for(model_config, processing_class) if given else load_tokenizer(config.model)
    tokenizer = with_chat_template(tokenizer, config)
    limit = length_limit(config, model_config)
    began = saved.state["settings"] if saved else None
    config, precision = with_precision(with_learning_rate(config, model_config, began), model_config, began)

    def ids_of(rows: Sequence[SftRow]) -> list[dict[str, list[int]]]:
        return [example.as_row() for example in to_examples(tokenizer, rows)]

    train, examples = tokenize_rows(train, ids_of, limit, "training rows", scratch)
    heldout, heldout_ids = tokenize_rows(heldout, ids_of, limit, "held-out rows", scratch)
    heldout_examples = DiskExamples(heldout_ids)
    check_not_empty(train, "row", data.source, limit)
    print_prompt_format(tokenizer, train, examples[0]["input_ids"])
    if check_memory is not None:
        check_memory(config, longest_row(examples))

    model = load_policy(config.model, **loading(config)) if loaded is None else loaded.eval()
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if has_adapter(model):
        if not any(weight.requires_grad for weight in model.parameters()):
            raise ConfigError(FROZEN_ADAPTER)
    elif config.use_peft:
        model = with_adapter(model, config, seed=config.seed)
    else:
        model.requires_grad_(True)  # merging an adapter freezes the weights
    facts = {
        "kind": type(config).__name__,
        "rows": len(train),
        "heldout_rows": len(heldout),
        "inputs": inputs,
        **precision,
    }
    before: HeldOutMetrics | None = None

    def evaluate_and_save() -> dict[str, HeldOutMetrics | None]:
        metrics = {"before": before, "after": _evaluate(model.eval(), heldout_examples, tokenizer, config)}
        save_model(model, tokenizer, folder)
        write_json(folder / EVALUATION, {when: asdict(of) for when, of in metrics.items() if of is not None})
        _print_metrics(metrics["before"], metrics["after"])
        echo(f"Saved model to {folder}", "green")
        finish(folder, config, inputs, count_steps(examples, config))
        return metrics

    with begin(folder, config, inputs, saved, facts) as run:
        from reinforcepp.distributed.rank_zero import RankZero  # loads Accelerate
        from reinforcepp.training.supervised_loop import ResumableSftTrainer, fit  # loads TRL

        check_run(run, model, tokenizer, config, examples)
        first = RankZero(run.ranks, config.watchdog_seconds)
        before = first.run(lambda: _evaluate(model, heldout_examples, tokenizer, config))
        fit(ResumableSftTrainer, model, tokenizer, examples, config, run)
        return (model, tokenizer), first.run(evaluate_and_save)


def _saved_metrics(folder: Path) -> dict[str, HeldOutMetrics | None]:
    """Return the metrics of a finished training; None if no row was held out."""
    path = folder / EVALUATION
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {when: HeldOutMetrics(**saved[when]) if when in saved else None for when in ("before", "after")}


def to_example(tokenizer: PreTrainedTokenizerBase, row: SftRow) -> SftExample:
    """Tokenize ``row``: the target is the answer and its end token, or a whole text but for its first token, and its EOS."""
    return to_examples(tokenizer, [row])[0]


def to_examples(tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow]) -> list[SftExample]:
    """Return :func:`to_example` for each row, tokenized together."""
    texts = iter(encode_texts(tokenizer, [row.completion for row in rows if row.question is None]))
    answers = [
        Answers(row.conversation, (row.completion,), row.chat_template_kwargs)
        for row in rows
        if row.question is not None
    ]
    pairs = iter(split_examples(tokenizer, answers))
    eos = eos_token_id(tokenizer)

    def whole(ids: list[int]) -> SftExample:
        return SftExample(ids[:1], ids[1:] if ids[-1] == eos else [*ids[1:], eos])

    return [whole(next(texts)) if row.question is None else SftExample(*next(pairs)) for row in rows]


@torch.no_grad()
def evaluate_heldout(
    model: PreTrainedModel, examples: Sequence[SftExample], *, pad_id: int, batch_size: int
) -> HeldOutMetrics:
    """Return the loss of ``model``, in evaluation mode, on the targets, from the log-probabilities that RL uses."""
    total, tokens = 0.0, 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        contexts, targets = [row.context for row in batch], [row.target for row in batch]
        logprobs_BT, _, mask_BT = response_logprobs(model, contexts, targets, pad_id=pad_id)
        total -= float(logprobs_BT.double().sum())
        tokens += int(mask_BT.sum())
    loss = total / tokens
    return HeldOutMetrics(loss, math.exp(min(loss, MAX_EXPONENT_LOSS)), tokens, len(examples))


def _evaluate(
    model: PreTrainedModel, examples: Sequence[SftExample], tokenizer: PreTrainedTokenizerBase, config: SftConfig
) -> HeldOutMetrics | None:
    if not examples:
        return None
    if torch.accelerator.is_available() and not is_4bit(model):  # a 4-bit model is on the GPU and can't be moved
        model.to(torch.accelerator.current_accelerator())
    return evaluate_heldout(
        model, examples, pad_id=eos_token_id(tokenizer), batch_size=config.effective_micro_batch_size
    )


def _print_metrics(before: HeldOutMetrics | None, after: HeldOutMetrics | None) -> None:
    if before is None or after is None:
        echo(
            "heldout_fraction: no row was held out, so the model wasn't evaluated on unseen data. Raise heldout_fraction.",
            "yellow",
        )
        return
    worse = after.loss > before.loss
    advice = ". The loss on unseen rows rose. Lower num_train_epochs or learning_rate." if worse else ""
    echo(
        f"Held-out rows ({after.rows}, {after.tokens:,} tokens): loss {before.loss:.3f} -> {after.loss:.3f} nats/token, "
        f"perplexity {before.perplexity:.4g} -> {after.perplexity:.4g}{advice}",
        "yellow" if worse else "",
    )
