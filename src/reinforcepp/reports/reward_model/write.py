"""From a reward model's folder to its report: the scored pairs are in ``heldout.parquet``, one row each.

row, prompt, chosen, rejected, chosen_score, rejected_score, chosen_length, rejected_length; lengths are in tokens
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError
from reinforcepp.files import whole_file
from reinforcepp.monitoring import printable
from reinforcepp.monitoring.completion_log import read_answers, save_answers
from reinforcepp.reports.reward_model.figures import Analysis, analyse
from reinforcepp.reports.reward_model.page import as_page
from reinforcepp.reports.reward_model.verdict import verdict
from reinforcepp.rewards.card import RewardCard, read_card
from reinforcepp.types import ScoredPair

HELDOUT_FILE = "heldout.parquet"
COLUMNS = tuple(field.name for field in fields(ScoredPair))
KINDS: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "RowId": (int, str), "float": (int, float)}


def save_pairs(pairs: Sequence[ScoredPair], folder: Path) -> None:
    """Write ``heldout.parquet``; the same pairs and scores are the same bytes."""
    save_answers(folder / HELDOUT_FILE, {name: [getattr(pair, name) for pair in pairs] for name in COLUMNS})


def read_pairs(folder: Path) -> list[ScoredPair]:
    """The held-out pairs of the reward model in ``folder``, at least one.

    Raises:
        ConfigError: if there are none, the file is damaged, or it doesn't belong to the card.
        ModelError: if ``folder`` is not a reward model.
    """
    card, path = read_card(folder), folder / HELDOUT_FILE
    if not card.heldout_pairs:
        raise ConfigError(
            f"No pair was held out when {folder} was trained, so there is nothing to report: train again with "
            "--heldout_fraction 0.1."
        )
    again = "train the reward model again with the same settings and --overwrite"
    if not path.is_file():
        raise ConfigError(f"{folder} has no {HELDOUT_FILE}, which the report is made of: {again}.")
    try:
        pairs = [_checked(row) for row in read_answers(path)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {again}.") from error
    if len(pairs) != card.heldout_pairs:
        raise ConfigError(
            f"{path} holds {len(pairs)} pairs, but the card speaks of {card.heldout_pairs}, so they don't belong "
            f"together: {again}."
        )
    return pairs


def _checked(row: Mapping[str, Any]) -> ScoredPair:
    values = {name: row[name] for name in COLUMNS}
    for field in fields(ScoredPair):
        value = values[field.name]
        if not isinstance(value, KINDS[str(field.type)]) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{field.name} is {value!r}")
    return ScoredPair(**values)


def write_reward_report(folder: Path, output: Path) -> str:
    """Write the report on the reward model in ``folder`` as a page to ``output``; returns the verdict.

    Raises:
        ReinforceError: As ``read_pairs``.
    """
    pairs = read_pairs(folder)
    card, analysis = read_card(folder), analyse(pairs)
    write_page(card, pairs, analysis, output)
    return verdict(analysis, card.train_accuracy)


def write_page(card: RewardCard, pairs: Sequence[ScoredPair], analysis: Analysis, output: Path) -> None:
    """The page alone, of figures that are there already."""
    text = printable(as_page(card, pairs, analysis))
    with whole_file(output) as file:
        file.write(text)
