"""The process in which tools run: it reads calls and writes results, one JSON object per line.

Its standard streams are closed to tools: what a tool prints is dropped, and input is empty. The process ends with the one that
started it, also in the middle of a call.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
from queue import SimpleQueue
from typing import Any

from reinforcepp.errors import ReinforceError
from reinforcepp.rewards.user_code import load_object
from reinforcepp.runtime.process import outcome

TOOL = "tool"


def main() -> None:
    """Load the tools that the first line names, then answer each further line."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in requests:
            lines.put(line)
        os.killpg(0, signal.SIGKILL)  # with the processes that a tool started

    threading.Thread(target=read, daemon=True).start()
    first = json.loads(lines.get())
    sys.path[:] = first["path"]
    try:
        functions = {name: load_object(source, TOOL) for name, source in first["tools"].items()}
    except ReinforceError as error:
        _write(replies, error=str(error))
        return
    _write(replies, ready=True)
    process = os.getpid()
    while True:
        call = json.loads(lines.get())
        content, failed = result_of(functions[call["name"]], call["arguments"], first["limit"])
        if os.getpid() != process:  # a tool forked, and this is the copy, whose reply would answer another call
            os._exit(0)
        _write(replies, content=content, failed=failed)


def _write(replies: Any, **message: Any) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def result_of(function: Any, arguments: dict[str, Any], limit: int) -> tuple[str, bool]:
    """Return the text of a function's result, up to ``limit`` characters, and whether it raised an exception."""
    try:
        value = function(**arguments)
        if inspect.isawaitable(value):
            value = outcome(_result(value))
        return _truncated(_text(value), limit), False
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # code of users can raise anything, and leave by sys.exit
        return _truncated(f"{type(error).__name__}: {error}".rstrip(": "), limit), True


async def _result(value: Any) -> Any:
    return await value


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode()  # a half of a surrogate pair can't be tokenized


def _truncated(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"


if __name__ == "__main__":
    main()
