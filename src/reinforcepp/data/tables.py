"""Readers of Parquet and Arrow files, with the memory they take bounded: a few hundred bytes can stand for gigabytes.

pyarrow is imported only when such a file is read.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from reinforcepp.data.limits import ROW_BYTES, Growth
from reinforcepp.data.readers import CHUNK_BYTES, CHUNK_ROWS, Records
from reinforcepp.errors import DataError, shown

if TYPE_CHECKING:
    import pyarrow

PROMPTS_IN_MESSAGES = {b"reinforcepp": b"prompts in messages"}
"""Metadata of a table whose ``prompt`` is text for people if ``messages`` has the prompt's messages."""
DECODED_ROWS = 32
"""Rows of a Parquet file that are decoded at once: each can repeat a value that the file stores only once."""
_FIX = "If you trust the file, write its rows to a JSONL file and read that."


class _OpenTable(NamedTuple):
    """A file's schema, its batches, and the share of it read after a number of rows."""

    schema: pyarrow.Schema
    batches: Iterator[pyarrow.RecordBatch]
    share: Callable[[int], float]


def read_parquet(path: Path) -> Iterator[Records]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: The file isn't Parquet, is damaged, has no row, or grows too much.
    """
    from pyarrow import parquet

    def open_table(file: BinaryIO, growth: Growth) -> _OpenTable:
        opened = parquet.ParquetFile(file, pre_buffer=False)
        total = opened.metadata.num_rows
        declared = (opened.metadata.row_group(i).total_byte_size for i in range(opened.metadata.num_row_groups))
        growth.check(sum(declared) + ROW_BYTES * total)
        return _OpenTable(opened.schema_arrow, opened.iter_batches(batch_size=DECODED_ROWS), lambda read: read / total)

    return _table_records(path, "Parquet", open_table)


def read_arrow(path: Path) -> Iterator[Records]:
    """Yield the rows of an Arrow file: a stream, as ``datasets`` writes it, or a file with a footer.

    Raises:
        DataError: The file isn't Arrow, is damaged, has no row, or grows too much.
    """
    from pyarrow import ipc

    def open_table(file: BinaryIO, growth: Growth) -> _OpenTable:
        start, size = 8 if file.read(6) == b"ARROW1" else 0, os.fstat(file.fileno()).st_size
        growth.check(_declared_bytes(file, start))
        file.seek(start)  # The footer of a file only repeats what the stream before it says.
        stream = ipc.open_stream(file)
        return _OpenTable(stream.schema, iter(stream), lambda read: file.tell() / size)

    return _table_records(path, "Arrow", open_table)


def _table_records(path: Path, kind: str, open_table: Callable[[BinaryIO, Growth], _OpenTable]) -> Iterator[Records]:
    with open(path, "rb") as file:
        growth = Growth(path, os.fstat(file.fileno()).st_size, _FIX)
        with _intact(path, kind):
            table = open_table(file, growth)
        names = tuple(table.schema.names)
        repeated = [name for name, number in Counter(names).items() if number > 1]
        if repeated:
            raise DataError(f"{path}: two columns are called {shown(repeated[0])}. Rename or remove one of them.")
        has_messages = PROMPTS_IN_MESSAGES.items() <= (table.schema.metadata or {}).items()
        number = 1
        for rows in _chunks(path, kind, table, growth):
            if has_messages:
                rows = [{**row, "prompt": row.get("messages") or row.get("prompt")} for row in rows]
            yield Records(names, list(enumerate(rows, number)), share=table.share(number - 1 + len(rows)))
            number += len(rows)
        if number == 1:
            raise DataError(f"{path}: the file has no row. Add data to the file.")


def _chunks(path: Path, kind: str, table: _OpenTable, growth: Growth) -> Iterator[list[dict[str, Any]]]:
    """Yield rows in lists of up to ``CHUNK_ROWS``, fewer if they are long."""
    rows, num_bytes = list[dict[str, Any]](), 0
    while True:
        with _intact(path, kind):
            batch = next(table.batches, None)
            if batch is not None:
                # Checks offsets and UTF-8, too, so that no read below leaves its buffer.
                batch.validate(full=True)
        if batch is None:
            break
        growth.add(batch.nbytes + ROW_BYTES * batch.num_rows)
        for start in range(0, batch.num_rows if table.schema.names else 0, CHUNK_ROWS):
            part = batch.slice(start, CHUNK_ROWS)
            rows += _table_cells(path, part)
            num_bytes += part.nbytes
            if len(rows) >= CHUNK_ROWS or num_bytes >= CHUNK_BYTES:
                yield rows
                rows, num_bytes = [], 0
    if rows:
        yield rows


def _table_cells(path: Path, batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    names, columns = batch.schema.names, []
    for name, column in zip(names, batch.columns, strict=True):
        try:
            columns.append(_cells(column))
        except _damage_errors() as error:
            raise DataError(
                f"{path}: the column {shown(name)} ({str(column.type)[:200]}) can't be read ({_reason(error)}). "
                "Remove it, or write it as text."
            ) from error
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _cells(column: pyarrow.Array) -> list[Any]:
    """Return the values of a column; those of a dictionary are shared by all rows that refer to them."""
    from pyarrow import types

    if not types.is_dictionary(column.type):
        return list(column.to_pylist())
    used = column.indices.unique().drop_null()
    values = dict(zip(used.to_pylist(), column.dictionary.take(used).to_pylist(), strict=True))
    return [values.get(index) for index in column.indices.to_pylist()]


# --- Arrow's messages -------------------------------------------------------------------------------------------------
# Each message of a stream has metadata, a FlatBuffers table, and a body of buffers. A compressed buffer begins with its
# uncompressed length, which Arrow allocates at once, for all buffers of a batch.
# https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc

_CONTINUATION = 0xFFFFFFFF
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_MAX_METADATA_BYTES = 64 << 20


def _declared_bytes(file: BinaryIO, start: int) -> int:
    """Return the uncompressed size of the compressed buffers in the stream that begins at ``start``."""
    total, position = 0, start
    while True:
        file.seek(position)
        head = file.read(8)
        if len(head) < 8:
            return total
        size, position = struct.unpack("<i", head[4:])[0], position + 8
        if struct.unpack("<I", head[:4])[0] != _CONTINUATION:  # Arrow before 0.15
            size, position = struct.unpack("<i", head[:4])[0], position - 4
        if not 0 < size <= _MAX_METADATA_BYTES:
            return total
        file.seek(position)
        message = _FlatTable.root(file.read(size))
        position += size
        kind, batch, body_length = message.number(1, "<B"), message.table(2), message.number(3, "<q")
        if kind == _DICTIONARY_BATCH and batch is not None:
            batch = batch.table(1)
        if kind in (_DICTIONARY_BATCH, _RECORD_BATCH) and batch is not None and batch.table(3) is not None:
            for offset, length in batch.pairs(2):
                if length >= 8:
                    file.seek(position + offset)
                    total += max(0, struct.unpack("<q", file.read(8))[0])
        if body_length < 0:
            raise ValueError("a message with a negative length")
        position += body_length


class _FlatTable(NamedTuple):
    """A table of a FlatBuffers buffer, which begins at ``start``. Fields are numbered."""

    buffer: bytes
    start: int

    @classmethod
    def root(cls, buffer: bytes) -> _FlatTable:
        """Return the outermost table."""
        return cls(buffer, _read("<I", buffer, 0))

    def number(self, field: int, form: str) -> int:
        """Return an integer; 0 if the field is missing."""
        place = self._place(field)
        return _read(form, self.buffer, place) if place else 0

    def table(self, field: int) -> _FlatTable | None:
        """Return a table, if the field has one."""
        place = self._place(field)
        return _FlatTable(self.buffer, place + _read("<I", self.buffer, place)) if place else None

    def pairs(self, field: int) -> Iterator[tuple[int, int]]:
        """Yield the items of a vector of pairs of 64-bit integers."""
        place = self._place(field)
        if place:
            place += _read("<I", self.buffer, place)
            for i in range(_read("<I", self.buffer, place)):
                yield _read("<q", self.buffer, place + 4 + 16 * i), _read("<q", self.buffer, place + 12 + 16 * i)

    def _place(self, field: int) -> int:
        """Return the position of a field's value; 0 if the field is missing."""
        offsets = self.start - _read("<i", self.buffer, self.start)
        entry = 4 + 2 * field
        offset = _read("<H", self.buffer, offsets + entry) if entry < _read("<H", self.buffer, offsets) else 0
        return self.start + offset if offset else 0


def _read(form: str, buffer: bytes, position: int) -> int:
    """Return the integer at ``position``; a position outside of ``buffer`` is an error."""
    if not 0 <= position <= len(buffer) - struct.calcsize(form):
        raise ValueError("damaged metadata of a message")
    number: int = struct.unpack_from(form, buffer, position)[0]
    return number


# --- damage -----------------------------------------------------------------------------------------------------------


@contextmanager
def _intact(path: Path, kind: str) -> Iterator[None]:
    """Turn what pyarrow raises for a damaged file into a DataError."""
    try:
        yield
    except _damage_errors() as error:
        raise DataError(f"{path}: not a valid {kind} file ({_reason(error)}). Write or copy it again.") from error


def _damage_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that pyarrow raises for damaged files; which one depends on the damaged part."""
    import pyarrow

    return pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError, struct.error


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split())[:120] or type(error).__name__).rstrip(".")
