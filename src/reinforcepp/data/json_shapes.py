"""The rows of a JSON file that is one object: rows under a key, columns as lists, or a pandas table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reinforcepp.errors import DataError


def rows_of_object(path: object, value: Mapping[str, Any]) -> tuple[list[Any], tuple[str, ...]]:
    """Return the rows of an object, and remarks for the user. Any other object is a row itself.

    Raises:
        DataError: Several keys hold rows.
    """
    nested = {key: cell for key, cell in value.items() if _are_rows(cell)}
    if nested:
        if len(nested) > 1 and "train" not in nested:
            names = ", ".join(map(repr, nested))
            raise DataError(f"{path}: several keys hold rows: {names}. Write each list to a separate file.")
        key = "train" if len(nested) > 1 else next(iter(nested))
        unused = [repr(other) for other in nested if other != key]
        more = f", not those in {', '.join(unused)}" if unused else ""
        return nested[key], (f"rows from the key {key!r}{more}",)
    cells = list(value.values())
    columns, data = value.get("columns"), value.get("data")
    if isinstance(columns, list) and isinstance(data, list) and all(isinstance(row, list) for row in data):
        return [dict(zip(columns, row, strict=False)) for row in data], ("a table with columns and data",)
    if len(cells) > 1 and all(isinstance(cell, list) and not _are_messages(cell) for cell in cells):
        if len({len(cell) for cell in cells}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True)], ("one list per column",)
    elif len(cells) > 1 and all(isinstance(cell, dict) and cell.keys() == cells[0].keys() for cell in cells):
        if all(key.isdecimal() for key in value):
            return cells, ("one object per row number",)
        if all(str(key).isdecimal() for key in cells[0]):
            return [{name: cell[row] for name, cell in value.items()} for row in cells[0]], ("one object per column",)
    return [value], ()


def _are_rows(cell: Any) -> bool:
    return (
        isinstance(cell, list) and bool(cell) and all(isinstance(row, dict) for row in cell) and not _are_messages(cell)
    )


def _are_messages(cell: list[Any]) -> bool:
    return bool(cell) and all(isinstance(each, dict) and {"role", "from"} & each.keys() for each in cell)
