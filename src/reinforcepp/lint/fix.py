"""A cleaned copy of a data file, and a log of every row in which it differs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from reinforcepp.config import Columns
from reinforcepp.data import Row
from reinforcepp.errors import DataError
from reinforcepp.files import whole_file
from reinforcepp.lint.check import read_sheet, sheet_of
from reinforcepp.lint.damage import cleaned
from reinforcepp.lint.rules import contradicting

LOG_SUFFIX = ".log.jsonl"


@dataclass(frozen=True)
class Change:
    """One row of the original that the copy lacks, or has with other texts; cells that stay aren't named in ``after``."""

    row: int
    action: Literal["changed", "dropped"]
    reason: str
    before: Mapping[str, str]
    after: Mapping[str, str] | None = None


def log_path(copy: Path) -> Path:
    """Where the log of a cleaned copy goes."""
    return copy.with_name(copy.name + LOG_SUFFIX)


def write_fixed(data: Path, copy: Path, columns: Columns) -> list[Change]:
    """Write the cleaned copy of ``data`` and its log; returns what the log holds.

    Text that was read with the wrong encoding is mended and control characters are stripped, in the columns that are
    trained on. Then rows are dropped that are empty, have chosen equal to rejected, repeat an earlier one, or
    contradict another one, and with that the other one. The rest stays in its order, with its other columns; columns
    without a name are left out, and the space around a cell is.

    Raises:
        DataError: Nothing would be left.
    """
    table, sheet = read_sheet(data, columns)
    kept, changes = clean(table.rows, sheet.columns)
    if not kept:
        raise DataError(f"{data}: no row would be left in {copy}, so it isn't written; correct the rows or add others.")
    header = list(table.rows[0].cells)
    with whole_file(copy) as file, whole_file(log_path(copy)) as log:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([row.cells[name] for name in header] for row in kept)
        log.writelines(json.dumps(asdict(change), ensure_ascii=False) + "\n" for change in changes)
    return changes


def clean(rows: tuple[Row, ...], columns: tuple[str, ...]) -> tuple[list[Row], list[Change]]:
    """The rows of the cleaned copy, and what is different about them; a pure function that has nothing to do twice."""
    mended = [Row(row.number, dict(row.cells) | {name: cleaned(row.cells[name]) for name in columns}) for row in rows]
    sheet = sheet_of("", mended, columns)
    dropped = {each.row: str(each).partition(": ")[2] for each in sheet.skipped}
    for first, second in contradicting(sheet):
        dropped[first] = f"contradicts row {second}"
        dropped[second] = f"contradicts row {first}"
    changes = []
    for before, after in zip(rows, mended, strict=True):
        if before.number in dropped:
            texts = {name: before.cells[name] for name in columns}
            changes.append(Change(before.number, "dropped", dropped[before.number], texts))
        elif before.cells != after.cells:
            different = [name for name in columns if before.cells[name] != after.cells[name]]
            changes.append(
                Change(
                    before.number,
                    "changed",
                    "encoding mended or control characters stripped",
                    before={name: before.cells[name] for name in different},
                    after={name: after.cells[name] for name in different},
                )
            )
    return [row for row in mended if row.number not in dropped], changes
