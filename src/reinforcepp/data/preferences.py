"""Preference pairs: what the reward model learns from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.data._columns import ColumnNames
from reinforcepp.data._table import Skipped, describe_skipped, filter_rows, normalize, read_table
from reinforcepp.data._text import count
from reinforcepp.data.sources import resolve_data
from reinforcepp.data.split import split_by_prompt, weighted
from reinforcepp.data.streaming import OnProgress, contradictions, stream
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
    pairs: Sequence[Preference]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()
    contradictions: tuple[tuple[RowId, RowId], ...] = ()
    """The rows of pairs that prefer the same two answers to the same prompt in opposite ways."""

    def summary(self) -> str:
        """``my.csv: 24 usable pairs; left out 3 rows: 1 empty chosen (row 5), 2 duplicates (rows 8, 9)``."""
        parts = [f"{Path(self.source).name}: {count(len(self.pairs), 'usable pair')}", *self.notes]
        if self.skipped:
            parts.append(describe_skipped(self.skipped))
        if self.contradictions:
            named = ", ".join(f"{first} and {second}" for first, second in self.contradictions[:3])
            more = ", ..." if len(self.contradictions) > 3 else ""
            parts.append(f"kept {count(len(self.contradictions), 'contradiction')} (rows {named}{more})")
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
    table = read_table(path, ColumnNames(prompt_column, chosen_column, rejected_column), pairs=True)
    kept, skipped = filter_rows(table.rows, table.columns, lambda texts: _fault(table.columns, texts))
    pairs = tuple(Preference(r.texts[0], r.texts[1], r.texts[2], r.number, r.weight) for r in kept)
    data = PreferenceData(table.source, table.sha256, pairs, skipped, table.notes, contradictions_in(pairs))
    return _enough(data)


def contradictions_in(pairs: Iterable[Preference]) -> tuple[tuple[RowId, RowId], ...]:
    """The rows of each two pairs that prefer the same two answers to the same prompt in opposite ways."""
    rows: dict[tuple[str, str, str], RowId] = {}
    found = []
    for pair in pairs:
        prompt, chosen, rejected = map(normalize, (pair.prompt, pair.chosen, pair.rejected))
        if (prompt, rejected, chosen) in rows:
            found.append((rows[prompt, rejected, chosen], pair.row))
        rows[prompt, chosen, rejected] = pair.row
    return tuple(found)


def _fault(columns: Sequence[str], texts: Sequence[str]) -> str | None:
    _, chosen, rejected = texts
    return f"with {' equal to '.join(columns[1:])}" if chosen == rejected else None


def _enough(data: PreferenceData) -> PreferenceData:
    if len(data.pairs) < _MIN_PAIRS:
        left_out = f" ({describe_skipped(data.skipped)})" if data.skipped else ""
        raise DataError(
            f"{data.source}: {count(len(data.pairs), 'usable pair')}, but at least {_MIN_PAIRS} are needed{left_out}; "
            f"{'correct those rows or add more' if data.skipped else 'add more rows'}."
        )
    return data


def load_preferences(
    source: str | Path,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    streaming: bool = False,
    on_progress: OnProgress = lambda share: None,
) -> tuple[PreferenceData, Sequence[Preference], Sequence[Preference]]:
    """All preference data of ``source``, then its training pairs, as often as their weights say, and its held-out pairs.

    A file is split by prompt (``split_by_prompt``). Built-in data comes split: ``heldout_fraction`` and ``seed`` don't
    apply to it, and row numbers are those of the file that a pair is in. With ``streaming``
    the pairs stay on the disk, and ``on_progress`` is told which share of the files has been read; built-in data is small.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1), or two of the column settings are the same.
        DataError: As ``read_preferences``, or ``source`` names built-in data that doesn't exist.
    """

    def read(path: Path) -> PreferenceData:
        return read_preferences(
            path, prompt_column=prompt_column, chosen_column=chosen_column, rejected_column=rejected_column
        )

    files = resolve_data(source)
    if streaming and files.heldout is None:
        names = ColumnNames(prompt_column, chosen_column, rejected_column)
        return _stream(files.train, names, heldout_fraction, seed, on_progress)
    train = read(files.train)
    if files.heldout is None:
        pairs, heldout_pairs = split_by_prompt(train.pairs, heldout_fraction, seed)
        return train, weighted(pairs, seed), heldout_pairs
    heldout = read(files.heldout)
    digest = hashlib.sha256((train.sha256 + heldout.sha256).encode()).hexdigest()
    everything = (*train.pairs, *heldout.pairs)
    both = PreferenceData(str(source), digest, everything, train.skipped + heldout.skipped)
    return both, list(train.pairs), list(heldout.pairs)


def _stream(
    source: Path, names: ColumnNames, heldout_fraction: float, seed: int, on_progress: OnProgress
) -> tuple[PreferenceData, Sequence[Preference], Sequence[Preference]]:
    read = stream(source, names, pairs=True, seed=seed, fault=_fault, values=lambda row: [], on_progress=on_progress)

    def make(values: Sequence[Any]) -> Preference:
        row, (prompt, chosen, rejected) = values
        return Preference(prompt, chosen, rejected, row)

    pairs = read.rows(read.kept, make)
    data = PreferenceData(read.source, read.sha256, pairs, read.skipped, read.notes, contradictions(read))
    train, heldout = read.split(heldout_fraction, seed)
    return _enough(data), read.rows(train, make), read.rows(heldout, make)
