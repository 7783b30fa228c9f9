"""From the bytes of a file to text, for every format that is text; and how names are shown in messages."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reinforcepp.errors import DataError


@dataclass(frozen=True)
class Records:
    """What a reader found: the columns' names in order, and each row's number and cells.

    ``header_row`` is where the names stand, in a format that has such a place. ``separators`` are, by what they are
    called, characters that may stand in a single name because the file separates its cells by them.
    """

    names: tuple[str, ...]
    rows: Sequence[tuple[int, Mapping[str, Any]]]
    header_row: int | None = None
    separators: Mapping[str, str] | None = None


def decode(path: Path, raw: bytes, *, save_as: str) -> str:
    """The text, its lines ended by line feeds; spreadsheets write a byte order mark, which says nothing here.

    Args:
        path: The file, for messages.
        raw: Its bytes.
        save_as: What it may be saved as instead to be readable, in a few words.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{path}, row 1: the file is UTF-16, not UTF-8; convert it with `iconv -f utf-16 -t utf-8` or {save_as}."
        )
    data = raw.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if (zero := data.find(b"\0")) >= 0:
        raise DataError(
            f"{path}, row {_line(data, zero)}: there is a NUL byte, so this is no plain text; "
            f"{save_as}, or remove such bytes with `tr -d '\\000'`."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, row {_line(data, error.start)}: byte 0x{data[error.start]:02x} isn't valid UTF-8; "
            f"convert the file with `iconv -f latin1 -t utf-8` or {save_as}."
        ) from error


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def quoted(names: Iterable[str]) -> str:
    """Names for a message, cut short in case the file has no header and these are data."""
    shown = [repr(name if len(name) <= 40 else f"{name[:37]}...") for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")


def count(number: int, noun: str) -> str:
    """``1 row``, ``3 rows``."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
