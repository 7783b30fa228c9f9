"""From the bytes of a CSV file to checked rows, and from those to the usable ones.

A row's number is the line on which it starts, as a text editor counts: the header is row 1. A spreadsheet shows the
same number as long as no cell above it spans several lines.

What concerns the file as a whole (encoding, quoting, columns, a row of the wrong width) is a ``DataError``, because
reading on would misread data. What concerns the contents of one row is a ``Skipped`` record.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reinforcepp.errors import ConfigError, DataError, nearest

# Python's own limit, 131,072 characters, is less than a long document; ten million only ever is an unclosed quote.
_MAX_CELL_CHARACTERS = 10_000_000
_ROWS_NAMED = 5


@dataclass(frozen=True)
class Row:
    """One record: the line it starts on, and its stripped cells by column name."""

    number: int
    cells: Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """All records of the file ``source``; ``sha256`` is of the file's bytes."""

    source: str
    sha256: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Skipped:
    """A row that was left out. ``reason`` reads well after a count; ``duplicate_of`` is the row that was kept."""

    row: int
    reason: str
    duplicate_of: int | None = None

    def __str__(self) -> str:
        """``row 9: duplicate of row 4``."""
        return f"row {self.row}: {self.reason}" + (f" of row {self.duplicate_of}" if self.duplicate_of else "")


def normalize(text: str) -> str:
    """The form in which texts are compared: Unicode NFC, each run of whitespace one space. Case counts."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def read_table(path: str | Path, columns: Mapping[str, str]) -> Table:
    """Read a UTF-8 CSV file that has a header.

    Cells are stripped, and line breaks within them become line feeds. Blank lines are passed over.

    Args:
        path: The file.
        columns: For each setting that names a required column (``prompt_column``), the name it has.

    Raises:
        ConfigError: Two settings name the same column.
        DataError: The file can't be read, isn't well-formed, lacks a column or has no row below its header.
    """
    path = Path(path)
    _check_distinct(columns)
    raw = _read_bytes(path, columns.values())
    records = _parse(path, _decode(path, raw))
    if not records:
        raise DataError(f"{path}: the file is empty; its first row must name the columns {_quoted(columns.values())}.")
    header_row, names = records.pop(0)
    header = [name.strip() for name in names]
    _check_header(f"{path}, row {header_row}", header, columns)
    if not records:
        raise DataError(f"{path}: there is no row below the header; add data to the file.")
    rows = [Row(number, _cells(path, number, header, record)) for number, record in records]
    return Table(str(path), hashlib.sha256(raw).hexdigest(), tuple(rows))


def sift(
    rows: Iterable[Row], columns: Sequence[str], fault: Callable[[Sequence[str]], str | None] = lambda texts: None
) -> tuple[list[Row], tuple[Skipped, ...]]:
    """Divide rows into the usable ones and those left out: an empty cell, a fault, or a repetition of an earlier row.

    Args:
        rows: What ``read_table`` gave.
        columns: The columns that have to be filled in and that make a row the repetition of another.
        fault: Given the normalised texts of those columns, what is wrong with them, if anything.
    """
    kept: list[Row] = []
    skipped: list[Skipped] = []
    first_rows: dict[tuple[str, ...], int] = {}
    for row in rows:
        texts = tuple(normalize(row.cells[name]) for name in columns)
        empty = [name for name, text in zip(columns, texts, strict=True) if not text]
        reason = f"empty {empty[0]}" if empty else fault(texts)
        if reason:
            skipped.append(Skipped(row.number, reason))
        elif texts in first_rows:
            skipped.append(Skipped(row.number, "duplicate", duplicate_of=first_rows[texts]))
        else:
            first_rows[texts] = row.number
            kept.append(row)
    return kept, tuple(skipped)


def count(number: int, noun: str) -> str:
    """``1 row``, ``3 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def describe_skipped(skipped: Sequence[Skipped]) -> str:
    """``left out 3 rows: 1 empty chosen (row 5), 2 duplicates (rows 8, 9)``; an empty string for none."""
    if not skipped:
        return ""
    parts = []
    for reason, number in Counter(each.reason for each in skipped).items():
        rows = [str(each.row) for each in skipped if each.reason == reason]
        named = ", ".join(rows[:_ROWS_NAMED]) + (", ..." if number > _ROWS_NAMED else "")
        label = count(number, reason) if reason == "duplicate" else f"{number:,} {reason}"
        parts.append(f"{label} ({'row' if number == 1 else 'rows'} {named})")
    return f"left out {count(len(skipped), 'row')}: {', '.join(parts)}"


def _check_distinct(columns: Mapping[str, str]) -> None:
    flags: dict[str, str] = {}
    for flag, name in columns.items():
        if name in flags:
            raise ConfigError(f"--{flags[name]} and --{flag} both name the column {name!r}; give each its own.")
        flags[name] = flag


def _read_bytes(path: Path, columns: Iterable[str]) -> bytes:
    try:
        if path.is_dir():
            example = min((each.name for each in path.glob("*.csv")), default=None)
            hint = f", such as {example!r}" if example else ""
            raise DataError(f"{path} is a folder; give the path of a CSV file in it{hint}.")
        if not path.parent.is_dir():
            raise DataError(f"{path}: there is no folder {str(path.parent)!r}; check the path.")
        if not path.exists():
            hint = nearest(path.name, (each.name for each in path.parent.iterdir() if each.is_file()))
            raise DataError(f"{path}: there is no such file; check the path.{hint}")
        if path.suffix.lower() != ".csv":
            kind = f"{path.suffix} files can't be read" if path.suffix else "a file without an extension isn't read"
            raise DataError(f"{path}: {kind}; convert it to a .csv file with the columns {_quoted(columns)}.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path and its permissions.") from error


def _decode(path: Path, raw: bytes) -> str:
    """The text, its lines ended by line feeds; spreadsheets write a byte order mark, which says nothing here."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}, row 1: the file is UTF-16, not UTF-8; convert it with `iconv -f utf-16 -t utf-8` "
            "or save it as 'CSV UTF-8' in a spreadsheet."
        )
    data = raw.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if (zero := data.find(b"\0")) >= 0:
        raise DataError(
            f"{path}, row {_line(data, zero)}: there is a NUL byte, so this is no plain text; "
            "save it again as 'CSV UTF-8', or remove such bytes with `tr -d '\\000'`."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, row {_line(data, error.start)}: byte 0x{data[error.start]:02x} isn't valid UTF-8; "
            "convert the file with `iconv -f latin1 -t utf-8` or save it as 'CSV UTF-8' in a spreadsheet."
        ) from error


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _parse(path: Path, text: str) -> list[tuple[int, list[str]]]:
    """The records that aren't blank lines, each with the line it starts on."""
    # The limit is the csv module's and so the whole process's: put it back.
    limit_before = csv.field_size_limit(_MAX_CELL_CHARACTERS)
    reader = csv.reader(io.StringIO(text), strict=True)
    records: list[tuple[int, list[str]]] = []
    number = 1
    try:
        for record in reader:
            if len(record) > 1 or any(cell.strip() for cell in record):
                records.append((number, record))
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, row {number}: {_quoting_fault(str(error))}") from error
    finally:
        csv.field_size_limit(limit_before)
    return records


def _quoting_fault(error: str) -> str:
    if "field limit" in error:
        return (
            f"a cell is longer than {_MAX_CELL_CHARACTERS:,} characters, most likely because a double quote "
            "that opens it is never closed; close it or shorten the cell."
        )
    if "end of data" in error:
        return 'a double quote that opens a cell is never closed; close it, and write quotes within a cell twice ("").'
    return (
        "text follows the double quote that closes a cell; close each quoted cell right before its comma, "
        'and write quotes within it twice ("").'
    )


def _check_header(where: str, header: Sequence[str], columns: Mapping[str, str]) -> None:
    # Nameless columns are common (a trailing comma, a saved index) and harmless.
    repeated = [name for name, number in Counter(header).items() if name and number > 1]
    if repeated:
        raise DataError(f"{where}: the header names {repeated[0]!r} more than once; rename or remove one of them.")
    for flag, name in columns.items():
        if name in header:
            continue
        for separator, spoken in ((";", "semicolons"), ("\t", "tabs")):
            if name in [each.strip().strip('"') for each in header[0].split(separator)]:
                raise DataError(f"{where}: cells are separated by {spoken}; save the file with commas instead.")
        raise DataError(
            f"{where}: the header has no column {name!r}, only {_quoted(header)}; "
            f"rename the column meant or name it with --{flag}.{nearest(name, header)}"
        )


def _quoted(names: Iterable[str]) -> str:
    """Names for a message, cut short in case the file has no header and these are data."""
    shown = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def _cells(path: Path, number: int, header: Sequence[str], record: Sequence[str]) -> dict[str, str]:
    if len(record) != len(header):
        cause = (
            "an unquoted comma is the likely cause, so put cells that hold commas in double quotes."
            if len(record) > len(header)
            else "an unquoted line break or a missing comma is the likely cause, so put cells that hold line breaks "
            "in double quotes and keep the comma of an empty cell."
        )
        raise DataError(
            f"{path}, row {number}: {count(len(record), 'cell')} where the header has {len(header)}; {cause}"
        )
    return {name: cell.strip() for name, cell in zip(header, record, strict=True) if name}
