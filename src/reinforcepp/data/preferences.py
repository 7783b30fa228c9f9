"""Preference pairs: what the reward model learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reinforcepp.data._columns import Names
from reinforcepp.data._table import Row, Skipped, describe_skipped, normalize, read_table, sift
from reinforcepp.data._text import count
from reinforcepp.data.sources import resolve_data
from reinforcepp.data.split import split_by_prompt, weighted
from reinforcepp.errors import DataError
from reinforcepp.types import Preference, RowId

# One pair can't be both learned from and checked against.
_MIN_PAIRS = 2


@dataclass(frozen=True)
class PreferenceData:
    """The usable pairs of a file, in its order, the rows left out, and notes on how it was read.

    ``sha256`` is of the file's bytes; for several files, as built-in data has, of their digests, joined.
    """

    source: str
    sha256: str
    pairs: tuple[Preference, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    @property
    def contradictions(self) -> tuple[tuple[RowId, RowId], ...]:
        """The rows of pairs that prefer the same two answers to the same prompt in opposite ways."""
        rows: dict[tuple[str, str, str], RowId] = {}
        found = []
        for pair in self.pairs:
            prompt, chosen, rejected = map(normalize, (pair.prompt, pair.chosen, pair.rejected))
            if (prompt, rejected, chosen) in rows:
                found.append((rows[prompt, rejected, chosen], pair.row))
            rows[prompt, chosen, rejected] = pair.row
        return tuple(found)

    def summary(self) -> str:
        """``my.csv: 24 usable pairs; left out 3 rows: 1 empty chosen (row 5), 2 duplicates (rows 8, 9)``."""
        parts = [f"{Path(self.source).name}: {count(len(self.pairs), 'usable pair')}", *self.notes]
        if self.skipped:
            parts.append(describe_skipped(self.skipped))
        if contradictions := self.contradictions:
            named = ", ".join(f"{first} and {second}" for first, second in contradictions[:3])
            more = ", ..." if len(contradictions) > 3 else ""
            parts.append(f"kept {count(len(contradictions), 'contradiction')} (rows {named}{more})")
        return "; ".join(parts)


def read_preferences(
    path: str | Path,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
) -> PreferenceData:
    """Read preference pairs from a file or several (see ``read_table``), leaving out rows that say nothing.

    Left out are rows with an empty cell, with ``chosen`` equal to ``rejected``, and repetitions of an earlier row, all
    judged by the normalised text, and rows whose conversations don't come down to one prompt and two answers. Pairs
    that contradict each other are kept, as people do disagree.

    Raises:
        ConfigError: Two of the column settings are the same.
        DataError: A file can't be read, lacks a column, or has fewer than 2 usable pairs.
    """
    table = read_table(path, Names(prompt_column, chosen_column, rejected_column), pairs=True)

    def fault(texts: Sequence[str]) -> str | None:
        _, chosen, rejected = texts
        return f"with {' equal to '.join(table.columns[1:])}" if chosen == rejected else None

    kept, skipped = sift(table.rows, table.columns, fault)
    pairs = tuple(preference(row) for row in kept)
    if len(pairs) < _MIN_PAIRS:
        left_out = f" ({describe_skipped(skipped)})" if skipped else ""
        raise DataError(
            f"{table.source}: {count(len(pairs), 'usable pair')}, but at least {_MIN_PAIRS} are needed{left_out}; "
            f"{'correct those rows or add more' if skipped else 'add more rows'}."
        )
    return PreferenceData(table.source, table.sha256, pairs, skipped, table.notes)


def preference(row: Row) -> Preference:
    """What a usable row says."""
    prompt, chosen, rejected = row.texts
    return Preference(prompt, chosen, rejected, row.number, row.weight)


def load_preferences(
    source: str | Path,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
) -> tuple[PreferenceData, list[Preference], list[Preference]]:
    """All preference data of ``source``, then its training pairs, as often as their weights say, and its held-out pairs.

    A file is split by prompt (``split_by_prompt``). Built-in data comes split: ``heldout_fraction`` and ``seed`` don't
    apply to it, and row numbers are those of the file that a pair is in.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1), or two of the column settings are the same.
        DataError: As ``read_preferences``, or ``source`` names built-in data that doesn't exist.
    """

    def read(path: Path) -> PreferenceData:
        return read_preferences(
            path, prompt_column=prompt_column, chosen_column=chosen_column, rejected_column=rejected_column
        )

    files = resolve_data(source)
    train = read(files.train)
    if files.heldout is None:
        pairs, heldout_pairs = split_by_prompt(train.pairs, heldout_fraction, seed)
        return train, weighted(pairs, seed), heldout_pairs
    heldout = read(files.heldout)
    digest = hashlib.sha256((train.sha256 + heldout.sha256).encode()).hexdigest()
    both = PreferenceData(str(source), digest, train.pairs + heldout.pairs, train.skipped + heldout.skipped)
    return both, list(train.pairs), list(heldout.pairs)
