"""Parquet, and the Arrow files that ``datasets`` writes: a row's number is its place, from 1. Loads pyarrow when called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reinforcepp.data._text import Records
from reinforcepp.errors import DataError


def read_parquet(path: Path, raw: bytes) -> Records:
    """The rows of a Parquet file.

    Raises:
        DataError: It is none, is damaged, or has no row.
    """
    from pyarrow import BufferReader, parquet

    return _records(path, "Parquet", lambda: parquet.ParquetFile(BufferReader(raw)).read())


def read_arrow(path: Path, raw: bytes) -> Records:
    """The rows of an Arrow file, written as a stream, as ``datasets`` does, or with a footer.

    Raises:
        DataError: It is none, is damaged, or has no row.
    """
    from pyarrow import BufferReader, ipc

    open_file = ipc.open_file if raw.startswith(b"ARROW1") else ipc.open_stream
    return _records(path, "Arrow", lambda: open_file(BufferReader(raw)).read_all())


def _records(path: Path, kind: str, read: Callable[[], Any]) -> Records:
    import pyarrow

    # What pyarrow raises for a damaged file depends on where the damage is.
    unreadable = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError)
    try:
        table = read()
        table.validate(full=True)  # offsets and UTF-8 too: nothing below looks outside of its buffer
    except unreadable as error:
        raise DataError(
            f"{path}: this is no {kind} file, or a damaged one ({_first_line(error)}); write or copy it again."
        ) from error
    names = tuple(table.column_names)
    repeated = [name for name, number in Counter(names).items() if number > 1]
    if repeated:
        raise DataError(f"{path}: there are two columns {repeated[0]!r}; rename or remove one of them.")
    if not table.num_rows or not names:
        raise DataError(f"{path}: there is no row in it; add data to the file.")
    columns = []
    for name in names:
        try:
            columns.append(table.column(name).to_pylist())
        except unreadable as error:
            raise DataError(
                f"{path}: the column {name!r} ({table.schema.field(name).type}) can't be read ({_first_line(error)}); "
                "remove it, or write it as text."
            ) from error
    return Records(
        names, [(i, dict(zip(names, cells, strict=True))) for i, cells in enumerate(zip(*columns, strict=True), 1)]
    )


def _first_line(error: BaseException) -> str:
    return (" ".join(str(error).split())[:120] or type(error).__name__).rstrip(".")
