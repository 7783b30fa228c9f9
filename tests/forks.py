"""Attacks in a process of their own, which is stopped after a few seconds."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

SECONDS = 8


def attacked(code: str) -> str:
    """Return how ``code`` ended in a process with a time limit."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(code, send))
    start = time.monotonic()
    process.start()
    ended = receive.poll(SECONDS)
    process.kill()
    process.join()
    return f"{receive.recv()} after {time.monotonic() - start:.1f} s" if ended else f"still running after {SECONDS} s"


def _run(code: str, connection: Connection) -> None:
    try:
        exec(code, {})
    except Exception as error:
        connection.send(f"{type(error).__name__}: {str(error)[:120]}")
    else:
        connection.send("ended")
