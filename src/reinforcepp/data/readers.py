"""Readers of CSV, TSV, JSON and JSONL files: each yields a file's rows in chunks. ``tables`` reads Parquet and Arrow files.

Row numbers: in CSV, TSV and JSONL files, the line on which the row starts, as a text editor counts. In JSON lists, Parquet
and Arrow files, the position from 1. The header of a CSV file is row 1.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from reinforcepp.data.csv_dialect import SEPARATOR_NAMES, Dialect, find_dialect
from reinforcepp.data.encodings import guess_encoding, looks_like_utf16, open_text_bytes
from reinforcepp.data.json_shapes import rows_of_object
from reinforcepp.data.limits import check_nesting
from reinforcepp.errors import DataError

CHUNK_BYTES = 8 << 20
CHUNK_ROWS = 1000
MAX_LINE_BYTES = 256 << 20
# Python's own limit of 131,072 characters is shorter than a long document. A cell of ten million characters is nearly
# always an unclosed quote.
_MAX_CELL_CHARACTERS = 10_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class Records:
    """A chunk of a file's rows.

    Attributes:
        names: Column names, in order.
        rows: Row number and cells by column, per row.
        header_row: Row number of the header, for formats with a header.
        other_separators: Separator characters by name that this format doesn't use. If one of them occurs in the only
            column name, the file uses the wrong separator.
        share: Share of the file read so far, this chunk included.
        notes: Remarks for the user on how the file was read.
    """

    names: tuple[str, ...]
    rows: Sequence[tuple[int, Mapping[str, Any]]]
    header_row: int | None = None
    other_separators: Mapping[str, str] | None = None
    share: float = 1.0
    notes: tuple[str, ...] = ()


class ReadProgress:
    """Share of a text file read so far; ``text_chunks`` updates it."""

    def __init__(self) -> None:
        self.share = 0.0


def quoted(names: Iterable[str]) -> str:
    """Return names for a message, truncated in case the file has no header and the names are data."""
    shown = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def count(number: int, noun: str) -> str:
    """Return ``1 row`` or ``3 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


# --- text -------------------------------------------------------------------------------------------------------------


def text_chunks(path: Path, progress: ReadProgress, *, save_as: str) -> Iterator[tuple[int, str]]:
    """Yield a file's text in chunks of whole lines, each with the number of its first line.

    Raises:
        DataError: The file isn't UTF-8, or a line exceeds ``MAX_LINE_BYTES``.
        OSError: The file can't be read.
    """
    line, rest = 1, b""
    with open_text_bytes(path) as (stream, file):
        size = os.fstat(file.fileno()).st_size
        while chunk := stream.read(CHUNK_BYTES):
            progress.share = min(1.0, file.tell() / size) if size else 1.0
            raw = rest + chunk
            # A carriage return at the very end might be the first half of a line break.
            end = max(raw.rfind(b"\n"), raw.rfind(b"\r", 0, -1)) + 1
            rest = raw[end:]
            if len(rest) > MAX_LINE_BYTES:
                row = line + raw.count(b"\n")
                raise DataError(
                    f"{path}:{row}: the line is longer than {MAX_LINE_BYTES >> 20} MiB. "
                    "Write one row per line, or check whether the file is damaged."
                )
            if end:
                text = decode(path, raw[:end], save_as=save_as, line=line)
                yield line, text
                line += text.count("\n")
        if rest or line == 1:
            yield line, decode(path, rest, save_as=save_as, line=line)


def in_chunks(rows: Iterable[T]) -> Iterator[list[T]]:
    """Yield ``rows`` in lists of up to ``CHUNK_ROWS``."""
    rows = iter(rows)
    while chunk := list(islice(rows, CHUNK_ROWS)):
        yield chunk


def decode(path: Path, raw: bytes, *, save_as: str, line: int = 1) -> str:
    """Return bytes as text with line feeds as line breaks and without a byte order mark.

    Args:
        path: The file, for messages.
        raw: Its bytes, or some of its lines.
        save_as: Advice on how to save the file instead, as an imperative clause.
        line: Number of the first line.

    Raises:
        DataError: The bytes aren't UTF-8 text.
    """
    advice = save_as[0].upper() + save_as[1:]
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}:1: the file is UTF-16, not UTF-8. {advice}, or convert it with `iconv -f utf-16 -t utf-8`."
        )
    data = raw.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if (zero := data.find(b"\0")) >= 0:
        if (variant := looks_like_utf16(raw)) is not None:
            raise DataError(
                f"{path}:1: the file is UTF-16, not UTF-8. {advice}, or convert it with `iconv -f {variant} -t utf-8`."
            )
        raise DataError(
            f"{path}:{_line_at(data, zero, line)}: NUL byte, so the file isn't plain text. "
            f"{advice}, or remove NUL bytes with `tr -d '\\000'`."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}:{_line_at(data, error.start, line)}: byte 0x{data[error.start]:02x} isn't valid UTF-8. "
            f"{advice}, or convert the file with `iconv -f {guess_encoding(data, error.start)} -t utf-8`."
        ) from error


def _line_at(data: bytes, position: int, first: int) -> int:
    return data.count(b"\n", 0, position) + first


# --- CSV and TSV ------------------------------------------------------------------------------------------------------


def read_csv(path: Path, delimiter: str = ",") -> Iterator[Records]:
    """Yield the rows below a header. Cells are stripped, and blank lines are skipped.

    ``delimiter`` is the usual separator. If the records at the start fit only another one, that is used.

    Raises:
        DataError: The file isn't well-formed, or has no row below its header.
    """
    progress = ReadProgress()
    chunks = text_chunks(path, progress, save_as="save it as 'CSV UTF-8' in a spreadsheet")
    _, start = next(chunks, (1, ""))
    dialect = find_dialect(start, delimiter)
    records = _parse_csv(path, dialect, chain([start], (text for _, text in chunks)))
    first = next(records, None)
    if first is None:
        raise DataError(
            f"{path}: the file is empty. Name the columns in its first row, for example prompt,chosen,rejected."
        )
    header_row, names = first
    header = [name.strip() for name in names]
    # Nameless columns are common (a trailing comma, a saved index) and harmless.
    repeated = [name for name, number in Counter(header).items() if name and number > 1]
    if repeated:
        raise DataError(
            f"{path}:{header_row}: the header has column {repeated[0]!r} more than once. Rename or remove one of them."
        )
    rows = ((number, _csv_cells(path, number, header, record, dialect.delimiter)) for number, record in records)
    others = {f"{name}s": other for other, name in SEPARATOR_NAMES.items() if other != dialect.delimiter}
    notes = dialect.notes(delimiter)
    empty = True
    for chunk in in_chunks(rows):
        yield Records(tuple(header), chunk, header_row, others, progress.share, notes)
        empty = False
    if empty:
        raise DataError(f"{path}: no row below the header. Add data to the file.")


def _parse_csv(path: Path, dialect: Dialect, texts: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield the records that aren't blank, each with the line on which it starts."""
    lines = (line for text in texts for line in io.StringIO(text))
    number = 1 + dialect.skip_first
    try:
        for last_line, record in _with_cell_limit(dialect.records(lines)):
            if len(record) > 1 or any(cell.strip() for cell in record):
                yield number, record
            number = last_line + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{number}: {_quoting_problem(str(error), _separator_name(dialect.delimiter))}"
        ) from error


def _with_cell_limit(records: Iterable[T]) -> Iterator[T]:
    """Yield ``records``, which can have longer cells than Python allows by default.

    The csv module keeps one limit for the whole process, so the limit is changed only while a record is read.
    """
    records = iter(records)
    while True:
        before = csv.field_size_limit(_MAX_CELL_CHARACTERS)
        try:
            record = next(records)
        except StopIteration:
            return
        finally:
            csv.field_size_limit(before)
        yield record


def _separator_name(delimiter: str) -> str:
    return SEPARATOR_NAMES.get(delimiter, repr(delimiter))


def _quoting_problem(error: str, separator: str) -> str:
    if "field limit" in error:
        return (
            f"a cell is longer than {_MAX_CELL_CHARACTERS:,} characters. "
            "Close its double quote if that is missing, or shorten the cell."
        )
    if "end of data" in error:
        return 'a cell\'s opening double quote is never closed. Close it, and double any quote inside a cell ("").'
    return (
        f"text follows the closing double quote of a cell. Put the {separator} right after the closing quote, "
        'and double any quote inside a cell ("").'
    )


def _csv_cells(path: Path, number: int, header: Sequence[str], record: Sequence[str], delimiter: str) -> dict[str, str]:
    if len(record) != len(header):
        separator = _separator_name(delimiter)
        fix = (
            f"Put cells that contain a {separator} in double quotes."
            if len(record) > len(header)
            else f"Put cells that contain a line break in double quotes, and keep the {separator} of an empty cell."
        )
        raise DataError(f"{path}:{number}: {count(len(record), 'cell')}, but the header has {len(header)}. {fix}")
    return {name: cell for name, cell in zip(header, record, strict=True) if name}


# --- JSON and JSONL ---------------------------------------------------------------------------------------------------
# Stricter than Python's parser: NaN and Infinity, which JSON doesn't have, a key that occurs twice in an object, a number
# that is too large and half of a surrogate pair would all come out different from the file.

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\n\r]*")
_SAVE_JSON_AS = "write it as UTF-8"
_ONE_OBJECT_PER_LINE = 'Write one whole JSON object per line, such as {"prompt": "..."}.'


class _JsonProblem(ValueError):
    """What is wrong with a value, and the fix."""


def read_json_lines(path: Path) -> Iterator[Records]:
    """Yield one row per line; blank lines are skipped.

    Raises:
        DataError: A line isn't a valid JSON object, or the file is empty.
    """
    progress = ReadProgress()
    return _json_records(path, _json_lines(path, progress), progress)


def read_json(path: Path) -> Iterator[Records]:
    """Yield the objects of a list or of an object that holds rows, or one object per line.

    Unlike lines, a list or a single object is read whole before its first row is yielded.

    Raises:
        DataError: The file isn't valid JSON or holds something else.
    """
    chunks = text_chunks(path, ReadProgress(), save_as=_SAVE_JSON_AS)
    # The second chunk shows whether lines follow the first.
    start = "".join(text for _, text in islice(chunks, 2))
    is_list = start.lstrip().startswith("[")
    if not is_list and not _is_one_object(start):
        return read_json_lines(path)
    with open_text_bytes(path) as (stream, _):
        text = decode(path, stream.read(), save_as=_SAVE_JSON_AS)
    if not is_list:
        return _object_records(path, text)
    rows = ((number, _json_object(value, f"{path}:{number}")) for number, value in _json_elements(path, text))
    return _json_records(path, rows, ReadProgress())


def _is_one_object(start: str) -> bool:
    """Return whether a file that starts with this text is one object: its first line isn't whole, or is the only line."""
    first, _, rest = start.lstrip().partition("\n")
    if not first.startswith("{"):
        return False
    # A whole object on a line ends with a brace. A line that ends so is either that, or damaged.
    return not rest.strip() if first.rstrip().endswith("}") else rest.lstrip().startswith(('"', "}"))


def _object_records(path: Path, text: str) -> Iterator[Records]:
    begin = _after_space(text, 0)
    value, end = _json_value(text, begin, f"{path}:1", _ONE_OBJECT_PER_LINE)
    if (end := _after_space(text, end)) < len(text):
        raise _invalid_json(f"{path}", text, end, "text after the end of the object", _ONE_OBJECT_PER_LINE)
    rows, notes = rows_of_object(path, _json_object(value, f"{path}:1"))
    numbered = ((number, _json_object(row, f"{path}:{number}")) for number, row in enumerate(rows, 1))
    return _json_records(path, numbered, ReadProgress(), notes)


def _json_lines(path: Path, progress: ReadProgress) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for first, text in text_chunks(path, progress, save_as=_SAVE_JSON_AS):
        for number, line in enumerate(text.split("\n"), first):
            if line.strip():
                where = f"{path}:{number}"
                value, end = _json_value(line, _after_space(line, 0), where, _ONE_OBJECT_PER_LINE)
                if (end := _after_space(line, end)) < len(line):
                    raise DataError(
                        f"{where}, character {end + 1}: text follows the end of the object. {_ONE_OBJECT_PER_LINE}"
                    )
                yield number, _json_object(value, where)


def _json_elements(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Yield each element of a list by itself, so that an error names the element's number."""
    position = _after_space(text, text.index("[") + 1)
    number = 1
    while text[position : position + 1] != "]":
        where = f"{path}:{number}"
        value, end = _json_value(text, position, where, "Write the file as one list of objects.")
        yield number, value
        position = _after_space(text, end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise _invalid_json(where, text, position, "a comma or the end of the list is missing", "Add it.")
        position = _after_space(text, position + (mark == ","))
        number += 1
        if mark == "," and text[position : position + 1] == "]":
            raise _invalid_json(where, text, position, "a comma before the end of the list", "Remove it.")
    if (position := _after_space(text, position + 1)) < len(text):
        raise _invalid_json(f"{path}", text, position, "text after the end of the list", "Remove it.")


def _json_value(text: str, position: int, where: str, fix: str) -> tuple[Any, int]:
    """Return the value that begins at ``position``, and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, position)
        check_nesting(value, text.count("[", position, end) + text.count("{", position, end))
        if _SURROGATE.search(text, position, end):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        message = error.msg[0].lower() + error.msg[1:]
        raise _invalid_json(where, text, error.pos, message, fix) from error
    except _JsonProblem as error:
        raise DataError(f"{where}: {error}") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects are nested too deeply. Flatten them.") from error
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair (\\ud800 to \\udfff). Remove it.") from error
    return value, end


def _invalid_json(where: str, text: str, position: int, message: str, fix: str) -> DataError:
    # A row of a JSONL file is a line already, so the character is enough there.
    line, start = text.count("\n", 0, position) + 1, text.rfind("\n", 0, position) + 1
    at = f"line {line}, character {position - start + 1}" if "\n" in text else f"character {position + 1}"
    return DataError(f"{where}, {at}: invalid JSON ({message}). {fix}")


def _after_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _json_object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
        hint = " If the whole file is one list, name it .json." if kind == "a list" else ""
        raise DataError(f'{where}: found {kind}, expected an object. Write it as {{"prompt": "..."}}.{hint}')
    return value


def _json_records(
    path: Path, rows: Iterator[tuple[int, Mapping[str, Any]]], progress: ReadProgress, notes: tuple[str, ...] = ()
) -> Iterator[Records]:
    empty = True
    for chunk in in_chunks(rows):
        names = dict.fromkeys(name for _, cells in chunk for name in cells)
        yield Records(tuple(names), chunk, share=progress.share, notes=notes)
        empty = False
    if empty:
        raise DataError(f"{path}: the file is empty. Add at least one object with a prompt.")


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, number in Counter(name for name, _ in pairs).items() if number > 1)
        raise _JsonProblem(f"the key {twice[:40]!r} occurs twice in one object. Rename or remove one of them.")
    return found


def _constant(name: str) -> NoReturn:
    raise _JsonProblem(f"{name} isn't a JSON value. Write null or omit the key.")


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _JsonProblem(f"the number {text[:20]} is too large. Write it as a string, in double quotes.")
    return number


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python converts up to 4,300 digits.
        raise _JsonProblem(
            f"a number of {len(text):,} digits is too large. Write it as a string, in double quotes."
        ) from None


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_pairs, parse_constant=_constant, parse_float=_float, parse_int=_int
)
