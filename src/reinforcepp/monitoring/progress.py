"""Progress of long tasks: a live line on a terminal, plain lines otherwise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from reinforcepp.runtime.process import is_silent
from reinforcepp.runtime.terminal import console, echo

PLAIN_LINES = 12
PROGRESS_ROWS = 5000
"""Number of rows from which a pass over data takes long enough for a progress bar."""


@contextmanager
def reading_progress(shown: bool, title: str = "reading data") -> Iterator[Callable[[float], None]]:
    """Show progress of a pass over large data; yield a function that takes the finished share."""
    if not shown:
        yield lambda share: None
        return
    with Progress(f"{title}, %", 100) as progress:

        def update(share: float) -> None:
            while progress.done < min(100, int(100 * share)):
                progress.step("")

        yield update


class Progress:
    """``with Progress("training", 40) as p: p.step("reward 0.3")`` shows position, message and remaining time."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self.title, self.total, self.done = title, total, done
        self._begin, self._first = time.monotonic(), done
        self._live: RichProgress | None = None
        if console.is_terminal and not is_silent():
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            ]
            self._live = RichProgress(*columns, TextColumn("{task.fields[message]}", markup=False), console=console)
            self._task = self._live.add_task(title, total=total, completed=done, message="")

    def __enter__(self) -> Progress:
        """Start the live line."""
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the live line and keep its last state."""
        if self._live:
            self._live.stop()

    def step(self, message: str = "", units: int = 1) -> None:
        """Report that ``units`` more are done."""
        before, every = self.done, max(1, self.total // PLAIN_LINES)
        self.done += units
        if self._live:
            self._live.update(self._task, completed=self.done, total=self.total, message=message)
        elif self.done == self.total or self.done // every > before // every:
            per_step = (time.monotonic() - self._begin) / (self.done - self._first)
            left = per_step * (self.total - self.done)
            echo(", ".join(filter(None, (f"{self.title} {self.done}/{self.total}", message, f"{left:.0f} s left"))))
