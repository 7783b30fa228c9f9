"""From the bytes of a file to text, in pieces, for every format that is text; and how names are shown in messages."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from reinforcepp.errors import DataError

PIECE_BYTES = 8 << 20
PIECE_ROWS = 1000
LONGEST_LINE = 256 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Records:
    """What a reader found in a piece of a file: the columns' names in order, and each row's number and cells.

    ``share`` is how much of the file has been read with this piece.
    ``header_row`` is where the names stand, in a format that has such a place. ``separators`` are, by what they are
    called, characters that may stand in a single name because the file separates its cells by them.
    """

    names: tuple[str, ...]
    rows: Sequence[tuple[int, Mapping[str, Any]]]
    header_row: int | None = None
    separators: Mapping[str, str] | None = None
    share: float = 1.0


class Reading:
    """How far a file has been read; ``share`` is told by whoever reads it."""

    def __init__(self) -> None:
        self.share = 0.0


def text_pieces(path: Path, reading: Reading, *, save_as: str) -> Iterator[tuple[int, str]]:
    """A file's text in pieces of whole lines, each with the number of its first line.

    Raises:
        DataError: It isn't UTF-8, or has a line that no memory should hold.
        OSError: It can't be read.
    """
    line, rest = 1, b""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        while piece := file.read(PIECE_BYTES):
            reading.share = min(1.0, file.tell() / size) if size else 1.0
            raw = rest + piece
            end = max(raw.rfind(b"\n"), raw.rfind(b"\r", 0, -1)) + 1
            rest = raw[end:]
            if len(rest) > LONGEST_LINE:
                row = line + raw.count(b"\n")
                raise DataError(
                    f"{path}, row {row}: the line is longer than {LONGEST_LINE >> 20} MiB; "
                    "this is no file with one row a line, or it is damaged."
                )
            if end:
                text = decode(path, raw[:end], save_as=save_as, line=line)
                yield line, text
                line += text.count("\n")
        if rest or line == 1:
            yield line, decode(path, rest, save_as=save_as, line=line)


def in_pieces(rows: Iterable[T]) -> Iterator[list[T]]:
    """``rows`` as lists, none of them long."""
    rows = iter(rows)
    while piece := list(islice(rows, PIECE_ROWS)):
        yield piece


def decode(path: Path, raw: bytes, *, save_as: str, line: int = 1) -> str:
    """The text, its lines ended by line feeds; spreadsheets write a byte order mark, which says nothing here.

    Args:
        path: The file, for messages.
        raw: Its bytes, or some of its lines.
        save_as: What it may be saved as instead to be readable, in a few words.
        line: The number of the first one.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}, row 1: the file is UTF-16, not UTF-8; convert it with `iconv -f utf-16 -t utf-8` or {save_as}."
        )
    data = raw.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if (zero := data.find(b"\0")) >= 0:
        raise DataError(
            f"{path}, row {_line(data, zero, line)}: there is a NUL byte, so this is no plain text; "
            f"{save_as}, or remove such bytes with `tr -d '\\000'`."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, row {_line(data, error.start, line)}: byte 0x{data[error.start]:02x} isn't valid UTF-8; "
            f"convert the file with `iconv -f latin1 -t utf-8` or {save_as}."
        ) from error


def _line(data: bytes, position: int, first: int) -> int:
    return data.count(b"\n", 0, position) + first


def quoted(names: Iterable[str]) -> str:
    """Names for a message, cut short in case the file has no header and these are data."""
    shown = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def count(number: int, noun: str) -> str:
    """``1 row``, ``3 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
