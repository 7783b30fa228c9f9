"""Attacks on Ray clusters, on their manifest for Kubernetes, and on torchrun's rendezvous."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import psutil
import pytest

from scripts import SOURCE

pytest.importorskip("ray")
TRAINER = """
import sys
from reinforcepp.rollout.ray.actor_pool import connect

ray, _ = connect("local")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
ATTACKER = """
import sys, ray

ray._raylet.GcsClient(address=sys.argv[1])  # ray.init would repeat a rejected connection for 20 seconds
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print(ray.get(ray.remote(lambda: "attacker's function ran").remote(), timeout=60))
"""


def environment(home, **more):
    """Return the environment of a user who has set nothing for Ray."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return plain | {"HOME": str(home), "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def local_cluster(tmp_path):
    """Return a function that starts a process with ``ray://local``, and returns it and its cluster's address."""
    started = []

    def start(**more):
        process = psutil.Popen(
            [sys.executable, "-c", TRAINER],
            env=environment(tmp_path, **more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.communicate("")


def run_on(address, home, **more):
    """Run a function on a cluster as another user of this machine; return its result, or the last line of the error."""
    words = [sys.executable, "-c", ATTACKER, address]
    if address.startswith("127."):  # otherwise Ray replaces it by another address of this machine
        more |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    done = subprocess.run(words, env=environment(home, **more), capture_output=True, text=True, timeout=120)
    return (done.stdout or done.stderr).strip().splitlines()[-1][:100]


@pytest.mark.full
@pytest.mark.attack("H5", "another user of the machine runs a function on the cluster of ray://local")
def test_a_local_cluster_rejects_other_users(local_cluster, tmp_path, outcome):
    _, address = local_cluster()
    token = tmp_path / ".ray" / "auth_token"
    readable = token.is_file() and bool(token.stat().st_mode & stat.S_IROTH)
    found = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token.read_text()} if readable else {}
    result = run_on(address, tmp_path / "other", **found)
    outcome(f"{'with the token of ~/.ray/auth_token' if readable else 'without a token'}: {result}")
    assert "ran" not in result.split()


@pytest.mark.full
@pytest.mark.attack("H5", "the same, in a shell that exports RAY_AUTH_MODE=disabled")
def test_a_local_cluster_requires_its_token_whatever_the_shell_exports(local_cluster, tmp_path, outcome):
    _, address = local_cluster(RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="known")
    tries = ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "known"})
    results = [run_on(address, tmp_path, **more) for more in tries]
    outcome("; ".join(results))
    assert not any("ran" in result.split() for result in results)


@pytest.mark.full
@pytest.mark.attack("H5", "another machine connects to the ports of ray://local")
def test_a_local_cluster_listens_on_the_loopback_address(local_cluster, outcome):
    trainer, _ = local_cluster()
    processes = [trainer, *trainer.children(recursive=True)]
    listening = [each for process in processes for each in process.net_connections() if each.status == "LISTEN"]
    exposed = [each for each in listening if not each.laddr.ip.removeprefix("::ffff:").startswith("127.")]
    outcome(f"{len(exposed)} of {len(listening)} ports listen on all addresses")
    assert len(listening) >= 4 and not exposed


@pytest.mark.full
@pytest.mark.attack("H5", "a node has Ray 2.51, which ignores tokens")
def test_a_ray_that_ignores_tokens_is_rejected(tmp_path, outcome):
    package = tmp_path / "ray-2.51.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.51.1\n")
    search = os.pathsep.join([str(tmp_path), str(SOURCE)])
    words = [sys.executable, "-c", TRAINER]
    done = subprocess.run(
        words, env=environment(tmp_path, PYTHONPATH=search), input="", capture_output=True, text=True, timeout=120
    )
    error = next((line for line in done.stderr.splitlines() if line.startswith("reinforcepp.errors.RolloutError")), "")
    outcome(error[:120] or "a cluster started")
    assert "2.51.1" in error and "ignores authentication tokens" in error
