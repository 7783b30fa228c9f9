"""Everything this package prints. Text of models, files and servers can't control the terminal; messages show no secret.

An escape sequence can set the window title, write to the clipboard, or overwrite earlier lines, and a bidirectional override
can show a name as another one. So the functions here print all output, which a test checks. For the output of libraries,
commands run in :func:`guarded_streams`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import TracebackType
from typing import IO, Any, TextIO, cast

from rich import console as rich_console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from reinforcepp.runtime.process import is_main, is_silent
from reinforcepp.runtime.redaction import redacted

WARNING = "yellow"
"""Style of a warning."""
REPLACEMENT = "\ufffd"
# Arabic, Persian, Indic, Khmer and Hebrew text and emoji need the other format characters: joiners (U+200B to U+200D), weak
# directional marks (U+200E, U+200F, U+061C), signs such as U+06DD, soft hyphens, and variation selectors.
_UNSAFE = re.compile(
    "(?P<flag>\U0001f3f4[\U000e0061-\U000e007a]{5}\U000e007f)|"  # England, Scotland, Wales: tags that must be kept
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 and C1 control characters except tab and newline
    "\u202a-\u202e\u2060-\u206f"  # bidirectional embeddings, overrides and isolates; invisible operators
    "\ufeff\ufff9-\ufffb"  # byte order mark, interlinear annotations
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff"  # shorthand and musical formats, invisible tags
    "\ud800-\udfff]"  # lone surrogates, which can't be encoded
)
_SEPARATORS = str.maketrans(dict.fromkeys("\u2028\u2029", REPLACEMENT))  # of lines and paragraphs
_CONTINUED = re.compile(r"(?<=[^\n])(\n+)(?=\S)")
_COLORS = re.compile(r"(\x1b\[[\d;:]*m)")
_RESET = "\x1b[0m"
_MOVES = re.compile(r"[\r\n]*(?:\x1b\[A)*")  # the writes with which tqdm moves between bars


def printable(text: str) -> str:
    """Return ``text`` with U+FFFD for each character that controls the terminal or reorders or hides text.

    Tabs, newlines, and the format characters that scripts and emoji need are kept.
    """
    return _UNSAFE.sub(lambda match: match["flag"] or REPLACEMENT, text.replace("\r\n", "\n"))


def one_message(text: str) -> str:
    """Return :func:`printable` text whose further lines are indented, so that they can't look like other messages."""
    return _CONTINUED.sub(r"\1  ", printable(text).translate(_SEPARATORS))


class _Guard:
    """A text stream that keeps colors and what progress bars of libraries need, and makes everything else printable."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        if not _MOVES.fullmatch(text):
            start = "\r" if text.startswith("\r") and not text.startswith("\r\n") else ""
            parts = _COLORS.split(text.removeprefix(start))  # every second part is a color
            text = start + "".join(part if i % 2 else printable(part) for i, part in enumerate(parts))
            if len(parts) > 1 and parts[-2] != _RESET:  # A style such as "concealed" must not hide later lines.
                text += _RESET
        return self.stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Console(rich_console.Console):
    """A console of rich that prints text literally and :func:`printable`. Raises BrokenPipeError if its pipe is closed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False} | options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a message, a title or a cell as :func:`one_message`."""
        return super().render_str(one_message(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of a renderable."""
        if isinstance(renderable, Text):  # before it is laid out, because the replacement takes a column
            renderable = renderable.copy()
            renderable.plain = printable(renderable.plain)
        for segment in super().render(renderable, options):
            style = segment.style.update_link(None) if segment.style and segment.style.link else segment.style
            yield segment if segment.control else Segment(printable(segment.text), style)

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError, which the command line handles; rich would exit."""
        raise  # called in an except block

    @property
    def file(self) -> IO[str]:
        """The stream; its own escape sequences pass the guard."""
        file = super().file
        return file.stream if isinstance(file, _Guard) else file

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


console = Console(stderr=True, quiet=not is_main())


def echo(text: str, style: str = "") -> None:
    """Print one message to standard error on rank 0.

    In a block of ``silence``, a warning becomes a Python warning, and other messages aren't printed.
    """
    if is_silent():
        if style == WARNING and is_main():
            warn(text)
        return
    console.print(redacted(text), style=style, soft_wrap=True)


def print_error(problem: str | BaseException) -> None:
    """Print one message, or the traceback of an exception, to standard error on this rank."""
    parts = [problem] if isinstance(problem, str) else traceback.format_exception(problem)
    sys.stderr.write("".join(one_message(redacted(part)) for part in parts).rstrip() + "\n")
    sys.stderr.flush()


def print_at_once(text: str) -> None:
    """Print one message to standard error without Python's streams, in a signal handler or before the process is ended."""
    os.write(2, f"{one_message(redacted(text))}\n".encode(errors="replace"))


def echo_from_handler(text: str, style: str = "") -> None:
    """Print a message as ``echo`` does, in a signal handler, which can interrupt another print."""
    try:
        echo(text, style)
    except RuntimeError:  # a stream can't be entered again in the middle of a write
        print_at_once(text)


def print_output(text: str, end: str = "\n") -> None:
    """Print the result of a command to standard output. A closed pipe raises here, not when Python exits."""
    sys.stdout.write(printable(text) + end)
    sys.stdout.flush()


def print_json(text: str) -> None:
    """Print ASCII-only JSON without a change of its data to standard output."""
    print_output(text.replace("\x7f", "\\u007f"), end="")


def warn(text: str, stacklevel: int = 2) -> None:
    """Issue a Python warning; a ``stacklevel`` of 2 names the line that called the caller."""
    warnings.warn(one_message(redacted(text)), stacklevel=stacklevel + 1)


class _PrintableRecords(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = one_message(redacted(record.getMessage())), ()
        return True


@cache
def logger(name: str) -> logging.Logger:
    """Return the logger of a module; its messages are :func:`printable` and without secrets for every handler."""
    named = logging.getLogger(name)
    named.addFilter(_PrintableRecords())
    return named


@cache
def warn_once(text: str) -> None:
    """Log a warning, once per process."""
    logger("reinforcepp").warning("%s", text)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """In this block, make everything printable that Python code writes to standard output and standard error.

    Libraries and users' functions print, log, warn and raise there. Colors pass, and so do the moves of progress bars.
    """
    before = sys.stdout, sys.stderr, sys.excepthook
    sys.stdout, sys.stderr = (cast(TextIO, _Guard(stream)) for stream in before[:2])
    sys.excepthook = _print_uncaught
    yield
    sys.stdout, sys.stderr, sys.excepthook = before  # not after an exception, which sys.excepthook still reports


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print_error(error.with_traceback(trace))
