"""Prompts: what the policy answers during RL."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.data._columns import ColumnNames
from reinforcepp.data._messages import content_of, prompt_of
from reinforcepp.data._table import Row, Skipped, describe_skipped, filter_rows, read_table
from reinforcepp.data._text import count, quoted
from reinforcepp.data.row_store import DiskRows
from reinforcepp.data.sources import resolve_data
from reinforcepp.data.split import split_by_prompt, weighted
from reinforcepp.data.streaming import OnProgress, stream
from reinforcepp.errors import DataError, nearest
from reinforcepp.types import RowId

GRADED = "reward functions get ground_truth out of the column 'reward_model'"


@dataclass(frozen=True)
class PromptRow:
    """A prompt as the file has it. ``columns`` are the row's other cells, for reward functions; ``row`` is its number.

    ``weight`` is how often it counts in training.
    """

    prompt: str
    columns: Mapping[str, Any]
    row: RowId = 0
    weight: float = 1.0


@dataclass(frozen=True)
class PromptData:
    """The distinct prompts of a file, in order of first appearance, the rows left out, and notes on how it was read.

    ``sha256`` is of the file's bytes; for several files, as built-in data has, of their digests, joined.
    """

    source: str
    sha256: str
    prompts: Sequence[PromptRow]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """``my.csv: 24 prompts; left out 2 rows: 2 duplicates (rows 8, 9)``."""
        parts = [f"{Path(self.source).name}: {count(len(self.prompts), 'prompt')}", *self.notes]
        return "; ".join([*parts, describe_skipped(self.skipped)] if self.skipped else parts)


def read_prompts(
    path: str | Path,
    *,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    renamed: Mapping[str, str] | None = None,
) -> PromptData:
    """Read the distinct prompts of a file or several (see ``read_table``).

    A prompt's other columns are those of the row where it appears first, with the types that the file gives them. Left
    out are rows with an empty prompt and those that repeat an earlier row's prompt, judged by the normalised text. The
    columns with answers matter only where the prompt is inside of them. ``renamed`` gives other columns the names, its
    keys, by which reward functions know them.

    Raises:
        DataError: A file can't be read, lacks a column, or there is no usable prompt.
    """
    table = read_table(path, ColumnNames(prompt_column, chosen_column, rejected_column), pairs=False)
    kept, skipped = filter_rows(table.rows, table.columns)
    prompts = tuple(prompt_row(row, renamed or {}) for row in kept)
    graded = any("ground_truth" in p.columns and "reward_model" in p.columns for p in prompts)
    notes = (*table.notes, GRADED) if graded and not any("ground_truth" in row.cells for row in kept) else table.notes
    return _some(PromptData(table.source, table.sha256, prompts, skipped, notes), table.columns)


def _some(data: PromptData, columns: Sequence[str]) -> PromptData:
    if not data.prompts:
        raise DataError(
            f"{data.source}: there is no usable prompt ({describe_skipped(data.skipped)}); "
            f"fill in the column {columns[0]!r} or name another with --prompt_column."
        )
    return data


def prompt_row(row: Row, renamed: Mapping[str, str]) -> PromptRow:
    """What training and reward functions get of a usable row.

    Raises:
        DataError: It has no column of those that are to be renamed.
    """
    columns = {name: cell for name, cell in row.cells.items() if name != row.layout.prompt}
    for name, column in renamed.items():
        if column not in columns:
            raise DataError(
                f"Row {row.number}: there is no column {column!r} that could be called {name!r}, as --columns says; "
                f"there are {quoted(columns)}.{nearest(column, columns)}"
            )
        columns[name] = columns.pop(column)
    graded = columns.get("reward_model")
    if isinstance(graded, Mapping) and "ground_truth" in graded:
        columns.setdefault("ground_truth", graded["ground_truth"])
    return PromptRow(row.texts[0], columns, row.number, row.weight)


def load_prompts(
    source: str | Path,
    *,
    heldout_fraction: float,
    seed: int,
    prompt_column: str = "prompt",
    chosen_column: str = "chosen",
    rejected_column: str = "rejected",
    renamed: Mapping[str, str] | None = None,
    streaming: bool = False,
    on_progress: OnProgress = lambda share: None,
) -> tuple[PromptData, Sequence[PromptRow], Sequence[PromptRow]]:
    """All prompts of ``source``, then those for training, as often as their weights say, and the held-out ones.

    A file is split as ``load_preferences`` splits it: with the same fraction and seed, a prompt that is on one side
    there is on the same side here. Built-in data comes split. ``streaming`` and ``on_progress`` are as for
    ``load_preferences``.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
        DataError: As ``read_prompts``, or ``source`` names built-in data that doesn't exist.
    """

    def read(path: Path) -> PromptData:
        return read_prompts(
            path,
            prompt_column=prompt_column,
            chosen_column=chosen_column,
            rejected_column=rejected_column,
            renamed=renamed,
        )

    files = resolve_data(source)
    if streaming and files.heldout is None:
        names = ColumnNames(prompt_column, chosen_column, rejected_column)
        return _stream(files.train, names, renamed or {}, heldout_fraction, seed, on_progress)
    train = read(files.train)
    if files.heldout is None:
        rows, heldout_rows = split_by_prompt(train.prompts, heldout_fraction, seed)
        return train, weighted(rows, seed), heldout_rows
    heldout = read(files.heldout)
    digest = hashlib.sha256((train.sha256 + heldout.sha256).encode()).hexdigest()
    prompts = (*train.prompts, *heldout.prompts)
    both = PromptData(str(source), digest, prompts, train.skipped + heldout.skipped)
    return both, list(train.prompts), list(heldout.prompts)


def _stream(
    source: Path,
    names: ColumnNames,
    renamed: Mapping[str, str],
    heldout_fraction: float,
    seed: int,
    on_progress: OnProgress,
) -> tuple[PromptData, Sequence[PromptRow], Sequence[PromptRow]]:
    read = stream(
        source,
        names,
        pairs=False,
        seed=seed,
        fault=lambda columns, texts: None,
        values=lambda row: [prompt_row(row, renamed).columns],
        on_progress=on_progress,
    )

    def make(values: Sequence[Any]) -> PromptRow:
        row, (prompt,), columns = values
        return PromptRow(prompt, columns, row)

    data = PromptData(read.source, read.sha256, read.rows(read.kept, make), read.skipped, read.notes)
    train, heldout = read.split(heldout_fraction, seed)
    return _some(data, read.columns or names), read.rows(train, make), read.rows(heldout, make)


def read_prompt_lines(path: str | None) -> list[str]:
    """The lines with text of a file, or of standard input, one prompt each.

    Raises:
        DataError: It can't be read, is not UTF-8, or holds no prompt.
    """
    name = path or "standard input"
    try:
        data = Path(path).expanduser().read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        raise DataError(f"{name} can't be read: {error.strerror}; check prompts_file.") from error
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name} is not UTF-8: see line {row}; convert it with iconv -t utf-8.") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{name} holds no prompt: give one per line, or use --prompt.")
    return prompts


def prompt_rows(dataset: Iterable[Any] | None, name: str) -> Sequence[PromptRow]:
    """Rows of a data set in memory: mappings with a ``prompt``, as ``datasets`` gives them, or PromptRows; spooled rows are
    left as they are.

    A prompt is text or a list of messages.

    Raises:
        DataError: A row has neither in its column ``prompt``; ``name`` tells which data set it is in.
    """
    if isinstance(dataset, DiskRows):
        return dataset
    rows: list[PromptRow] = []
    for number, row in enumerate(dataset if dataset is not None else []):
        if isinstance(row, PromptRow):
            rows.append(row)
            continue
        cell = row.get("prompt") if isinstance(row, Mapping) else None
        prompt = cell
        if isinstance(cell, list):
            prompt = prompt_of(content_of(cell, "prompt", f"Row {number} of {name}"), Counter()).prompt
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"Row {number} of {name} has no text in its column 'prompt'.")
        rows.append(PromptRow(prompt, {key: value for key, value in row.items() if key != "prompt"}, number))
    return rows
