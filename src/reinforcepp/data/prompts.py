"""Prompts: what the policy answers during RL."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.data._table import Skipped, count, describe_skipped, read_table, sift
from reinforcepp.data.sources import resolve_data
from reinforcepp.data.split import split_by_prompt
from reinforcepp.errors import DataError


@dataclass(frozen=True)
class PromptRow:
    """A prompt as the file has it. ``columns`` are the row's other cells, for reward functions; ``row`` is its line."""

    prompt: str
    columns: Mapping[str, Any]
    row: int = 0


@dataclass(frozen=True)
class PromptData:
    """The distinct prompts of a file, in order of first appearance, and the rows left out.

    ``sha256`` is of the file's bytes; for built-in data, of the digests of its two files, joined.
    """

    source: str
    sha256: str
    prompts: tuple[PromptRow, ...]
    skipped: tuple[Skipped, ...]

    def summary(self) -> str:
        """``my.csv: 24 prompts; left out 2 rows: 2 duplicates (rows 8, 9)``."""
        parts = [f"{Path(self.source).name}: {count(len(self.prompts), 'prompt')}"]
        return "; ".join([*parts, describe_skipped(self.skipped)] if self.skipped else parts)


def read_prompts(path: str | Path, *, prompt_column: str = "prompt") -> PromptData:
    """Read the distinct prompts of a CSV file; a prompt's other columns are those of the row where it appears first.

    Left out are rows with an empty prompt and those that repeat an earlier row's prompt, judged by the normalised
    text. Row numbers are the lines on which rows start, the header being row 1.

    Raises:
        DataError: The file can't be read as CSV, lacks the column, or has no usable prompt.
    """
    table = read_table(path, {"prompt_column": prompt_column})
    kept, skipped = sift(table.rows, (prompt_column,))
    if not kept:
        raise DataError(
            f"{table.source}: there is no usable prompt ({describe_skipped(skipped)}); "
            f"fill in the column {prompt_column!r} or name another with --prompt_column."
        )
    prompts = []
    for row in kept:
        columns = {name: cell for name, cell in row.cells.items() if name != prompt_column}
        prompts.append(PromptRow(row.cells[prompt_column], columns, row.number))
    return PromptData(table.source, table.sha256, tuple(prompts), skipped)


def load_prompts(
    source: str | Path, *, heldout_fraction: float, seed: int, prompt_column: str = "prompt"
) -> tuple[PromptData, list[PromptRow], list[PromptRow]]:
    """All prompts of ``source``, then the training and the held-out ones.

    A file is split as ``load_preferences`` splits it: with the same fraction and seed, a prompt that is on one side
    there is on the same side here. Built-in data comes split.

    Raises:
        ConfigError: ``heldout_fraction`` isn't in [0, 1).
        DataError: As ``read_prompts``, or ``source`` names built-in data that doesn't exist.
    """
    files = resolve_data(source)
    train = read_prompts(files.train, prompt_column=prompt_column)
    if files.heldout is None:
        return train, *split_by_prompt(train.prompts, heldout_fraction, seed)
    heldout = read_prompts(files.heldout, prompt_column=prompt_column)
    digest = hashlib.sha256((train.sha256 + heldout.sha256).encode()).hexdigest()
    both = PromptData(str(source), digest, train.prompts + heldout.prompts, train.skipped + heldout.skipped)
    return both, list(train.prompts), list(heldout.prompts)


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


def prompt_rows(dataset: Iterable[Any] | None, name: str) -> list[PromptRow]:
    """Rows of a data set in memory: mappings with a ``prompt``, as ``datasets`` gives them, or PromptRows.

    Raises:
        DataError: A row has no text in its column ``prompt``; ``name`` tells which data set it is in.
    """
    rows: list[PromptRow] = []
    for number, row in enumerate(dataset if dataset is not None else []):
        if isinstance(row, PromptRow):
            rows.append(row)
            continue
        prompt = row.get("prompt") if isinstance(row, Mapping) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"Row {number} of {name} has no text in its column 'prompt'.")
        rows.append(PromptRow(prompt, {key: value for key, value in row.items() if key != "prompt"}, number))
    return rows
