"""A watchdog that ends a run without progress and writes the stacks of all threads to a file.

A call that holds the interpreter's lock, such as a regular expression that backtracks without end, stops every Python thread,
also the one that watches. Then a timer of faulthandler, which is a thread in C, prints the stacks to standard error.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from reinforcepp.errors import option
from reinforcepp.files import remove
from reinforcepp.runtime.process import is_first_here, is_main, started
from reinforcepp.runtime.terminal import print_at_once

STACKS = "stacks.txt"
GRACE_SECONDS = 10.0
"""Time after the limit in which the watching thread ends the process, before the timer does."""
_STANDARD_ERROR = 2


class Watchdog:
    """Ends the process with exit code 1 if ``beat`` isn't called for ``seconds``.

    It uses ``faulthandler.dump_traceback_later``, of which a process has only one.

    Args:
        folder: for stacks.txt.
        seconds: maximum time between two beats; 0 disables the watchdog.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self._path = folder / (STACKS if is_main() else f"{Path(STACKS).stem}-{os.environ['RANK']}.txt")
        self._seconds = seconds
        self._phase, self._last = "start", time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def beat(self, phase: str) -> None:
        """Report progress; ``phase`` begins now."""
        before, self._last, self._phase = self._last, time.monotonic(), phase
        if self._thread is not None and self._last - before > 1:  # otherwise, the thread set the timer a moment ago
            self._set_timer()

    def __enter__(self) -> Watchdog:
        """Start the watchdog."""
        if self._seconds:
            self._last = time.monotonic()
            self._set_timer()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the watchdog."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._end_process()
            self._set_timer()

    def _set_timer(self) -> None:
        """Let the timer end the process if the watching thread doesn't, because it never runs again."""
        left = self._last + self._seconds - time.monotonic()
        faulthandler.dump_traceback_later(max(0.0, left) + GRACE_SECONDS, file=_STANDARD_ERROR, exit=True)

    def _end_process(self) -> None:
        problem = f"No progress for {self._seconds:g} seconds in the phase {self._phase!r}."
        remove(self._path)  # of an earlier run, or a link of another user
        with open(self._path, "x", encoding="utf-8") as file:
            file.write(problem + " Stacks of all threads:\n\n")
            file.flush()
            faulthandler.dump_traceback(file)
        hint = " It might wait for ranks that hang or whose nodes are unreachable." if started() > 1 else ""
        message = (
            f"\nerror: {problem}{hint} The stacks of all threads are in {self._path}. Resume with {option('resume')}. "
        )
        if is_first_here():
            print_at_once(message + "If the phase is only slow, raise watchdog_seconds.")
        os._exit(1)
