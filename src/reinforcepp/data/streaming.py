"""Data larger than memory: one pass over the files checks every row and writes the usable ones to disk.

Memory holds about forty bytes per row: hashes stand in for texts. Skipped rows, split and weights are those of data in
memory.

Rows are read back with ``pread`` rather than memory-mapped, because pages of a mapping count as the process's memory: with
a mapped Arrow file, peak memory grew by the size of the data once every row had been read.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from reinforcepp.data.columns import ColumnLayout, ColumnNames, check_distinct, find_columns
from reinforcepp.data.rows import (
    Row,
    Skipped,
    check_bad_rows,
    check_fraction,
    identity,
    make_rows,
    normalize,
    notes_on,
    num_heldout,
    prompt_rank,
    repetitions,
    row_problem,
    text_columns,
)
from reinforcepp.data.sources import DataPart, RowSource, combined_digest, display_name, find_parts
from reinforcepp.data.unpaired import pair_answers
from reinforcepp.errors import DataError, option
from reinforcepp.types import RowId

T = TypeVar("T")
Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]
OnProgress = Callable[[float], None]
"""Called with the share of the files that has been read."""


class RowStore:
    """Lists of plain values in an unnamed temporary file, which the system removes when the process ends.

    The environment variable TMPDIR sets the folder.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="reinforcepp-")  # noqa: SIM115  (open as long as its rows are used)
        self._starts = array("Q", [0])
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._starts) - 1

    def append(self, values: list[Any], where: str) -> None:
        """Add a row; ``where`` names it in messages.

        Raises:
            DataError: The row holds a value that JSON can't represent, or the disk is full.
        """
        try:
            line = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
            self._file.write(line)
        except TypeError as error:
            raise DataError(
                f"{where}: {error}, so the row can't be streamed. Write that column as text, or omit {option('streaming')}."
            ) from error
        except OSError as error:
            raise DataError(
                f"{where}: {error.strerror} in {tempfile.gettempdir()}, where {option('streaming')} stores rows. "
                "Free some space there, or set TMPDIR to a folder with more."
            ) from error
        self._digest.update(line)
        self._starts.append(self._starts[-1] + len(line))

    def finish(self) -> str:
        """Flush all rows to disk and return their hash."""
        self._file.flush()
        return self._digest.hexdigest()

    def read(self, index: int) -> list[Any]:
        """Return a row."""
        start = self._starts[index]
        line = os.pread(self._file.fileno(), self._starts[index + 1] - start, start)
        values: list[Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        return values


class RowShelf:
    """Single answers that wait to be paired, in a store; their cells aren't kept."""

    def __init__(self, source: RowSource) -> None:
        self._store, self._layouts, self._source = RowStore(), list[ColumnLayout](), source
        self._flushed = False

    def append(self, row: Row) -> None:
        """Add a row."""
        if row.layout not in self._layouts[-1:]:
            self._layouts.append(row.layout)
        values = [row.number, row.texts, row.weight, row.messages, row.chat_template_kwargs]
        self._store.append([len(self._layouts) - 1, *values], f"{self._source}:{row.number}")

    def __getitem__(self, index: int) -> Row:
        """Return a row."""
        if not self._flushed:
            self._store.finish()
            self._flushed = True
        layout, number, texts, weight, messages, variables = self._store.read(index)
        more = {"messages": tuple(messages), "chat_template_kwargs": variables}
        return Row(number, {}, tuple(texts), self._layouts[layout], weight=weight, **more)


class DiskRows(Sequence[T], Generic[T]):
    """Rows of a store in the order of ``indices``; ``make`` builds each one from its values on access.

    ``digest`` identifies their contents.
    """

    def __init__(self, store: RowStore, indices: Indices, make: Callable[[list[Any]], T], digest: str) -> None:
        self._store, self._indices, self._make = store, indices, make
        self.digest = hashlib.sha256(digest.encode() + indices.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> DiskRows[T]: ...

    def __getitem__(self, index: int | slice) -> T | DiskRows[T]:
        """Return one row, or a slice whose rows stay on disk."""
        if isinstance(index, slice):
            return self._select(self._indices[index])
        return self._make(self._store.read(int(self._indices[index])))

    def without(self, indices: Sequence[int]) -> DiskRows[T]:
        """Return all rows except those at ``indices``."""
        return self._select(np.delete(self._indices, np.asarray(indices, np.int64)))

    def spread(self, number: int) -> DiskRows[T]:
        """Return up to ``number`` rows, evenly spread."""
        if number >= len(self):
            return self
        return self._select(self._indices[np.linspace(0, len(self) - 1, number).astype(int)])

    def _select(self, indices: Indices) -> DiskRows[T]:
        return DiskRows(self._store, indices, self._make, self.digest)


@dataclass(frozen=True)
class StreamedTable:
    """Data that was read in one pass.

    Attributes:
        source: Name for messages.
        sha256: Hash of the files, as in ``Table``.
        columns: Names of the texts of a row.
        store: Rows with neither an empty text nor a problem; they can still be duplicates.
        digest: Hash of the store.
        kept: Indices of the usable rows in the store.
        texts: Hash of the texts, per row of the store.
        swapped: Hash of the texts with chosen and rejected swapped, per row of the store.
        prompts: Hash of the prompt, per row of the store.
        weights: Weight, per row of the store.
        skipped: Skipped rows.
        notes: Remarks for the user on how the data was read.
    """

    source: str
    sha256: str
    columns: tuple[str, ...]
    store: RowStore
    digest: str
    kept: Indices
    texts: Hashes
    swapped: Hashes
    prompts: Hashes
    weights: NDArray[np.float64]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    def rows(self, indices: Indices, make: Callable[[list[Any]], T]) -> DiskRows[T]:
        """Return the rows of the store at ``indices``."""
        return DiskRows(self.store, indices, make, self.digest)

    def split_rows(
        self, make: Callable[[list[Any]], T], heldout_fraction: float, seed: int
    ) -> tuple[DiskRows[T], DiskRows[T], DiskRows[T]]:
        """Return all usable rows, those for training, repeated by weight, and the held-out ones."""
        train, heldout = self.split(heldout_fraction, seed)
        return self.rows(self.kept, make), self.rows(train, make), self.rows(heldout, make)

    def split(self, heldout_fraction: float, seed: int) -> tuple[Indices, Indices]:
        """Return indices for training, repeated by weight, and held-out indices; see ``split_by_prompt``."""
        check_fraction(heldout_fraction)
        prompts = self.prompts[self.kept]
        distinct = np.unique(prompts)
        heldout = np.isin(prompts, distinct[: num_heldout(heldout_fraction, len(distinct))])
        return self._weighted(self.kept[~heldout], seed), self.kept[heldout]

    def contradictions(self) -> tuple[tuple[RowId, RowId], ...]:
        """Return the row numbers of each two pairs that prefer the same two answers in opposite ways."""
        texts, swapped = self.texts[self.kept], self.swapped[self.kept]
        later = np.flatnonzero(np.isin(swapped, texts))
        order = np.argsort(texts)
        earlier = order[np.searchsorted(texts, swapped[later], sorter=order)]
        found = [(int(a), int(b)) for a, b in zip(earlier, later, strict=True) if a < b]
        return tuple((_row_number(self.store, self.kept[a]), _row_number(self.store, self.kept[b])) for a, b in found)

    def _weighted(self, indices: Indices, seed: int) -> Indices:
        weights = self.weights[indices]
        if (weights == 1).all():
            return indices
        counts = []
        for index, weight in zip(indices, weights, strict=True):
            row, (prompt, *_), *_ = self.store.read(index)
            counts.append(repetitions(float(weight), f"{row}:{prompt}", seed))
        return np.repeat(indices, counts)


def stream_table(
    source: RowSource,
    names: ColumnNames,
    *,
    pairs: bool,
    seed: int,
    find_problem: Callable[[Sequence[str], Sequence[str]], str | None],
    values: Callable[[Row], list[Any]],
    on_progress: OnProgress,
    max_bad_rows: float,
) -> StreamedTable:
    """Read ``source`` in one pass.

    Args:
        source: As for ``read_table``.
        names: Column names.
        pairs: Whether to read answers.
        seed: Seed of the split, for which the prompts are hashed.
        find_problem: Given the names of a row's texts and the normalized texts, returns what is wrong, if anything.
        values: Returns the values to store for a usable row in addition to its number and texts.
        on_progress: Called with the share of the files that has been read.
        max_bad_rows: As for ``check_bad_rows``.

    Raises:
        ConfigError: As ``read_table``.
        DataError: As ``read_table``, or a row can't be stored.
    """
    if pairs:
        check_distinct(names)
    parts = find_parts(source)
    store, conversions, layouts = RowStore(), Counter[str](), list[ColumnLayout]()
    texts, swapped, prompts, weights = array("Q"), array("Q"), array("Q"), array("d")
    skipped, unreadable = list[Skipped](), list[Row]()
    columns: tuple[str, ...] = ()
    total = Counter[str]()
    rows = _stream_rows(parts, names, pairs, conversions, total, on_progress)
    for row in pair_answers(rows, RowShelf(source)):
        if not layouts or layouts[-1] is not row.layout:
            layouts.append(row.layout)
        columns = columns or text_columns(row.layout, names, pairs)
        normalized = tuple(map(normalize, row.texts))
        reason = row_problem(row, normalized, columns) or find_problem(columns, normalized)
        if reason:
            skipped.append(Skipped(row.number, reason))
            unreadable += [row] if row.unreadable else []
            continue
        store.append([row.number, row.texts, *values(row)], f"{source}:{row.number}")
        texts.append(_hash(identity(normalized, row.chat_template_kwargs)))
        swapped.append(_hash(identity((normalized[0], *normalized[:0:-1]), row.chat_template_kwargs)))
        prompts.append(int.from_bytes(prompt_rank(seed, normalized[0])[:8], "big"))
        weights.append(row.weight)
    name = display_name(source, parts)
    check_bad_rows(name, unreadable, total.total(), max_bad_rows)
    digest = store.finish()
    hashes = np.frombuffer(texts, dtype=np.uint64)
    kept, repeated = _first_occurrences(hashes)
    skipped += [
        Skipped(_row_number(store, index), "duplicate", duplicate_of=_row_number(store, first))
        for index, first in repeated
    ]
    return StreamedTable(
        source=name,
        sha256=combined_digest(parts),
        columns=columns or names[:3],
        store=store,
        digest=digest,
        kept=kept,
        texts=hashes,
        swapped=np.frombuffer(swapped, dtype=np.uint64),
        prompts=np.frombuffer(prompts, dtype=np.uint64),
        weights=np.frombuffer(weights, dtype=np.float64),
        skipped=tuple(skipped),
        notes=tuple(notes_on(parts, layouts, conversions)),
    )


def _stream_rows(
    parts: Sequence[DataPart],
    names: ColumnNames,
    pairs: bool,
    conversions: Counter[str],
    total: Counter[str],
    on_progress: OnProgress,
) -> Iterator[Row]:
    """Yield all rows and count them in ``total``; the first chunk of a file decides on its columns."""
    sizes = [part.size() for part in parts]
    done = 0.0
    for part, size in zip(parts, sizes, strict=True):
        layout = None
        for records in part.chunks():
            layout = layout or find_columns(part.path, records, names, pairs)
            total["rows"] += len(records.rows)
            yield from make_rows(part, records, layout, pairs, path_in_numbers=len(parts) > 1, conversions=conversions)
            on_progress((done + min(1.0, records.share) * size) / sum(sizes))
        done += size
        on_progress(done / sum(sizes))


def _first_occurrences(hashes: Hashes) -> tuple[Indices, list[tuple[int, int]]]:
    """Return the indices of first occurrences in order, and (index, first index) of each repetition."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    return np.sort(first), [(int(index), int(first[inverse[index]])) for index in repeated]


def _hash(texts: Sequence[str]) -> int:
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def _row_number(store: RowStore, index: int) -> RowId:
    number: RowId = store.read(index)[0]
    return number
