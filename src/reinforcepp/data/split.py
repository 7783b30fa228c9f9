"""Holding out some prompts, so that what was learned is judged on questions never seen; and rows that count more or less."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

from reinforcepp.data._table import normalize
from reinforcepp.errors import ConfigError
from reinforcepp.types import RowId


class HasPrompt(Protocol):
    """Anything that can be split by its prompt."""

    @property
    def prompt(self) -> str:
        """The prompt's text."""
        ...


class HasWeight(HasPrompt, Protocol):
    """A row that says how often it counts."""

    @property
    def weight(self) -> float:
        """How often."""
        ...

    @property
    def row(self) -> RowId:
        """Its number."""
        ...


T = TypeVar("T", bound=HasPrompt)
W = TypeVar("W", bound=HasWeight)


def split_by_prompt(rows: Sequence[T], heldout_fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Divide rows into ``(train, heldout)`` so that no prompt is on both sides; each side keeps the given order.

    Prompts are ranked by a hash of seed and normalised text and the first ``heldout_fraction`` of them held out, so
    the order and number of rows per prompt don't matter. Of two or more prompts, at least one is on either side,
    unless the fraction is 0; a single prompt is for training.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
    """
    check_fraction(heldout_fraction)
    prompts = [normalize(row.prompt) for row in rows]
    ranked = sorted(set(prompts), key=lambda prompt: rank(seed, prompt))
    heldout = set(ranked[: number_heldout(heldout_fraction, len(ranked))])
    return (
        [row for row, prompt in zip(rows, prompts, strict=True) if prompt not in heldout],
        [row for row, prompt in zip(rows, prompts, strict=True) if prompt in heldout],
    )


def check_fraction(heldout_fraction: float) -> None:
    """Raises a ConfigError for what is no share."""
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction is {heldout_fraction}; give a number from 0 up to, but not including, 1.")


def number_heldout(heldout_fraction: float, prompts: int) -> int:
    """How many of so many prompts are held out."""
    return max(0, min(max(1, round(heldout_fraction * prompts)), prompts - 1)) if heldout_fraction else 0


def weighted(rows: Sequence[W], seed: int) -> list[W]:
    """Each row as often as its weight says; of a fraction, the rows that a hash of seed, number and prompt picks.

    A weight of 2.5 is each row twice and half of them a third time, one of 0.1 a tenth of the rows.
    """
    return [row for row in rows for _ in range(times(row.weight, f"{row.row}:{row.prompt}", seed))]


def times(weight: float, row: str, seed: int) -> int:
    """How often a row counts, by what names it."""
    if weight == int(weight):
        return int(weight)
    share = int.from_bytes(rank(seed, row)[:8], "big") / 2**64
    return math.floor(weight) + (share < weight % 1)


def rank(seed: int, prompt: str) -> bytes:
    """What decides whether a prompt is held out: the first in this order are."""
    # Lone surrogates can't come from a file but can from a caller.
    return hashlib.sha256(f"{seed}:{prompt}".encode("utf-8", "surrogatepass")).digest()
