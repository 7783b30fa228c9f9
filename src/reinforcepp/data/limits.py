"""Limits that no honest data file meets: how much a file can grow when it is read, how deep values nest, how many columns."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reinforcepp.errors import DataError

FREE_BYTES = 256 << 20
MAX_GROWTH = 500
ROW_BYTES = 200
"""Memory of a row in addition to the bytes of its cells."""
MAX_COLUMNS = 10_000
MAX_NESTING = 100


class Growth:
    """Stops the reading of a compressed or columnar file whose contents grow far beyond its size.

    The first ``FREE_BYTES`` are always allowed, and then ``MAX_GROWTH`` times the size of the file.

    Args:
        path: The file, for messages.
        file_bytes: Its size.
        fix: How to read the file nevertheless, as a sentence.
    """

    def __init__(self, path: Path, file_bytes: int, fix: str) -> None:
        self._path, self._file_bytes, self._fix = path, file_bytes, fix
        self._limit = max(FREE_BYTES, MAX_GROWTH * file_bytes)
        self._read = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that were read; raises what :meth:`check` raises."""
        self._read += num_bytes
        self.check(self._read)

    def check(self, total: int) -> None:
        """Check the size of the contents, read or declared.

        Raises:
            DataError: The limit is exceeded.
        """
        if total > self._limit:
            raise DataError(
                f"{self._path}: {_size(self._file_bytes)} grow to more than {_size(self._limit)} when the file is read, "
                f"{self._limit // max(1, self._file_bytes):,} times its size, as if to fill the memory. {self._fix}"
            )


def check_columns(path: Path, names: Iterable[str]) -> None:
    """Raise a DataError if a file has more than ``MAX_COLUMNS`` columns."""
    number = len(list(names))
    if number > MAX_COLUMNS:
        raise DataError(
            f"{path}: {number:,} columns, but at most {MAX_COLUMNS:,} can be read. Write only the columns of prompts, "
            "answers and rewards."
        )


def check_nesting(value: Any, brackets: int) -> None:
    """Check the depth of a JSON value, which Python functions such as ``repr`` can't handle if it is too deep.

    Args:
        value: The value.
        brackets: Number of opening brackets in its text, which spares the search in most values.

    Raises:
        RecursionError: Lists or objects are nested more than ``MAX_NESTING`` deep.
    """
    level = [value] if brackets > MAX_NESTING else []
    for _ in range(MAX_NESTING):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if isinstance(child, dict | list)]
        if not level:
            return
    raise RecursionError("lists or objects are nested too deeply")


def parse_json(text: str) -> Any:
    """Return the value of JSON text in a cell.

    Raises:
        ValueError: The text isn't JSON, or is nested too deeply.
    """
    try:
        value = json.loads(text)
        check_nesting(value, text.count("[") + text.count("{"))
    except RecursionError as error:
        raise ValueError("lists or objects are nested too deeply") from error
    return value


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"
