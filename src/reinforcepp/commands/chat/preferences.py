"""The file of preference pairs. A pair is appended completely or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from reinforcepp.data import ColumnNames, read_table
from reinforcepp.errors import ConfigError
from reinforcepp.files import check_output_file
from reinforcepp.types import Prompt

COLUMNS = ("prompt", "chosen", "rejected")


class PreferenceFile:
    """A new or existing file of preference pairs that ``reinforcepp reward`` can read.

    JSONL contains conversations in TRL's format, as they were sampled. CSV contains texts, so it can't hold the messages of a
    conversation: see ``is_csv``.

    Raises:
        ConfigError: If the file can't be written, or is a CSV without the columns.
        DataError: If the rows of the file can't be read.
    """

    def __init__(self, name: str) -> None:
        self.path = check_output_file(name, "preferences")
        self._columns: Sequence[str] = COLUMNS
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not os.access(self.path, os.W_OK):
            raise ConfigError(f"preferences: no permission to write {name}. Give another file.")
        read_table(self.path, ColumnNames(), pairs=True)
        if self.is_csv:
            self._columns = _header(self.path)

    def append(self, prompt: Prompt, chosen: str, rejected: str) -> None:
        """Append a pair.

        Raises:
            OSError: If the file can't be written. Its content stays unchanged.
        """
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            head = self._row(dict(zip(COLUMNS, COLUMNS, strict=True))) if self.is_csv and size == 0 else ""
            if size and os.pread(handle, 1, size - 1) != b"\n":
                head = "\n"
            row = self._pair(prompt, chosen, rejected)
            try:
                _write_all(handle, (head + row).encode())
            except OSError:
                os.ftruncate(handle, size)
                raise
            os.fsync(handle)
        finally:
            os.close(handle)

    @property
    def is_csv(self) -> bool:
        """Whether the file holds texts instead of messages."""
        return self.path.suffix.lower() == ".csv"

    def _pair(self, prompt: Prompt, chosen: str, rejected: str) -> str:
        if self.is_csv:
            texts = (prompt.text, chosen, rejected)
            return self._row({name: text.replace("\0", "\ufffd") for name, text in zip(COLUMNS, texts, strict=True)})
        answers = {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        cells = prompt.cells
        return json.dumps({"prompt": cells.pop("prompt"), **answers, **cells}, ensure_ascii=False) + "\n"

    def _row(self, cells: Mapping[str, str]) -> str:
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(cells.get(c, "") for c in self._columns)
        return text.getvalue()


def _header(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        names = [name.strip() for name in next(csv.reader(file), [])]
    if not set(COLUMNS) <= set(names):
        raise ConfigError(
            f"preferences: {path} has the columns {', '.join(names)}, not prompt, chosen and rejected. Rename them or give "
            "another file."
        )
    return names


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]
