"""Waiting for asynchronous work from code that isn't, also in a notebook, whose own loop runs."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def outcome(work: Coroutine[Any, Any, T]) -> T:
    """What ``work`` gives, when it is done."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as other:  # a loop that runs can't be waited for from within
        return other.submit(asyncio.run, work).result()
