"""``reinforcepp serve`` in a separate process, for tests of its command and for attacks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import SOURCE

KEY = "sk-quite-secret"


class Server:
    """``reinforcepp serve`` in a separate process, ready to be asked."""

    def __init__(self, folder: Path, *, model: str = "builtin:tiny", with_key: bool = True, **environment: str) -> None:
        self.port = free_port()
        self.log = folder / "log"
        (folder / "key").write_text(f"{KEY}\n")
        command = [sys.executable, "-m", "reinforcepp", "serve", model, "--port", str(self.port)]
        command += ["--api_key_file", str(folder / "key")] if with_key else []
        own = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment
        self.process = subprocess.Popen(
            command, env=os.environ | own, stdout=self.log.open("w"), stderr=subprocess.STDOUT
        )
        end = time.monotonic() + 300
        while "press Ctrl-C" not in self.said:
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.terminate()
                pytest.fail(self.said)
            time.sleep(0.3)

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def children(self) -> list[int]:
        """Every process that has come from it."""
        found, todo = [], [self.process.pid]
        while todo:
            pid = todo.pop()
            try:
                children = [
                    int(child)
                    for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()
                ]
            except OSError:
                children = []
            found += children
            todo += children
        return found

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
