"""A cleaned copy of a data file, and a log of every row that differs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

from reinforcepp.commands.lint.check import read_file, to_checked_file
from reinforcepp.commands.lint.damage import clean_text
from reinforcepp.commands.lint.findings import Change
from reinforcepp.commands.lint.rules import contradicting_rows
from reinforcepp.config import ColumnConfig
from reinforcepp.data import UNPAIRED, Row
from reinforcepp.errors import DataError
from reinforcepp.files import whole_file

LOG_SUFFIX = ".log.jsonl"


def log_path(copy: Path) -> Path:
    """Return the path of the log of a cleaned copy."""
    return copy.with_name(copy.name + LOG_SUFFIX)


def write_fixed(data: Path, copy: Path, columns: ColumnConfig) -> list[Change]:
    """Write the cleaned copy of ``data``, in its format, and its log; return the changes in the log.

    In the training texts, wrongly decoded text is repaired and control characters are stripped. Rows are dropped if they
    have an empty text, if chosen equals rejected, if they repeat an earlier row, or if they contradict another row, which
    is dropped, too. The other rows keep their order and their other columns. A CSV copy omits columns without a name and
    the whitespace around cells.

    Raises:
        DataError: No row would be left.
    """
    table, file = read_file(data, columns)
    kept, changes = clean_rows(table.rows, file.columns)
    if not kept:
        raise DataError(
            f"{data}: no row would be left in {copy}, so it wasn't written. Correct the rows or add others."
        )
    rows = [_with_clean_cells(row) for row in _rows_of_file(kept)]
    with whole_file(copy) as output, whole_file(log_path(copy)) as log:
        _write(output, rows, copy.suffix.lower())
        log.writelines(json.dumps(asdict(change), ensure_ascii=False) + "\n" for change in changes)
    return changes


def _rows_of_file(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of the file, in its order; a pair of single answers is two, and an answer can be in several pairs."""
    found = {each.number: each for row in rows for each in (row.answers or (row,))}
    return sorted(found.values(), key=lambda row: row.number) if any(row.answers for row in rows) else list(rows)


def _write(file: TextIO, rows: Sequence[Mapping[str, Any]], suffix: str) -> None:
    if suffix in (".jsonl", ".ndjson"):
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        return
    writer = csv.writer(file, lineterminator="\n", delimiter="\t" if suffix == ".tsv" else ",")
    header = list(rows[0])
    writer.writerow(header)
    writer.writerows([row[name] for name in header] for row in rows)


def _with_clean_cells(row: Row) -> dict[str, Any]:
    """Return the cells of the copy: those of prompt and answers cleaned, the others unchanged."""
    return {name: _clean_cell(cell) if name in row.layout.texts else cell for name, cell in row.cells.items()}


def _clean_cell(cell: Any) -> Any:
    """Return a cell with its text, or the texts of its messages, cleaned."""
    if isinstance(cell, str):
        return clean_text(cell)
    if isinstance(cell, list):
        return [_clean_cell(each) for each in cell]
    if isinstance(cell, dict):
        return {name: _clean_cell(value) for name, value in cell.items()}
    return cell


def clean_rows(rows: Sequence[Row], columns: tuple[str, ...]) -> tuple[list[Row], list[Change]]:
    """Return the rows of the cleaned copy and the changes; cleaning them again changes nothing."""
    cleaned = [replace(row, texts=tuple(map(clean_text, row.texts))) for row in rows]
    file = to_checked_file("", cleaned, columns)
    # Single answers that can't be paired aren't wrong.
    skipped = [each for each in file.skipped if each.reason not in UNPAIRED]
    dropped = {each.row: str(each).partition(": ")[2] for each in skipped}
    for first, second in contradicting_rows(file):
        dropped[first] = f"contradicts row {second}"
        dropped[second] = f"contradicts row {first}"
    changes = []
    for before, after in zip(rows, cleaned, strict=True):
        old = dict(zip(columns, before.texts, strict=True))
        if before.number in dropped:
            changes.append(Change(before.number, "dropped", dropped[before.number], old))
        elif before.texts != after.texts:
            new = dict(zip(columns, after.texts, strict=True))
            different = [name for name in columns if old[name] != new[name]]
            changes.append(
                Change(
                    before.number,
                    "changed",
                    "repaired encoding or stripped control characters",
                    before={name: old[name] for name in different},
                    after={name: new[name] for name in different},
                )
            )
    return [row for row in cleaned if row.number not in dropped], changes
