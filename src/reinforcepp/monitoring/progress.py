"""Progress of long work: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from reinforcepp.runtime import is_main

LINES_WHEN_PLAIN = 12
HARMLESS = "\n\t\u200d"  # of the control and format characters; the last one joins emoji

console = Console(stderr=True, highlight=False, quiet=not is_main())


def echo(text: str, style: str = "") -> None:
    """One line for the user, on standard error; ``text`` is shown as it is, markup and control characters inert."""
    console.print(printable(text), style=style, markup=False, soft_wrap=True)


def printable(text: str) -> str:
    """``text`` without the control characters by which a model or a file could steer the user's terminal."""
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" and c not in HARMLESS else c for c in text)


@contextmanager
def reading_progress(shown: bool, title: str = "reading data") -> Iterator[Callable[[float], None]]:
    """Progress of a pass over large data: gives what is to be told which share of it is done."""
    if not shown:
        yield lambda share: None
        return
    with Progress(f"{title}, %", 100) as progress:

        def told(share: float) -> None:
            while progress.done < min(100, int(100 * share)):
                progress.step("")

        yield told


class Progress:
    """``with Progress("training", 40) as p: p.step("reward 0.3")`` shows place, message and time left."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._begin, self._first = time.monotonic(), done
        self._live: RichProgress | None = None
        if console.is_terminal:
            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
            self._live = RichProgress(*columns, TextColumn("{task.fields[message]}", markup=False), console=console)
            self._task = self._live.add_task(title, total=total, completed=done, message="")

    def __enter__(self) -> Progress:
        """Show the line."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the line as it stands."""
        if self._live:
            self._live.stop()

    def step(self, message: str) -> None:
        """One more unit of work is done."""
        self.done += 1
        if self._live:
            self._live.update(self._task, completed=self.done, message=message)
        elif self.done == self.total or self.done % max(1, self.total // LINES_WHEN_PLAIN) == 0:
            per_step = (time.monotonic() - self._begin) / (self.done - self._first)
            left = per_step * (self.total - self.done)
            echo(", ".join(filter(None, (f"{self.title} {self.done}/{self.total}", message, f"{left:.0f} s left"))))
