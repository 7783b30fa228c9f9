"""Parquet, and the Arrow files that ``datasets`` writes: a row's number is its place, from 1. Loads pyarrow when called."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from reinforcepp.data._text import PIECE_ROWS, Records
from reinforcepp.errors import DataError

if TYPE_CHECKING:
    import pyarrow


def read_parquet(path: Path) -> Iterator[Records]:
    """The rows of a Parquet file.

    Raises:
        DataError: It is none, is damaged, or has no row.
    """
    from pyarrow import parquet

    def batches(file: BinaryIO) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
        opened = parquet.ParquetFile(file, pre_buffer=False)
        return opened.schema_arrow, opened.iter_batches(batch_size=PIECE_ROWS)

    return _records(path, "Parquet", batches)


def read_arrow(path: Path) -> Iterator[Records]:
    """The rows of an Arrow file, written as a stream, as ``datasets`` does, or with a footer.

    Raises:
        DataError: It is none, is damaged, or has no row.
    """
    from pyarrow import ipc

    def batches(file: BinaryIO) -> tuple[pyarrow.Schema, Iterator[pyarrow.RecordBatch]]:
        footed = file.read(6) == b"ARROW1"
        file.seek(0)
        if not footed:
            stream = ipc.open_stream(file)
            return stream.schema, iter(stream)
        opened = ipc.open_file(file)
        return opened.schema, map(opened.get_batch, range(opened.num_record_batches))

    return _records(path, "Arrow", batches)


def _records(path: Path, kind: str, batches: Callable[[BinaryIO], Any]) -> Iterator[Records]:
    with open(path, "rb") as file:
        with _readable(path, kind):
            schema, pieces = batches(file)
        names = tuple(schema.names)
        repeated = [name for name, number in Counter(names).items() if number > 1]
        if repeated:
            raise DataError(f"{path}: there are two columns {repeated[0]!r}; rename or remove one of them.")
        number = 1
        while True:
            with _readable(path, kind):
                batch = next(pieces, None)
                if batch is not None:
                    batch.validate(full=True)  # offsets and UTF-8 too: nothing below looks outside of its buffer
            if batch is None:
                break
            for start in range(0, batch.num_rows if names else 0, PIECE_ROWS):
                cells = _cells(path, batch.slice(start, PIECE_ROWS))
                yield Records(names, list(enumerate(cells, number)))
                number += len(cells)
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
