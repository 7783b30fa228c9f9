"""Machines that no longer reach each other: a clear sentence within a bounded time, and the last checkpoint goes on.

The machines are network namespaces, joined by a cable.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
from network import Network, network

from reinforcepp import checkpoint, cli
from reinforcepp.distributed import _tell_unforeseen
from reinforcepp.observe import read_metrics
from scripts import ROOT

SLOW = """
import time

def slow(prompts, completions, **_):
    time.sleep(0.2)
    return [float(len(text) % 5) for text in completions]
"""
LOST = "they hang, or their machines can't be reached any more"  # the group's words
WAITS = "others that hang, or whose machines can't be reached any more"  # the watchdog's, where it is the first
PORT = 29500
POOL = """
import os, sys, time
from reinforcepp import cli
from reinforcepp.rollout import ray_pool

ray_pool.HEAD_SECONDS, ray_pool.CONNECT_SECONDS = 4, 2
inner = ray_pool.share_out

def told(crew, *rest):
    ray_pool.START_SECONDS = 5  # once it has started
    while os.path.exists(os.environ["PAUSE"]):
        print("paused", flush=True)
        time.sleep(0.2)
    answers, tally = inner(crew, *rest)
    print(len(crew.ready()), tally.lost, tally.again, flush=True)
    return answers, tally

ray_pool.share_out = told
sys.exit(cli.main(sys.argv[1:]))
"""
HEALTH = {  # after 5 seconds instead of Ray's 65 a machine from which nothing comes is held to be gone
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_gcs_server_request_timeout_seconds": "2",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": os.urandom(32).hex(),
}


class Machines:
    """Two of them; what is started there ends with them."""

    def __init__(self, joined: Network, place: Path) -> None:
        self.network, self.place = joined, place
        self.started: list[psutil.Popen] = []

    def start(self, far: bool, *command: str, **environment: str) -> psutil.Popen:
        """Run a command of Python's on one of them, what it prints is in ``log`` of its place among the commands."""
        plain = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        words = [*self.network.command(far), sys.executable, *map(str, command)]
        with self.log(len(self.started)).open("w") as log:
            process = psutil.Popen(words, env=os.environ | plain | environment, stdout=log, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

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
    joined = network(apart=True)
    if joined is None:
        pytest.skip("network namespaces need rights that this user or machine hasn't")
    with TemporaryDirectory(prefix="m") as place:  # a short path, as those of sockets have to be
        made = Machines(joined, Path(place))
        try:
            yield made
        finally:
            made.end()


@pytest.fixture
def machines():
    with two_machines() as made:
        yield made


def until(sign, machines: Machines, *processes: psutil.Popen, seconds: float = 240) -> None:
    """Wait for a sign of these processes, which run."""
    end = time.monotonic() + seconds
    while not sign():
        if time.monotonic() > end or any(process.poll() is not None for process in processes):
            pytest.fail("\n\n".join(machines.text(process)[-4000:] for process in processes))
        time.sleep(0.05)


def training(model, data, folder, *more: object) -> list[str]:
    (folder.parent / "own.py").write_text(SLOW)
    named = {"model": model, "data": data, "rewards": f"{folder.parent / 'own.py'}:slow", "output_dir": folder}
    named |= {"max_steps": 400, "max_new_tokens": 6, "max_prompt_length": 40, "batch_size": 4, "eval_prompts": 0}
    return [str(word) for name, value in named.items() for word in (f"--{name}", value)] + list(map(str, more))


def goes_on(model, data, folder) -> None:
    """One step more than the last checkpoint holds, in this process."""
    done = max(checkpoint.place_of(each)[0] for each in checkpoint.listed(folder))
    flags = training(model, data, folder, "--rollout", "transformers", "--resume", "--max_steps", done + 1)
    assert cli.main(["train", *flags, "--allow_changes", "max_steps,rollout,save_every,watchdog_seconds"]) == 0
    assert len(read_metrics(folder)) == done + 1


# --- several processes ------------------------------------------------------------------------------------------------


def processes(machines: Machines, flags: list[str], *launcher: str) -> list[psutil.Popen]:
    """One on each machine."""
    started = []
    for rank in (0, 1):
        command = ["-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", rank, "--nproc_per_node", "1"]
        command += ["--master_addr", machines.network.here, "--master_port", PORT, *launcher]
        interface = "inside" if rank else machines.network.cable
        command += ["-m", "reinforcepp", "train", *flags]
        started.append(machines.start(bool(rank), *command, GLOO_SOCKET_IFNAME=interface))
    return started


def test_machines_that_train_together_are_parted(model_folder, pairs_csv, tmp_path):
    """By a cable that is pulled out, and by one on which packets are lost."""
    with two_machines() as cut, two_machines() as lossy:
        runs = []
        for machines, strike in ((cut, cut.network.cut), (lossy, lossy.network.lose)):
            folder = tmp_path / strike.__name__
            flags = training(model_folder, pairs_csv, folder, "--rollout", "transformers", "--save_every", 1)
            both = processes(machines, [*flags, "--watchdog_seconds", "6"])
            runs.append((machines, strike, folder, both))
        for machines, strike, folder, both in runs:
            until((folder / "checkpoints" / "step-000001").is_dir, machines, *both)
            strike()
        for machines, _, folder, both in runs:
            for process in both:
                assert process.wait(60) == 1
                text = machines.text(process)
                assert text.count(LOST) + text.count(WAITS) == 1 and text.count("error: ") == 1, text
                assert "--resume" in text and "reinforcepp/cli.py" not in text  # a traceback is the launcher's own
            goes_on(model_folder, pairs_csv, folder)


def test_the_first_machine_is_not_there_or_its_port_is_taken(machines, model_folder, pairs_csv, tmp_path):
    """Of processes that were started without torchrun."""
    flags = training(model_folder, pairs_csv, tmp_path / "run", "--watchdog_seconds", "2")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": machines.network.here, "MASTER_PORT": str(PORT)}
    taken = machines.start(
        False, "-c", f"import socket, time; s = socket.create_server(('', {PORT + 1})); time.sleep(60)"
    )
    nobody = machines.start(True, "-m", "reinforcepp", "train", *flags, RANK="1", LOCAL_RANK="0", **place)
    place["MASTER_PORT"] = str(PORT + 1)
    first = machines.start(False, "-m", "reinforcepp", "train", *flags, RANK="0", LOCAL_RANK="0", **place)
    for process, port, words in ((nobody, PORT, "timed out after 2000ms"), (first, PORT + 1, "EADDRINUSE")):
        assert process.wait(60) == 2, machines.text(process)
        text = machines.text(process)
        assert (
            f"error: This process and the others of its training don't meet at {machines.network.here}:{port}" in text
        )
        assert words in text and "Traceback" not in text
    assert taken.poll() is None


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", " since "),
        ("Application timeout caused pair closure", LOST),
        ("Read error [10.0.0.2]:9: Connection timed out", LOST),
        ("Write error [10.0.0.2]:9: No route to host", LOST),
        ("Connection closed by peer [10.0.0.2]:9", "ended without a word"),
        ("shapes differ", "RuntimeError: shapes differ"),
    ],
)
def test_what_gloo_says_in_our_words(capsys, said, words):
    _tell_unforeseen(RuntimeError, RuntimeError(said), None)
    told = capsys.readouterr().err
    assert words in told and ("--resume" in told) == told.startswith("error: ") == (said not in told)


# --- pools ------------------------------------------------------------------------------------------------------------


def ray_node(machines: Machines, far: bool, cpus: int, head: bool = False, head_far: bool = False) -> psutil.Popen:
    ends = (machines.network.here, machines.network.host)
    whom = ["--head", "--port", PORT, "--include-dashboard=false", "--temp-dir", machines.place]
    whom = whom if head else ["--address", f"{ends[head_far]}:{PORT}"]
    command = ["-m", "ray.scripts.scripts", "start", *whom, "--node-ip-address", ends[far], "--num-cpus", cpus]
    node = machines.start(far, *command, "--disable-usage-stats", "--block", **HEALTH)
    until(lambda: "Ray runtime started" in machines.text(node), machines, node)
    return node


def pause(machines: Machines) -> Path:
    """While there is such a file, the trainer stands before it shares prompts out."""
    return machines.place / "pause"


def pool(machines: Machines, head: str, *flags: object) -> psutil.Popen:
    return machines.start(
        False, "-c", POOL, "train", *flags, "--rollout", f"ray://{head}:{PORT}", PAUSE=str(pause(machines)), **HEALTH
    )


def shared_out(machines: Machines, process: psutil.Popen) -> list[list[int]]:
    """For each step: workers that were ready, those that were lost, prompts that were given out again."""
    lines = [line.split() for line in machines.text(process).splitlines()]
    return [list(map(int, words)) for words in lines if len(words) == 3 and all(word.isdigit() for word in words)]


def test_a_node_of_the_pool_is_cut_off_and_comes_back(machines, model_folder, pairs_csv, tmp_path):
    pytest.importorskip("ray")
    folder, net = tmp_path / "run", machines.network
    ray_node(machines, far=False, cpus=1, head=True)
    far = ray_node(machines, far=True, cpus=1)
    trainer = pool(machines, net.here, *training(model_folder, pairs_csv, folder, "--max_steps", 4000))
    until(lambda: [2, 0, 0] in shared_out(machines, trainer), machines, trainer)
    pause(machines).touch()
    until(lambda: "paused" in machines.text(trainer), machines, trainer)
    net.cut()
    pause(machines).unlink()
    until(lambda: any(lost == 1 and again for _, lost, again in shared_out(machines, trainer)), machines, trainer)
    steps = len(shared_out(machines, trainer))
    until(lambda: len(shared_out(machines, trainer)) > steps + 1, machines, trainer)
    assert shared_out(machines, trainer)[-1] == [1, 0, 0]
    net.mend()
    far.wait(60)  # Ray ends it when it is told that it was held to be dead
    far = ray_node(machines, far=True, cpus=1)
    until(lambda: shared_out(machines, trainer)[-1] == [2, 0, 0], machines, trainer)


def test_the_head_of_the_pool_is_cut_off(machines, model_folder, pairs_csv, tmp_path):
    pytest.importorskip("ray")
    folder, net = tmp_path / "run", machines.network
    ray_node(machines, far=True, cpus=1, head=True)
    ray_node(machines, far=False, cpus=0, head_far=True)
    trainer = pool(machines, net.host, *training(model_folder, pairs_csv, folder))
    until(lambda: shared_out(machines, trainer), machines, trainer)
    net.lose()
    until(lambda: "error: " in machines.text(trainer), machines, trainer)
    machines.kill(trainer)  # Ray takes its leave of the head for two minutes
    text = machines.text(trainer)
    assert f"error: The head of the Ray cluster, {net.host}:{PORT}, can't be reached any more, for 4 seconds" in text
    assert "The run is saved after step" in text and "Traceback" not in text, text
    goes_on(model_folder, pairs_csv, folder)
