"""Parquet, and the Arrow files that ``datasets`` writes: a row's number is its place, from 1. Loads pyarrow when called."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from reinforcepp.data._text import PIECE_ROWS, Records
from reinforcepp.errors import DataError

if TYPE_CHECKING:
    import pyarrow


class Opened(NamedTuple):
    """A file's schema, its batches, and how much of it has been read with so many rows."""

    schema: pyarrow.Schema
    batches: Iterator[pyarrow.RecordBatch]
    share: Callable[[int], float]


def read_parquet(path: Path) -> Iterator[Records]:
    """The rows of a Parquet file.

    Raises:
        DataError: It is none, is damaged, or has no row.
    """
    from pyarrow import parquet

    def batches(file: BinaryIO) -> Opened:
        opened = parquet.ParquetFile(file, pre_buffer=False)
        number = opened.metadata.num_rows
        return Opened(opened.schema_arrow, opened.iter_batches(batch_size=PIECE_ROWS), lambda read: read / number)

    return _records(path, "Parquet", batches)


def read_arrow(path: Path) -> Iterator[Records]:
    """The rows of an Arrow file, written as a stream, as ``datasets`` does, or with a footer.

    Raises:
        DataError: It is none, is damaged, or has no row.
    """
    from pyarrow import ipc

    def batches(file: BinaryIO) -> Opened:
        footed, size = file.read(6) == b"ARROW1", os.fstat(file.fileno()).st_size
        file.seek(0)
        if not footed:
            stream = ipc.open_stream(file)
            return Opened(stream.schema, iter(stream), lambda read: file.tell() / size)
        opened = ipc.open_file(file)
        places = range(opened.num_record_batches)
        return Opened(opened.schema, map(opened.get_batch, places), lambda read: file.tell() / size)

    return _records(path, "Arrow", batches)


def _records(path: Path, kind: str, open_batches: Callable[[BinaryIO], Opened]) -> Iterator[Records]:
    with open(path, "rb") as file:
        with _readable(path, kind):
            opened = open_batches(file)
        names = tuple(opened.schema.names)
        repeated = [name for name, number in Counter(names).items() if number > 1]
        if repeated:
            raise DataError(f"{path}: there are two columns {repeated[0]!r}; rename or remove one of them.")
        number = 1
        while True:
            with _readable(path, kind):
                batch = next(opened.batches, None)
                if batch is not None:
                    batch.validate(full=True)  # offsets and UTF-8 too: nothing below looks outside of its buffer
            if batch is None:
                break
            for start in range(0, batch.num_rows if names else 0, PIECE_ROWS):
                cells = _cells(path, batch.slice(start, PIECE_ROWS))
                rows = list(enumerate(cells, number))
                number += len(cells)
                yield Records(names, rows, share=opened.share(number - 1))
        if number == 1:
            raise DataError(f"{path}: there is no row in it; add data to the file.")


def _cells(path: Path, batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    names, columns = batch.schema.names, []
    for name, column in zip(names, batch.columns, strict=True):
        try:
            columns.append(column.to_pylist())
        except _unreadable() as error:
            raise DataError(
                f"{path}: the column {name!r} ({column.type}) can't be read ({_first_line(error)}); "
                "remove it, or write it as text."
            ) from error
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


@contextmanager
def _readable(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except _unreadable() as error:
        raise DataError(
            f"{path}: this is no {kind} file, or a damaged one ({_first_line(error)}); write or copy it again."
        ) from error


def _unreadable() -> tuple[type[Exception], ...]:
    """What pyarrow raises for a damaged file depends on where the damage is."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError


def _first_line(error: BaseException) -> str:
    return (" ".join(str(error).split())[:120] or type(error).__name__).rstrip(".")
