"""Prompts of a dataset whose length isn't known, such as one that streams from the Hub: read only as far as they are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from reinforcepp.data.loaded import PromptRow
from reinforcepp.data.loading import given_prompt


class StreamRows(Sequence[PromptRow]):
    """The first ``count`` rows of an iterable, read when they are used; a shorter one starts over.

    Args:
        dataset: its rows are those of :func:`prompt_rows`; it can be endless.
        name: its name for messages.
        count: number of rows.
        batch_size: rows of the first batch, which identify the data.
    """

    def __init__(self, dataset: Iterable[Any], name: str, count: int, batch_size: int) -> None:
        self._rows, self._read, self._name, self._count = iter(dataset), list[PromptRow](), name, count
        self._ended = False
        self.batch_size = batch_size

    def __len__(self) -> int:
        """Return the number of rows, if the iterable has any."""
        return self._count if self._up_to(0) else 0

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[PromptRow]: ...

    def __getitem__(self, index: int | slice) -> PromptRow | list[PromptRow]:
        """Return one row, or a list for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        self._up_to(index)
        return self._read[index % len(self._read)] if self._ended else self._read[index]

    def _up_to(self, index: int) -> int:
        """Read until the row ``index`` or the end; return the number of rows read."""
        while len(self._read) <= index and not self._ended:
            row = next(self._rows, None)
            if row is None:
                self._ended = True
            else:
                self._read.append(given_prompt(row, self._name, len(self._read)))
        return len(self._read)
