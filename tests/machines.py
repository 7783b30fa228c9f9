"""Two machines, network namespaces joined by a cable, and what is started on them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
from network import Network, network

SOURCE = Path(__file__).parents[1] / "src"
PORT = 29500
PLAIN = {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SLOW = """
import time

def slow(prompts, completions, **_):
    time.sleep(0.2)
    return [float(len(text) % 5) for text in completions]
"""


class Machines:
    """Two of them; what is started there ends with them."""

    def __init__(self, joined: Network, place: Path) -> None:
        self.network, self.place = joined, place
        self.started: list[psutil.Popen] = []

    def start(self, far: bool, *command: str, **environment: str) -> psutil.Popen:
        """Run a command of Python's on one of them, what it prints is in ``log`` of its place among the commands."""
        words = [*self.network.command(far), sys.executable, *map(str, command)]
        with self.log(len(self.started)).open("w") as log:
            given = os.environ | PLAIN | environment
            process = psutil.Popen(words, env=given, stdout=log, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def processes(self, flags: list[str], *launcher: str) -> list[psutil.Popen]:
        """A training by torchrun with one process on each."""
        started = []
        for rank in (0, 1):
            command = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1"]
            command += ["--master_addr", self.network.here, "--master_port", PORT, *launcher]
            interface = "inside" if rank else self.network.cable
            command += ["-m", "reinforcepp", "train", *flags]
            started.append(self.start(bool(rank), *command, GLOO_SOCKET_IFNAME=interface))
        return started

    def ray_node(self, far: bool, cpus: int, head: bool = False, head_far: bool = False, **health: str) -> psutil.Popen:
        """A node of a Ray cluster, once it is there."""
        ends = (self.network.here, self.network.host)
        whom = ["--head", "--port", PORT, "--include-dashboard=false", "--temp-dir", self.place]
        whom = whom if head else ["--address", f"{ends[head_far]}:{PORT}"]
        command = ["-m", "ray.scripts.scripts", "start", *whom, "--node-ip-address", ends[far], "--num-cpus", cpus]
        node = self.start(far, *command, "--disable-usage-stats", "--block", **health)
        self.until(lambda: "Ray runtime started" in self.text(node), node)
        return node

    def until(self, sign: Callable[[], bool], *processes: psutil.Popen, seconds: float = 240) -> None:
        """Wait for a sign of these processes, which run; an AssertionError tells what they say if it doesn't come."""
        end = time.monotonic() + seconds
        while not sign():
            gone = time.monotonic() > end or any(process.poll() is not None for process in processes)
            assert not gone, "\n\n".join(self.text(process)[-4000:] for process in processes)
            time.sleep(0.05)

    def kill(self, process: psutil.Popen) -> None:
        """It and what it has started."""
        for each in [*process.children(recursive=True), process]:
            each.kill()

    def log(self, number: int) -> Path:
        return self.place / f"log-{number}"

    def text(self, process: psutil.Popen) -> str:
        return self.log(self.started.index(process)).read_text(errors="replace")

    def end(self) -> None:
        """Whoever is in these namespaces, also what was left to itself."""
        for name in filter(None, (self.network.name, self.network.near)):
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
            for number in found.stdout.split():
                if psutil.pid_exists(int(number)):
                    psutil.Process(int(number)).kill()
        for process in self.started:
            process.wait(60)
        self.network.remove()


@contextmanager
def two_machines() -> Iterator[Machines]:
    """None can be made without the rights for it, which is a PermissionError."""
    joined = network(apart=True)
    if joined is None:
        raise PermissionError("network namespaces need rights that this user or machine hasn't")
    with TemporaryDirectory(prefix="m") as place:  # a short path, as those of sockets have to be
        made = Machines(joined, Path(place))
        try:
            yield made
        finally:
            made.end()


def training(model: object, data: object, folder: Path, *more: object) -> list[str]:
    """Flags of one that takes its time."""
    (folder.parent / "own.py").write_text(SLOW)
    named = {"model": model, "data": data, "rewards": f"{folder.parent / 'own.py'}:slow", "output_dir": folder}
    named |= {"max_steps": 400, "max_new_tokens": 6, "max_prompt_length": 40, "batch_size": 4, "eval_prompts": 0}
    return [str(word) for name, value in named.items() for word in (f"--{name}", value)] + list(map(str, more))
