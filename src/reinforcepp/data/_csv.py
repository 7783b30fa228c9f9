"""CSV and TSV: a row's number is the line on which it starts, as a text editor counts; the header is row 1.

A spreadsheet shows the same number as long as no cell above it spans several lines.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from reinforcepp.data._text import Reading, Records, count, in_pieces, text_pieces
from reinforcepp.errors import DataError

# Python's own limit, 131,072 characters, is less than a long document; ten million only ever is an unclosed quote.
_MAX_CELL_CHARACTERS = 10_000_000
_SPOKEN = {",": "comma", "\t": "tab", ";": "semicolon"}


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Records]:
    """The rows below a header; cells are stripped, line breaks in them are line feeds, blank lines are passed over.

    Raises:
        DataError: The file isn't well-formed, or has no row below its header.
    """
    reading = Reading()
    records = _parse(path, delimiter, reading)
    first = next(records, None)
    if first is None:
        raise DataError(
            f"{path}: the file is empty; its first row must name the columns, such as 'prompt', 'chosen', 'rejected'."
        )
    header_row, names = first
    header = [name.strip() for name in names]
    # Nameless columns are common (a trailing comma, a saved index) and harmless.
    repeated = [name for name, number in Counter(header).items() if name and number > 1]
    if repeated:
        raise DataError(
            f"{path}, row {header_row}: the header names {repeated[0]!r} more than once; rename or remove one of them."
        )
    rows = ((number, _cells(path, number, header, record, delimiter)) for number, record in records)
    others = {f"{_SPOKEN[other]}s": other for other in _SPOKEN if other != delimiter}
    empty = True
    for piece in in_pieces(rows):
        yield Records(tuple(header), piece, header_row, others, reading.share)
        empty = False
    if empty:
        raise DataError(f"{path}: there is no row below the header; add data to the file.")


def _parse(path: Path, delimiter: str, reading: Reading) -> Iterator[tuple[int, list[str]]]:
    """The records that aren't blank lines, each with the line it starts on."""
    # The limit is the csv module's and so the whole process's: put it back.
    limit_before = csv.field_size_limit(_MAX_CELL_CHARACTERS)
    reader = csv.reader(_lines(path, reading), strict=True, delimiter=delimiter)
    number = 1
    try:
        for record in reader:
            if len(record) > 1 or any(cell.strip() for cell in record):
                yield number, record
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, row {number}: {_quoting_fault(str(error), _SPOKEN[delimiter])}") from error
    finally:
        csv.field_size_limit(limit_before)


def _lines(path: Path, reading: Reading) -> Iterator[str]:
    for _, text in text_pieces(path, reading, save_as="save it as 'CSV UTF-8' in a spreadsheet"):
        yield from io.StringIO(text)


def _quoting_fault(error: str, separator: str) -> str:
    if "field limit" in error:
        return (
            f"a cell is longer than {_MAX_CELL_CHARACTERS:,} characters, most likely because a double quote "
            "that opens it is never closed; close it or shorten the cell."
        )
    if "end of data" in error:
        return 'a double quote that opens a cell is never closed; close it, and write quotes within a cell twice ("").'
    return (
        f"text follows the double quote that closes a cell; close each quoted cell right before its {separator}, "
        'and write quotes within it twice ("").'
    )


def _cells(path: Path, number: int, header: Sequence[str], record: Sequence[str], delimiter: str) -> dict[str, str]:
    if len(record) != len(header):
        separator = _SPOKEN[delimiter]
        cause = (
            f"an unquoted {separator} is the likely cause, so put cells that hold {separator}s in double quotes."
            if len(record) > len(header)
            else f"an unquoted line break or a missing {separator} is the likely cause, so put cells that hold line "
            f"breaks in double quotes and keep the {separator} of an empty cell."
        )
        raise DataError(
            f"{path}, row {number}: {count(len(record), 'cell')} where the header has {len(header)}; {cause}"
        )
    return {name: cell.strip() for name, cell in zip(header, record, strict=True) if name}
