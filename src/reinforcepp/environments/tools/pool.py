"""Worker processes for calls of tools: a call that takes too long ends with its process, and the next one gets a new process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import LifoQueue
from typing import Any

from reinforcepp.environments.tools.schemas import Tool
from reinforcepp.errors import ConfigError
from reinforcepp.runtime.process import python_path

MODULE = "reinforcepp.environments.tools.worker"
MAX_WORKERS = 16
START_SECONDS = 60.0
"""Time in which a worker must import the tools."""
MAX_RESULT_CHARACTERS = 4_000


@dataclass(frozen=True)
class ToolResult:
    """The text of a result, or of an error."""

    content: str
    failed: bool = False


class ToolPool:
    """Runs calls of ``tools``, each in one of up to :data:`MAX_WORKERS` processes, which start when they are needed.

    Args:
        tools: the tools.
        timeout: seconds for each call.

    Raises:
        ConfigError: a worker process can't import a tool.
    """

    def __init__(self, tools: Sequence[Tool], timeout: float) -> None:
        self.timeout = timeout
        self._sources = {tool.name: tool.source for tool in tools}
        self._idle: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(MAX_WORKERS - 1):
            self._idle.put(None)
        self._idle.put(_Worker(self._sources))

    def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Return the result of a call; an exception of the tool is a result, too. Threads can call at the same time."""
        worker = self._idle.get()
        try:
            worker = worker or _Worker(self._sources)
            return worker.call(name, arguments, self.timeout)
        finally:
            self._idle.put(worker if worker and worker.usable() else None)

    def close(self) -> None:
        """End the processes; no call is in progress."""
        for worker in [self._idle.get() for _ in range(MAX_WORKERS)]:
            if worker is not None:
                worker.stop()
            self._idle.put(None)


class _Worker:
    """One process, in a separate session, so that it ends together with processes that a tool started."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": python_path()},
            start_new_session=True,
            encoding="utf-8",
        )
        self._killed = False
        try:
            reply = self._exchange({"path": sys.path, "tools": sources, "limit": MAX_RESULT_CHARACTERS}, START_SECONDS)
        except (EOFError, TimeoutError):
            reply = {"error": f"it ended, or needed more than {START_SECONDS:g} s."}
        if "ready" not in reply:
            self.stop()
            raise ConfigError(f"tools: a worker process can't import them: {reply['error']}")

    def call(self, name: str, arguments: Mapping[str, Any], timeout: float) -> ToolResult:
        try:
            reply = self._exchange({"name": name, "arguments": arguments}, timeout)
        except EOFError:
            return ToolResult(f"{name} ended its process", failed=True)
        except TimeoutError:
            return ToolResult(f"{name} took longer than {timeout:g} seconds", failed=True)
        return ToolResult(reply["content"], reply["failed"])

    def usable(self) -> bool:
        """Return whether the process can take another call; end it otherwise."""
        if self._killed:
            self.stop()
        return not self._killed

    def stop(self) -> None:
        self._kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # a last line can't be written any more
                stream.close()  # type: ignore[union-attr]

    def _exchange(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the reply to ``message``.

        Raises:
            EOFError: the process ended without a reply.
            TimeoutError: it was killed after ``seconds``.
        """
        timer = threading.Timer(seconds, self._kill)
        timer.daemon = True  # a process that ends needn't wait for it
        timer.start()
        try:
            self._process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line.endswith("\n"):
            late = self._killed
            self._kill()
            raise TimeoutError if late else EOFError
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _kill(self) -> None:
        self._killed = True
        if self._process.returncode is None:  # until then, no other process has the number
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
