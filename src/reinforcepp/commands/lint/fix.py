"""A cleaned copy of a data file, and a log of every row in which it differs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TextIO

from reinforcepp.commands.lint.check import read_sheet, sheet_of
from reinforcepp.commands.lint.damage import cleaned
from reinforcepp.commands.lint.rules import contradicting
from reinforcepp.config import Columns
from reinforcepp.data import Row
from reinforcepp.errors import DataError
from reinforcepp.files import whole_file
from reinforcepp.types import RowId

LOG_SUFFIX = ".log.jsonl"


@dataclass(frozen=True)
class Change:
    """One row of the original that the copy lacks, or has with other texts; cells that stay aren't named in ``after``."""

    row: RowId
    action: Literal["changed", "dropped"]
    reason: str
    before: Mapping[str, str]
    after: Mapping[str, str] | None = None


def log_path(copy: Path) -> Path:
    """Where the log of a cleaned copy goes."""
    return copy.with_name(copy.name + LOG_SUFFIX)


def write_fixed(data: Path, copy: Path, columns: Columns) -> list[Change]:
    """Write the cleaned copy of ``data``, in its format, and its log; returns what the log holds.

    Text that was read with the wrong encoding is mended and control characters are stripped, in the columns that are
    trained on. Then rows are dropped that are empty, have chosen equal to rejected, repeat an earlier one, or
    contradict another one, and with that the other one. The rest stays in its order, with its other columns; in a CSV
    file, columns without a name are left out, and the space around a cell is.

    Raises:
        DataError: Nothing would be left.
    """
    table, sheet = read_sheet(data, columns)
    kept, changes = clean(table.rows, sheet.columns)
    if not kept:
        raise DataError(f"{data}: no row would be left in {copy}, so it isn't written; correct the rows or add others.")
    rows = [_with_clean_cells(row) for row in kept]
    with whole_file(copy) as file, whole_file(log_path(copy)) as log:
        _write(file, rows, copy.suffix.lower())
        log.writelines(json.dumps(asdict(change), ensure_ascii=False) + "\n" for change in changes)
    return changes


def _write(file: TextIO, rows: Sequence[Mapping[str, Any]], suffix: str) -> None:
    if suffix in (".jsonl", ".ndjson"):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    writer = csv.writer(file, lineterminator="\n", delimiter="\t" if suffix == ".tsv" else ",")
    header = list(rows[0])
    writer.writerow(header)
    writer.writerows([row[name] for name in header] for row in rows)


def _with_clean_cells(row: Row) -> dict[str, Any]:
    """The cells of the copy, those clean that are trained on: the prompt's, where it has its own, and the answers'."""
    trained_on = {row.layout.prompt, *(row.layout.answers or ())}
    return {name: _cleaned_within(cell) if name in trained_on else cell for name, cell in row.cells.items()}


def _cleaned_within(cell: Any) -> Any:
    """The texts in a cell cleaned: its own, or those of its messages."""
    if isinstance(cell, str):
        return cleaned(cell)
    if isinstance(cell, list):
        return [_cleaned_within(each) for each in cell]
    if isinstance(cell, dict):
        return {name: _cleaned_within(value) for name, value in cell.items()}
    return cell


def clean(rows: Sequence[Row], columns: tuple[str, ...]) -> tuple[list[Row], list[Change]]:
    """The rows of the cleaned copy, and what is different about them; a pure function that has nothing to do twice."""
    mended = [replace(row, texts=tuple(map(cleaned, row.texts))) for row in rows]
    sheet = sheet_of("", mended, columns)
    dropped = {each.row: str(each).partition(": ")[2] for each in sheet.skipped}
    for first, second in contradicting(sheet):
        dropped[first] = f"contradicts row {second}"
        dropped[second] = f"contradicts row {first}"
    changes = []
    for before, after in zip(rows, mended, strict=True):
        texts = dict(zip(columns, before.texts, strict=True))
        if before.number in dropped:
            changes.append(Change(before.number, "dropped", dropped[before.number], texts))
        elif before.texts != after.texts:
            better = dict(zip(columns, after.texts, strict=True))
            different = [name for name in columns if texts[name] != better[name]]
            changes.append(
                Change(
                    before.number,
                    "changed",
                    "encoding mended or control characters stripped",
                    before={name: texts[name] for name in different},
                    after={name: better[name] for name in different},
                )
            )
    return [row for row in mended if row.number not in dropped], changes
