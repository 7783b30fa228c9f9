"""Two nodes for tests: network namespaces joined by a virtual cable, and the processes started on them."""

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
    """Two nodes. Their processes end with them."""

    def __init__(self, joined: Network, place: Path) -> None:
        self.network, self.place = joined, place
        self.started: list[psutil.Popen] = []

    def start(self, far: bool, *command: str, **environment: str) -> psutil.Popen:
        """Run ``python *command`` on a node; its output goes to the log with the index of the command."""
        words = [*self.network.command(far), sys.executable, *map(str, command)]
        with self.log(len(self.started)).open("w") as log:
            given = os.environ | PLAIN | environment
            process = psutil.Popen(words, env=given, stdout=log, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def processes(self, flags: list[str], *launcher: str) -> list[psutil.Popen]:
        """Start a training by torchrun with one rank per node."""
        started = []
        for rank in (0, 1):
            command = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1"]
            command += ["--master_addr", self.network.here, "--master_port", PORT, *launcher]
            interface = "inside" if rank else self.network.cable
            command += ["-m", "reinforcepp", "train", *flags]
            started.append(self.start(bool(rank), *command, GLOO_SOCKET_IFNAME=interface))
        return started

    def ray_node(self, far: bool, cpus: int, head: bool = False, head_far: bool = False, **health: str) -> psutil.Popen:
        """Start a node of a Ray cluster and wait until it runs."""
        ends = (self.network.here, self.network.host)
        whom = ["--head", "--port", PORT, "--include-dashboard=false", "--temp-dir", self.place]
        whom = whom if head else ["--address", f"{ends[head_far]}:{PORT}"]
        command = ["-m", "ray.scripts.scripts", "start", *whom, "--node-ip-address", ends[far], "--num-cpus", cpus]
        node = self.start(far, *command, "--disable-usage-stats", "--block", **health)
        self.until(lambda: "Ray runtime started" in self.text(node), node)
        return node

    def until(self, sign: Callable[[], bool], *processes: psutil.Popen, seconds: float = 240) -> None:
        """Wait until ``sign`` returns true. Raise AssertionError with the logs if a process ends or time runs out."""
        end = time.monotonic() + seconds
        while not sign():
            gone = time.monotonic() > end or any(process.poll() is not None for process in processes)
            assert not gone, "\n\n".join(self.text(process)[-4000:] for process in processes)
            time.sleep(0.05)

    def kill(self, process: psutil.Popen) -> None:
        """Kill a process and its children."""
        for each in [*process.children(recursive=True), process]:
            each.kill()

    def log(self, number: int) -> Path:
        return self.place / f"log-{number}"

    def text(self, process: psutil.Popen) -> str:
        return self.log(self.started.index(process)).read_text(errors="replace")

    def end(self) -> None:
        """Kill all processes in the namespaces, orphans included, and remove the namespaces."""
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
    """Yield two nodes. Raise PermissionError if this user can't create network namespaces."""
    joined = network(apart=True)
    if joined is None:
        raise PermissionError("network namespaces need rights that this user or machine hasn't")
    with TemporaryDirectory(prefix="m") as place:  # short, because paths of sockets are limited to 107 bytes
        made = Machines(joined, Path(place))
        try:
            yield made
        finally:
            made.end()


def training(model: object, data: object, folder: Path, *more: object) -> list[str]:
    """Return the flags of a training that is slow enough to be interrupted."""
    (folder.parent / "own.py").write_text(SLOW)
    named = {"model": model, "data": data, "rewards": f"{folder.parent / 'own.py'}:slow", "output_dir": folder}
    named |= {"max_steps": 400, "max_new_tokens": 6, "max_prompt_length": 40, "batch_size": 4, "eval_prompts": 0}
    return [str(word) for name, value in named.items() for word in (f"--{name}", value)] + list(map(str, more))
