"""Prompts as the lines of a text file or of standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from reinforcepp.errors import DataError, setting


def read_prompt_lines(path: str | None) -> list[str]:
    """Return the non-blank lines of a file, or of standard input, one prompt per line.

    Raises:
        DataError: The file can't be read, isn't UTF-8, or holds no prompt.
    """
    name = path or "standard input"
    try:
        data = Path(path).expanduser().read_bytes() if path else sys.stdin.buffer.read()
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error.strerror}). Check {setting('prompts_file')}.") from error
    try:
        # Other line breaks of Unicode, such as U+2028, occur within a prompt.
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        row = data[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{row}: the line isn't valid UTF-8. Convert the file with `iconv -t utf-8`.") from error
    prompts = [line.removesuffix("\r") for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{name}: no prompt found. Give one per line, or use {setting('prompt')}.")
    return prompts
