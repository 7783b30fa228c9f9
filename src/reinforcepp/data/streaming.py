"""Reading data larger than memory: one pass over its files, in which every row is checked and put onto the disk.

What is kept in memory are a few numbers a row. The rows left out, the split and the weights are those of ``preferences`` and
``prompts``; a hash stands for each text.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from reinforcepp.data._columns import ColumnNames, Layout, check_distinct, find_columns
from reinforcepp.data._files import Part, parts_of
from reinforcepp.data._table import Row, Skipped, called, digest_of, normalize, notes_on, rows_of, unusable
from reinforcepp.data.row_store import DiskRows, Places, Spool, spooled
from reinforcepp.data.split import check_fraction, number_heldout, rank, times
from reinforcepp.types import RowId

T = TypeVar("T")
Hashes = NDArray[np.uint64]
OnProgress = Callable[[float], None]
"""Is told which share of the files has been read."""


@dataclass(frozen=True)
class Streamed:
    """Data that was read in one pass; ``kept`` are the places of its usable rows in the spool.

    For each row of the spool there are a hash of its texts, one of a pair with its answers exchanged, one of its prompt,
    and its weight.
    """

    source: str
    sha256: str
    columns: tuple[str, ...]
    spool: Spool
    digest: str
    kept: Places
    texts: Hashes
    mirrored: Hashes
    prompts: Hashes
    weights: NDArray[np.float64]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]

    def rows(self, places: Places, make: Callable[[list[Any]], T]) -> DiskRows[T]:
        """The rows at ``places`` of the spool."""
        return DiskRows(self.spool, places, make, self.digest)

    def split(self, heldout_fraction: float, seed: int) -> tuple[Places, Places]:
        """Usable rows for training, as often as their weights say, and those held out: see ``split_by_prompt``."""
        check_fraction(heldout_fraction)
        prompts = self.prompts[self.kept]
        distinct = np.unique(prompts)
        heldout = np.isin(prompts, distinct[: number_heldout(heldout_fraction, len(distinct))])
        return self._weighted(self.kept[~heldout], seed), self.kept[heldout]

    def _weighted(self, places: Places, seed: int) -> Places:
        weights = self.weights[places]
        if (weights == 1).all():
            return places
        counts = []
        for place, weight in zip(places, weights, strict=True):
            row, (prompt, *_), *_ = self.spool.read(place)
            counts.append(times(float(weight), f"{row}:{prompt}", seed))
        return np.repeat(places, counts)


def stream(
    source: str | Path,
    names: ColumnNames,
    *,
    pairs: bool,
    seed: int,
    fault: Callable[[Sequence[str], Sequence[str]], str | None],
    values: Callable[[Row], list[Any]],
    on_progress: OnProgress,
) -> Streamed:
    """Read ``source`` in one pass.

    Args:
        source: As for ``read_table``.
        names: What the columns are called.
        pairs: Whether to read answers too.
        seed: Decides the split, which the hashes of the prompts are for.
        fault: Given the names of a row's texts and the texts, normalised: what is wrong with them, if anything.
        values: What is to be kept of a usable row beside its number and texts, as plain values.
        on_progress: Is told which share has been read.

    Raises:
        ConfigError, DataError: as ``read_table``.
    """
    if pairs:
        check_distinct(names)
    parts = parts_of(source)
    spool, seen, layouts = Spool(), Counter[str](), list[Layout]()
    texts, mirrored, prompts, weights = array("Q"), array("Q"), array("Q"), array("d")
    skipped: list[Skipped] = []
    columns: tuple[str, ...] = ()
    for row, layout in _rows(parts, names, pairs, seen, on_progress):
        if not layouts or layouts[-1] is not layout:
            layouts.append(layout)
        columns = columns or (layout.prompt or names.prompt, *((layout.answers or ()) if pairs else ()))
        plain = tuple(map(normalize, row.texts))
        reason = unusable(row, plain, columns) or fault(columns, plain)
        if reason:
            skipped.append(Skipped(row.number, reason))
            continue
        spooled(spool, [row.number, row.texts, *values(row)], f"{source}, row {row.number}")
        texts.append(_hash(plain))
        mirrored.append(_hash((plain[0], *plain[:0:-1])))
        prompts.append(int.from_bytes(rank(seed, plain[0])[:8], "big"))
        weights.append(row.weight)
    digest = spool.close_for_writing()
    hashes = np.frombuffer(texts, dtype=np.uint64)
    kept, repeated = _first(hashes)
    skipped += [
        Skipped(_number(spool, place), "duplicate", duplicate_of=_number(spool, first)) for place, first in repeated
    ]
    return Streamed(
        source=called(source, parts),
        sha256=digest_of(parts),
        columns=columns,
        spool=spool,
        digest=digest,
        kept=kept,
        texts=hashes,
        mirrored=np.frombuffer(mirrored, dtype=np.uint64),
        prompts=np.frombuffer(prompts, dtype=np.uint64),
        weights=np.frombuffer(weights, dtype=np.float64),
        skipped=tuple(skipped),
        notes=tuple(notes_on(parts, layouts, seen)),
    )


def contradictions(streamed: Streamed) -> tuple[tuple[RowId, RowId], ...]:
    """The rows of pairs that prefer the same two answers to the same prompt in opposite ways."""
    texts, mirrored = streamed.texts[streamed.kept], streamed.mirrored[streamed.kept]
    later = np.flatnonzero(np.isin(mirrored, texts))
    order = np.argsort(texts)
    earlier = order[np.searchsorted(texts, mirrored[later], sorter=order)]
    couples = [(int(a), int(b)) for a, b in zip(earlier, later, strict=True) if a < b]
    return tuple(
        (_number(streamed.spool, streamed.kept[a]), _number(streamed.spool, streamed.kept[b])) for a, b in couples
    )


def _rows(
    parts: Sequence[Part], names: ColumnNames, pairs: bool, seen: Counter[str], on_progress: OnProgress
) -> Iterator[tuple[Row, Layout]]:
    """All rows, with the columns of their file, which are those of its first piece."""
    sizes = [part.size() for part in parts]
    done = 0.0
    for part, size in zip(parts, sizes, strict=True):
        layout = None
        for records in part.pieces():
            layout = layout or find_columns(part.path, records, names, pairs)
            for row in rows_of(part, records, layout, pairs, path_in_numbers=len(parts) > 1, seen=seen):
                yield row, layout
            on_progress((done + min(1.0, records.share) * size) / sum(sizes))
        done += size
        on_progress(done / sum(sizes))


def _first(hashes: Hashes) -> tuple[Places, list[tuple[int, int]]]:
    """Places at which a hash occurs for the first time, in order; and of each other place that where it did."""
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    place = np.arange(len(hashes))
    again = np.flatnonzero(first[inverse] != place)
    return np.sort(first), [(int(at), int(first[inverse[at]])) for at in again]


def _hash(texts: Sequence[str]) -> int:
    joined = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "big")


def _number(spool: Spool, place: int) -> RowId:
    number: RowId = spool.read(place)[0]
    return number
