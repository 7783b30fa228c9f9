"""Call functions of users at the same time, each within a time limit."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

MAX_CONCURRENT = 64
MAX_HANGING = 64
"""Threads that didn't return in time; a thread can't be ended."""


class TimedOut(Exception):
    """A call took too long."""


class TimedCalls:
    """Calls functions in threads, and awaits what ``async`` functions return in one event loop."""

    def __init__(self) -> None:
        self.hanging = 0
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, functions: Sequence[Callable[[], Any]], limits: Sequence[float | None]) -> list[tuple[Any, float]]:
        """Return the result of each function and the seconds that it took.

        The result is the exception that it raised, or :class:`TimedOut` if it took longer than its limit, in seconds.
        """
        if not functions:
            return []
        if self._loop is None:  # one loop for all calls, because sessions and locks of asyncio belong to a loop
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name="environments", daemon=True).start()
        return asyncio.run_coroutine_threadsafe(self._all(functions, limits), self._loop).result()

    def close(self) -> None:
        """Stop the event loop."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    async def _all(
        self, functions: Sequence[Callable[[], Any]], limits: Sequence[float | None]
    ) -> list[tuple[Any, float]]:
        places = asyncio.Semaphore(MAX_CONCURRENT)

        async def call(function: Callable[[], Any], seconds: float | None) -> tuple[Any, float]:
            async with places:
                start = time.monotonic()
                try:
                    async with asyncio.timeout(seconds) as limit:
                        result = await self._result(function)
                except Exception as error:  # code of users can raise anything
                    result = TimedOut() if limit.expired() else error
                return result, time.monotonic() - start

        return list(await asyncio.gather(*map(call, functions, limits)))

    async def _result(self, function: Callable[[], Any]) -> Any:
        value = await self._in_thread(function)
        if not inspect.isawaitable(value):
            return value
        task = asyncio.current_task()
        try:
            return await value
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # by the time limit
            raise _as_exception(error) from error

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` in a separate thread; unlike those of asyncio, it doesn't keep the process from ending."""
        loop, finished = asyncio.get_running_loop(), asyncio.Event()
        result: list[Any] = []

        def run() -> None:
            try:
                result.append((True, function()))
            except BaseException as error:
                result.append((False, error))
            loop.call_soon_threadsafe(finished.set)

        threading.Thread(target=run, daemon=True).start()
        try:
            await finished.wait()
        finally:
            self.hanging += not result
        succeeded, value = result[0]
        if succeeded:
            return value
        raise _as_exception(value)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run the loop until it is stopped; a task of users that calls ``sys.exit`` ends it, and then all calls would hang."""
    while True:
        try:
            return loop.run_forever()
        except (SystemExit, KeyboardInterrupt):
            pass


def _as_exception(error: BaseException) -> Exception:
    """Return an error that isn't an ``Exception``, such as ``SystemExit``, as one, with its place."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}".rstrip(": ")).with_traceback(error.__traceback__)
