"""The file to which preference pairs are appended, a whole line or nothing at a time."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from reinforcepp.data import ColumnNames, conversation_text, read_table
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file

COLUMNS = ("prompt", "chosen", "rejected")


class PreferenceFile:
    """A file of preference pairs that ``reinforcepp reward`` reads, new or not.

    JSONL holds conversations in TRL's form, CSV the text as which the prompt of a conversation is trained on.

    Raises:
        ConfigError: the file can't be written, or is a CSV without the columns.
        DataError: what it holds can't be read.
    """

    def __init__(self, name: str) -> None:
        self.path = check_output_file(name, "preferences")
        self._columns: Sequence[str] = COLUMNS
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"{name} can't be written: there is no permission; give another file.")
        read_table(self.path, ColumnNames(), pairs=True)
        if self._is_csv:
            self._columns = _header(self.path)

    def append(self, messages: Sequence[Mapping[str, str]], chosen: str, rejected: str) -> None:
        """Add a pair. Raises OSError, and leaves the file as it was, where it can't be written."""
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            head = self._row(dict(zip(COLUMNS, COLUMNS, strict=True))) if self._is_csv and size == 0 else ""
            if size and os.pread(handle, 1, size - 1) != b"\n":
                head = "\n"
            row = self._pair(messages, chosen, rejected)
            try:
                _write_all(handle, (head + row).encode())
            except OSError:
                os.ftruncate(handle, size)
                raise
            os.fsync(handle)
        finally:
            os.close(handle)

    @property
    def _is_csv(self) -> bool:
        return self.path.suffix.lower() == ".csv"

    def _pair(self, messages: Sequence[Mapping[str, str]], chosen: str, rejected: str) -> str:
        if self._is_csv:
            texts = (conversation_text(messages), chosen, rejected)
            return self._row({name: text.replace("\0", "\ufffd") for name, text in zip(COLUMNS, texts, strict=True)})
        answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
        return json.dumps(dict(zip(COLUMNS, (messages, *answers), strict=True)), ensure_ascii=False) + "\n"

    def _row(self, cells: Mapping[str, str]) -> str:
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(cells.get(c, "") for c in self._columns)
        return text.getvalue()


def _header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = [name.strip() for name in next(csv.reader(file), [])]
    if not set(COLUMNS) <= set(names):
        raise ConfigError(
            f"{path} has the columns {', '.join(names)}, where a pair is written to prompt, chosen and rejected: rename "
            "them or give another file."
        )
    return names


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
