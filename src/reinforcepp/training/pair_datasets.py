"""Preference pairs that a caller gives as datasets: checks, and the data of the reward model's card."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice, takewhile
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError

from reinforcepp.config import RewardModelConfig
from reinforcepp.data import conversation_text
from reinforcepp.data.sources import dataset_digest
from reinforcepp.errors import ConfigError, DataError, first_line, shown
from reinforcepp.rewards.trained import SplitPair
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.reward_card import NO_WEIGHT, CardData, Counts, ScoredData
from reinforcepp.training.supervised_setup import MAX_MEASURED_ROWS
from reinforcepp.types import Messages, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED = ("chosen_ids", "rejected_ids")
TEXTS = ("prompt", "chosen", "rejected")
ODD_WEIGHT = "{}: {} isn't a finite number of at least 0. Correct the column weight."
LEGACY = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
AnyDataset: TypeAlias = Dataset | IterableDataset


def as_dataset(rows: Any, name: str, config: RewardModelConfig) -> AnyDataset:
    """Return ``rows`` as a dataset of pairs; columns that the settings name are renamed to those of TRL.

    Raises:
        ConfigError: it isn't a dataset.
        DataError: it has no row, or lacks a column.
    """
    if rows is None:
        raise ConfigError(f"`{name}` is required. Give rows with the columns chosen and rejected.")
    if isinstance(rows, Sequence) and not isinstance(rows, str) and all(isinstance(row, Mapping) for row in rows):
        rows = Dataset.from_list(list(map(dict, rows)))
    if not isinstance(rows, AnyDataset):
        raise ConfigError(
            f"{name}: {type(rows).__name__} isn't a dataset of pairs. Give a datasets.Dataset, an IterableDataset or a list of "
            "dictionaries."
        )
    first = next(iter(rows), None)
    if first is None:
        raise DataError(f"{name}: no rows. Give at least one pair.")
    settings = {column: text for text in TEXTS if (column := getattr(config, f"{text}_column")) != text}
    names = {old: new for old, new in {**LEGACY, **settings}.items() if old in first and new not in first}
    rows = rows.rename_columns(names) if names else rows
    columns = [names.get(column, column) for column in first]
    if not any(set(pair) <= set(columns) for pair in (TOKENIZED, TEXTS[1:])):
        raise DataError(f"{name}: no columns chosen and rejected, only {', '.join(columns)}. Rename the columns.")
    if "weight" in columns and isinstance(rows, Dataset):
        _check_weights(rows["weight"][:], name)
    return rows


def _check_weights(weights: Sequence[Any], name: str) -> None:
    for weight in weights:
        if not (isinstance(weight, int | float) and 0 <= weight < math.inf):
            raise DataError(ODD_WEIGHT.format(f"{name}: weight", shown(weight)))
    if not any(weights):
        raise DataError(NO_WEIGHT.format(name))


def as_datasets(rows: Any, config: RewardModelConfig) -> AnyDataset | dict[str, AnyDataset] | None:
    """Return held-out rows as :func:`as_dataset` does, or several datasets by name."""
    if rows is None:
        return None
    if isinstance(rows, Mapping):
        return {name: as_dataset(each, f"eval_dataset[{name!r}]", config) for name, each in rows.items()}
    return as_dataset(rows, "eval_dataset", config)


def name_of(rows: AnyDataset) -> str:
    """Return the dataset's own name, or the name of the argument."""
    return str(rows.info.dataset_name or "train_dataset")


def reads_plain_text(rows: AnyDataset, config: RewardModelConfig) -> bool:
    """Return whether the rows are texts, which are read as they are, as in TRL.

    Raises:
        ConfigError: settings of the chat template are given, which such rows don't use.
    """
    chosen: Any = next(iter(rows)).get("chosen")
    if not isinstance(chosen, str):
        return False
    template = [name for name in ("chat_template", "system_prompt", "chat_template_kwargs") if getattr(config, name)]
    template += ["prompt_format"] if config.prompt_format == "question_answer" else []
    if template:
        raise ConfigError(
            f"{template[0]}: the rows of train_dataset are texts, which are read without a chat template, as in TRL. Give "
            f"messages ({{'role': 'user', 'content': ...}}), or omit {template[0]}."
        )
    return True


@contextmanager
def tokenizing_errors(name: str) -> Iterator[None]:
    """Report the error of a row that can't be tokenized as a DataError."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, ValueError, TemplateError) as error:
        raise DataError(
            f"{name}: a row can't be tokenized ({first_line(error)}). Give chosen and rejected as texts, or as lists of "
            "messages with role and content."
        ) from error


def print_skipped(rows: AnyDataset, prepared: AnyDataset, name: str, limit: int | None) -> None:
    """Print how many rows were longer than ``limit`` tokens."""
    if isinstance(rows, Dataset) and isinstance(prepared, Dataset) and len(prepared) < len(rows):
        echo(
            f"Skipped {len(rows) - len(prepared):,} of {len(rows):,} {name} pairs longer than {limit} tokens. Raise max_length "
            "to keep them."
        )


# --- the card ---------------------------------------------------------------------------------------------------------


def card_data(
    train: AnyDataset,
    evaluation: AnyDataset | Mapping[str, AnyDataset] | None,
    tokenizer: PreTrainedTokenizerBase,
    config: RewardModelConfig,
) -> CardData:
    """Return the data of a training for its card, from tokenized rows."""
    endless = not isinstance(train, Dataset)
    pairs = config.max_steps * config.batch_size if endless else len(train)
    margins = 0 if endless or "margin" not in train.column_names else int(np.count_nonzero(train["margin"]))
    heldout = list(evaluation.values()) if isinstance(evaluation, Mapping) else [evaluation] if evaluation else []
    return CardData(
        source=name_of(train),
        sha256="" if endless else dataset_digest(_trained_columns(train)),
        train_pairs=pairs,
        heldout_pairs=sum(len(rows) if isinstance(rows, Dataset) else len(_sample(rows)) for rows in heldout),
        counts=[Counts(pairs, 0, margins)],
        train=lambda: _scored(_sample(train), tokenizer),
        heldout=lambda: _scored(list(chain.from_iterable(map(_sample, heldout))), tokenizer),
    )


def _trained_columns(rows: Dataset) -> Dataset:
    return rows.select_columns([name for name in (*TOKENIZED, "margin", "weight") if name in rows.column_names])


def _sample(rows: AnyDataset) -> Sequence[Mapping[str, Any]]:
    """Return up to ``MAX_MEASURED_ROWS`` rows, evenly spaced if their number is known."""
    if not isinstance(rows, Dataset):
        return list(islice(rows, MAX_MEASURED_ROWS))
    if len(rows) <= MAX_MEASURED_ROWS:
        return list(rows)
    return list(rows.select(np.linspace(0, len(rows) - 1, MAX_MEASURED_ROWS).astype(int)))


def _scored(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> ScoredData:
    """Return tokenized rows as pairs; the tokens that both texts begin with are the prompt."""
    pairs: list[Preference] = []
    ids: list[SplitPair] = []
    for number, row in enumerate(rows):
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        shared = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(chosen, rejected, strict=False)))
        ids.append(((chosen[:shared], chosen[shared:]), (rejected[:shared], rejected[shared:])))
        parts = (chosen[:shared], chosen[shared:], rejected[shared:])
        texts = [str(tokenizer.decode(part, skip_special_tokens=True)) for part in parts]
        messages = _prompt_messages(row)
        if messages:
            texts = [conversation_text(messages), *(_answer(row[side][-1]) for side in ("chosen", "rejected"))]
        pairs.append(Preference(texts[0], texts[1], texts[2], number, messages=messages))
    return ScoredData(pairs, ids)


def _prompt_messages(row: Mapping[str, Any]) -> Messages:
    """Return the messages before the answers; empty if the row has texts or token ids, or two prompts."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list) or chosen[:-1] != rejected[:-1]:
        return ()
    return tuple({name: value for name, value in message.items() if value is not None} for message in chosen[:-1])


def _answer(message: Mapping[str, Any]) -> str:
    """Return an answer as text; a call of a tool without text is shown as JSON."""
    return str(message.get("content") or json.dumps(message.get("tool_calls") or "", ensure_ascii=False))
