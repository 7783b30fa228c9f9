"""Read and write a reward model's scored held-out pairs and its report.

``heldout.parquet`` has one row per pair: row, prompt, chosen, rejected, chosen_score, rejected_score, chosen_length,
rejected_length, messages; lengths are in tokens. ``messages`` are null for a prompt that is a text, and files of older versions
don't have them. If the model has several outputs, a pair has a row per criterion that prefers one of its responses, which is
``chosen`` in that row, and a column ``criterion``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError, option, setting
from reinforcepp.files import whole_file
from reinforcepp.monitoring.completion_log import MESSAGES, read_completions, save_completions
from reinforcepp.reports.reward_model.metrics import Analysis, analyze_by_criterion
from reinforcepp.reports.reward_model.page import as_page, verdicts
from reinforcepp.rewards.card import RewardCard, read_card
from reinforcepp.types import ScoredPair

HELDOUT_FILE = "heldout.parquet"
CRITERION = "criterion"
COLUMNS = tuple(field.name for field in fields(ScoredPair) if field.name != CRITERION)
KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "RowId": (int, str), "float": (int, float)}


def save_pairs(pairs: Sequence[ScoredPair], folder: Path) -> None:
    """Write ``heldout.parquet``; equal pairs and scores give equal bytes."""
    columns = (*COLUMNS, CRITERION) if any(pair.criterion for pair in pairs) else COLUMNS
    save_completions(folder / HELDOUT_FILE, {name: [getattr(pair, name) for pair in pairs] for name in columns})


def read_pairs(folder: Path) -> list[ScoredPair]:
    """Return the held-out pairs of the reward model in ``folder``, at least one.

    Raises:
        ConfigError: There are no pairs, the file is damaged, or it doesn't match the card.
        ModelError: ``folder`` isn't a reward model.
    """
    card, path = read_card(folder), folder / HELDOUT_FILE
    if not card.heldout_pairs:
        raise ConfigError(
            f"{folder}: the reward model was trained without held-out pairs, so there is nothing to report. Train it again with "
            f"{setting('heldout_fraction')} 0.1."
        )
    again = f"Train the reward model again with the same settings and {option('overwrite')}."
    if not path.is_file():
        raise ConfigError(f"{folder}: {HELDOUT_FILE} not found, which the report needs. {again}")
    try:
        pairs = [_checked(row) for row in read_completions(path)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: the file is damaged ({error}). {again}") from error
    expected = sum(each.heldout_pairs for each in card.criteria) if card.criteria else card.heldout_pairs
    if len(pairs) != expected:
        raise ConfigError(
            f"{path}: the file has {len(pairs)} pairs, but the card says {expected}, so they don't match. {again}"
        )
    return pairs


def _checked(row: Mapping[str, Any]) -> ScoredPair:
    kinds = {field.name: KINDS[str(field.type)] for field in fields(ScoredPair) if field.name != MESSAGES}
    values = {CRITERION: "", **row}
    values = {name: values[name] for name in kinds}
    for name, value in values.items():
        if not isinstance(value, kinds[name]) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}")
    return ScoredPair(**values, messages=tuple(row.get(MESSAGES) or ()))


def reward_report(folder: Path) -> tuple[str, str]:
    """Return the page on the reward model in ``folder``, and the verdict.

    Raises:
        ReinforceError: As ``read_pairs``.
    """
    pairs = read_pairs(folder)
    card, analyses = read_card(folder), analyze_by_criterion(pairs)
    return as_page(card, pairs, analyses), "\n".join(verdicts(card, analyses))


def write_page(card: RewardCard, pairs: Sequence[ScoredPair], analyses: Mapping[str, Analysis], output: Path) -> None:
    """Write the page of metrics that are already computed, by criterion."""
    text = as_page(card, pairs, analyses)
    with whole_file(output) as file:
        file.write(text)
