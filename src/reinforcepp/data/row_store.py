"""Rows on the disk that look like a list: for data larger than memory."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from reinforcepp.errors import DataError

T = TypeVar("T")
Places = NDArray[np.int64]


class Spool:
    """Lists of plain values in a file without a name, which the system removes with the process, however that ends.

    It lies where temporary files do: the environment variable TMPDIR says where.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="reinforcepp-")  # noqa: SIM115  (open as long as its rows are)
        self._starts = array("Q", [0])
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._starts) - 1

    def append(self, values: list[Any]) -> None:
        """Add a row.

        Raises:
            TypeError: It holds a value for which JSON has no form.
            OSError: The disk is full.
        """
        line = json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._file.write(line)
        self._digest.update(line)
        self._starts.append(self._starts[-1] + len(line))

    def close_for_writing(self) -> str:
        """Have everything on the disk; returns a hash of it."""
        self._file.flush()
        return self._digest.hexdigest()

    def read(self, place: int) -> list[Any]:
        """A row."""
        start = self._starts[place]
        line = os.pread(self._file.fileno(), self._starts[place + 1] - start, start)
        values: list[Any] = json.loads(line.decode("utf-8", "surrogatepass"))
        return values


class DiskRows(Sequence[T], Generic[T]):
    """Some rows of a spool, in the order of ``places``, each made by ``make`` from its values when asked for.

    ``digest`` names their contents.
    """

    def __init__(self, spool: Spool, places: Places, make: Callable[[list[Any]], T], digest: str) -> None:
        self._spool, self._places, self._make = spool, places, make
        self.digest = hashlib.sha256(digest.encode() + places.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> DiskRows[T]: ...

    def __getitem__(self, place: int | slice) -> T | DiskRows[T]:
        """One row, or some of them, which stay on the disk."""
        if isinstance(place, slice):
            return DiskRows(self._spool, self._places[place], self._make, self.digest)
        return self._make(self._spool.read(int(self._places[place])))

    def without(self, places: Sequence[int]) -> DiskRows[T]:
        """All but those at ``places`` of these."""
        return DiskRows(self._spool, np.delete(self._places, np.asarray(places, np.int64)), self._make, self.digest)

    def spread(self, number: int) -> DiskRows[T]:
        """At most ``number`` of them, evenly spread."""
        if number >= len(self):
            return self
        return DiskRows(
            self._spool, self._places[np.linspace(0, len(self) - 1, number).astype(int)], self._make, self.digest
        )


def spooled(spool: Spool, values: list[Any], where: str) -> None:
    """Add a row that stands at ``where``.

    Raises:
        DataError: It holds a value that can't be written down as JSON, or the disk is full.
    """
    try:
        spool.append(values)
    except TypeError as error:
        raise DataError(
            f"{where}: {error}, so it can't be streamed; write that column as text, or leave --streaming out."
        ) from error
    except OSError as error:
        raise DataError(
            f"{where}: {error.strerror}. Streaming keeps the rows in {tempfile.gettempdir()}: free some space there, or set "
            "TMPDIR to a folder with more."
        ) from error
