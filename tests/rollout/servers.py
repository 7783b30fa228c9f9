"""Real ``vllm serve`` processes on this CPU, optionally in a separate network namespace."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest
import torch
from network import Network

from reinforcepp.models.loading import load_config
from reinforcepp.rollout.vllm.server import server_command, server_environment

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src"
KEY = "sk-quite-secret"
START_SECONDS = 400


class Served:
    """A server for a model folder; it is started but possibly not ready."""

    def __init__(self, log: Path, model: Path, *flags: str, network: Network | None = None) -> None:
        self.host, self.port, self.log = (network.host if network else "127.0.0.1"), free_port(), log
        self.command = server_command(
            str(model),
            load_config(str(model)),
            torch.float32,
            host=self.host,
            port=self.port,
            name="served",
            max_length=256,
            batch_size=64,
            chat_template=None,
            on_gpu=torch.cuda.is_available(),
        )
        self.command += ["--logprobs-mode=processed_logprobs", *flags]
        if network:
            self.command = ["ip", "netns", "exec", network.name, *self.command]
        self.environment = server_environment(os.environ, KEY) | {
            "PYTHONPATH": f"{SOURCE}{os.pathsep}{TESTS}",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_SERVER_DEV_MODE": "1",
        }
        self.start()

    def start(self) -> None:
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while not self._responds():
            if self.process.poll() is not None or time.monotonic() > end:
                self.signal(signal.SIGKILL)
                pytest.fail(self.log.read_text(errors="replace")[-3000:])
            time.sleep(0.3)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def signal(self, number: int) -> None:
        """Send a signal to the server and its child processes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait(timeout=60)

    def _responds(self) -> bool:
        try:
            with build_opener(ProxyHandler({})).open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (URLError, OSError):
            return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
