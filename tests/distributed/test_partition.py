"""Nodes that lose their connection: a clear error within a bounded time, and the last checkpoint resumes.

The nodes are network namespaces joined by a virtual cable.
"""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from machines import PORT, Machines, training, two_machines
from network import network

from reinforcepp.commands import cli
from reinforcepp.distributed.ranks import _report_uncaught
from reinforcepp.monitoring import read_metrics
from reinforcepp.training import checkpoint

LOST = "They hang, or their nodes are unreachable"  # in the report of the process group
WAITS = "ranks that hang or whose nodes are unreachable"  # the watchdog's, where it is the first
POOL = """
import os, sys, time
from reinforcepp.commands import cli
from reinforcepp.rollout import pooled_engine
from reinforcepp.rollout.ray import actor_pool

actor_pool.HEAD_TIMEOUT_SECONDS, actor_pool.CONNECT_TIMEOUT_SECONDS = 4, 2
inner = pooled_engine.dispatch

def reporting(pool, *rest):
    actor_pool.WORKER_READY_TIMEOUT_SECONDS = 5  # once it has started
    while os.path.exists(os.environ["PAUSE"]):
        print("paused", flush=True)
        time.sleep(0.2)
    results, stats = inner(pool, *rest)
    print(len(pool.ready()), stats.lost, stats.requeued, flush=True)
    return results, stats

pooled_engine.dispatch = reporting
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


@pytest.fixture
def rights():
    """To make network namespaces."""
    if (tried := network()) is None:
        pytest.skip("network namespaces need rights that this user or machine hasn't")
    tried.remove()


@pytest.fixture
def machines(rights):
    with two_machines() as made:
        yield made


def goes_on(model, data, folder) -> None:
    """One step more than the last checkpoint holds, in this process."""
    done = max(checkpoint.position_of(each)[0] for each in checkpoint.list_checkpoints(folder))
    flags = training(model, data, folder, "--rollout", "transformers", "--resume", "--max_steps", done + 1)
    assert cli.main(["train", *flags, "--allow_changes", "max_steps,rollout,save_every,watchdog_seconds"]) == 0
    assert len(read_metrics(folder)) == done + 1


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_ranks_on_disconnected_nodes_stop_with_an_error(rights, model_folder, pairs_csv, tmp_path):
    """By a cable that is pulled out, and by one on which packets are lost."""
    with two_machines() as cut, two_machines() as lossy:
        runs = []
        for machines, strike in ((cut, cut.network.cut), (lossy, lossy.network.lose)):
            folder = tmp_path / strike.__name__
            saving = ("--save_every", 1, "--keep_last", 400)  # the first one stays until both runs have saved
            flags = training(model_folder, pairs_csv, folder, "--rollout", "transformers", *saving)
            both = machines.processes([*flags, "--watchdog_seconds", "6"])
            runs.append((machines, strike, folder, both))
        for machines, strike, folder, both in runs:
            machines.until((folder / "checkpoints" / "step-000001").is_dir, *both)
            strike()
        for machines, _, folder, both in runs:
            for process in both:
                assert process.wait(60) == 1
                text = machines.text(process)
                assert text.count(LOST) + text.count(WAITS) == 1 and text.count("error: ") == 1, text
                assert (
                    "--resume" in text and "reinforcepp/commands/cli.py" not in text
                )  # a traceback is the launcher's own
            goes_on(model_folder, pairs_csv, folder)


@pytest.mark.full
def test_a_missing_first_node_or_a_port_in_use_is_an_error(machines, model_folder, pairs_csv, tmp_path):
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
        assert f"can't connect to the other ranks at {machines.network.here}:{port}" in text
        assert words in text and "Traceback" not in text
    assert taken.poll() is None


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation to complete", " since "),
        ("Application timeout caused pair closure", LOST),
        ("Read error [10.0.0.2]:9: Connection timed out", LOST),
        ("Write error [10.0.0.2]:9: No route to host", LOST),
        ("Connection closed by peer [10.0.0.2]:9", "exited without an error message"),
        ("shapes differ", "RuntimeError: shapes differ"),
    ],
)
def test_errors_of_gloo_are_translated(capsys, said, words):
    _report_uncaught(RuntimeError, RuntimeError(said), None)
    shown = capsys.readouterr().err
    assert words in shown and ("resume" in shown) == shown.startswith("error: ") == (said not in shown)


# --- pools ------------------------------------------------------------------------------------------------------------


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


@pytest.mark.full
def test_a_disconnected_node_of_the_pool_comes_back(machines, model_folder, pairs_csv, tmp_path):
    pytest.importorskip("ray")
    folder, net = tmp_path / "run", machines.network
    machines.ray_node(far=False, cpus=1, head=True, **HEALTH)
    far = machines.ray_node(far=True, cpus=1, **HEALTH)
    trainer = pool(machines, net.here, *training(model_folder, pairs_csv, folder, "--max_steps", 4000))
    machines.until(lambda: [2, 0, 0] in shared_out(machines, trainer), trainer)
    pause(machines).touch()
    machines.until(lambda: "paused" in machines.text(trainer), trainer)
    net.cut()
    pause(machines).unlink()
    machines.until(lambda: any(lost == 1 and again for _, lost, again in shared_out(machines, trainer)), trainer)
    steps = len(shared_out(machines, trainer))
    machines.until(lambda: len(shared_out(machines, trainer)) > steps + 1, trainer)
    assert shared_out(machines, trainer)[-1] == [1, 0, 0]
    net.mend()
    far.wait(60)  # Ray ends it when it learns that it was declared dead
    far = machines.ray_node(far=True, cpus=1, **HEALTH)
    machines.until(lambda: shared_out(machines, trainer)[-1] == [2, 0, 0], trainer)


@pytest.mark.full
def test_a_disconnected_head_of_the_pool_stops_the_run(machines, model_folder, pairs_csv, tmp_path):
    pytest.importorskip("ray")
    folder, net = tmp_path / "run", machines.network
    machines.ray_node(far=True, cpus=1, head=True, **HEALTH)
    machines.ray_node(far=False, cpus=0, head_far=True, **HEALTH)
    trainer = pool(machines, net.host, *training(model_folder, pairs_csv, folder))
    machines.until(lambda: shared_out(machines, trainer), trainer)
    net.lose()
    machines.until(lambda: "error: " in machines.text(trainer), trainer)
    machines.kill(trainer)  # Ray takes its leave of the head for two minutes
    text = machines.text(trainer)
    assert (
        f"error: --rollout: the head of the Ray cluster, {net.host}:{PORT}, hasn't been reachable for 4 seconds" in text
    )
    assert "Saved the run after step" in text and "Traceback" not in text, text
    goes_on(model_folder, pairs_csv, folder)
