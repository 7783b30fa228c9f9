"""Find out how a CSV file separates and quotes its cells, from its first records."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

SEPARATOR_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
_SAMPLE_RECORDS = 100
_SEPARATOR_LINE = re.compile(r"sep=(.)\n?", re.IGNORECASE)


class Dialect(NamedTuple):
    """How a file separates and quotes cells.

    Attributes:
        delimiter: The separator.
        skip_first: Whether the first line only names the separator, as Excel writes it.
        space_before_quote: Whether an opening quote can follow a space.
        backslash: Whether a backslash precedes a quote inside a cell, instead of a second quote.
    """

    delimiter: str
    skip_first: bool = False
    space_before_quote: bool = False
    backslash: bool = False

    def notes(self, usual: str) -> tuple[str, ...]:
        """Return remarks for the user on what differs from a file with the ``usual`` separator."""
        notes = [f"cells separated by {SEPARATOR_NAMES.get(self.delimiter, repr(self.delimiter))}s"]
        notes = notes if self.delimiter != usual else []
        return (*notes, *(["quotes escaped by backslashes"] if self.backslash else []))

    def records(self, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
        """Yield records, each with the number of its last line.

        Raises:
            csv.Error: A record isn't well-formed.
        """
        lines = iter(lines)
        if self.skip_first:
            next(lines, None)
        # A backslash before another character belongs to the text, so the csv module's escapes don't fit.
        cleaned = (line.replace('\\"', '""') for line in lines) if self.backslash else lines
        reader = csv.reader(cleaned, strict=True, delimiter=self.delimiter, skipinitialspace=self.space_before_quote)
        for record in reader:
            yield reader.line_num + self.skip_first, record


def find_dialect(text: str, usual: str) -> Dialect:
    """Return the dialect in which the records at the start of ``text`` have as many cells as the header.

    The usual dialect comes first, and is the answer if none fits.
    """
    if (named := _SEPARATOR_LINE.match(text)) is not None:
        return _find_quoting(text, Dialect(named[1], skip_first=True)) or Dialect(named[1], skip_first=True)
    others = (separator for separator in SEPARATOR_NAMES if separator != usual)
    found = (_find_quoting(text, Dialect(separator)) for separator in (usual, *others))
    return next((dialect for dialect in found if dialect is not None), Dialect(usual))


def _find_quoting(text: str, dialect: Dialect) -> Dialect | None:
    spaced = dialect.delimiter != " " and re.search(rf'{re.escape(dialect.delimiter)} +"', text) is not None
    for backslash in (False, True) if '\\"' in text else (False,):
        for space in (True, False) if spaced else (False,):
            candidate = dialect._replace(space_before_quote=space, backslash=backslash)
            if _fits(text, candidate):
                return candidate
    return None


def _fits(text: str, dialect: Dialect) -> bool:
    """Return whether the header has several cells, and the first records as many."""
    try:
        records = [record for _, record in islice(dialect.records(io.StringIO(text)), _SAMPLE_RECORDS)]
    except csv.Error:
        return False
    widths = {len(record) for record in records if len(record) > 1 or any(cell.strip() for cell in record)}
    return len(widths) == 1 and widths != {1}
