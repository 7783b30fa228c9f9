"""Attacks on Ray clusters, on their manifest for Kubernetes, and on torchrun's rendezvous."""

from __future__ import annotations

import base64
import os
import pickle
import socket
import stat
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import yaml

from scripts import ROOT, SOURCE

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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to write a file as another user")
@pytest.mark.attack("H5", "another user plants the address of a cluster for ray://auto in Ray's folder")
def test_a_planted_address_is_rejected(tmp_path, monkeypatch, outcome):
    import ray

    from reinforcepp.errors import RolloutError
    from reinforcepp.rollout.ray.actor_pool import connect

    def refuse(**settings):
        raise ConnectionError("the test ends here")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    planted = tmp_path / "ray" / "ray_current_cluster"
    planted.parent.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as attacker:
        planted.write_text(":".join(map(str, attacker.getsockname())))
        os.chown(planted, 12345, -1)
        with pytest.raises(RolloutError) as error:
            connect("auto")
        attacker.settimeout(0)
        try:
            attacker.accept()
            outcome("the trainer connects to the attacker")
        except BlockingIOError:
            outcome("the trainer doesn't connect")
    assert "was written by another user (uid 12345)" in str(error.value)


# --- the manifest for Kubernetes ---


def kubernetes():
    """Return the RayCluster and the network policies of the example."""
    documents = list(yaml.safe_load_all((ROOT / "examples/cluster/kuberay/train.yaml").read_text()))
    (job,) = [each for each in documents if each["kind"] == "RayJob"]
    return job["spec"]["rayClusterSpec"], [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]


@pytest.mark.attack("H4", "a client without a token submits a job to the cluster on Kubernetes")
def test_the_cluster_on_kubernetes_requires_a_token(outcome):
    cluster, _ = kubernetes()
    mode = cluster.get("authOptions", {}).get("mode", "disabled")
    outcome(f"authentication of the cluster: {mode}")
    assert mode == "token"


@pytest.mark.attack("H4", "another pod of the Kubernetes cluster connects to Ray's ports")
def test_other_pods_are_kept_from_rays_ports(outcome):
    cluster, policies = kubernetes()
    stranger, reached = {"app": "web"}, []
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        labels = group["template"].get("metadata", {}).get("labels", {})
        rules = [policy for policy in policies if policy["podSelector"]["matchLabels"].items() <= labels.items()]
        peers = [peer for policy in rules for rule in policy["ingress"] for peer in rule["from"]]
        admitted = [peer for peer in peers if peer["podSelector"]["matchLabels"].items() <= stranger.items()]
        if not rules or admitted:
            reached.append(group.get("groupName", "head"))
    outcome(f"reaches {', '.join(reached) or 'no pod'}")
    assert reached == []


@pytest.mark.attack("H4", "a program in a pod of the job uses root and Kubernetes' API")
def test_pods_have_no_more_rights_than_they_need(outcome):
    cluster, _ = kubernetes()
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    root = sum(not pod.get("securityContext", {}).get("runAsNonRoot") for pod in pods)
    tokens = sum(pod.get("automountServiceAccountToken") is not False for pod in pods)
    outcome(f"{root} of {len(pods)} pods can run as root, {tokens} have a service account's token")
    assert (root, tokens) == (0, 0)


# --- torchrun ---


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.full
@pytest.mark.attack("L6", "a pickle in the store of the torchrun that Slurm's example starts")
def test_slurms_example_unpickles_nothing_from_its_port(tmp_path, outcome):
    from torch.distributed import TCPStore

    for name, text in (("srun", 'shift; SLURM_NODEID=0 exec "$@"'), ("scontrol", "echo 127.0.0.1")):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "7",
    }
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    script = ROOT / "examples/cluster/slurm/several_trainers.sbatch"
    job = psutil.Popen(
        [script], env=environment(tmp_path, PATH=path, PORT=str(port), **slurm), stderr=subprocess.DEVNULL
    )
    try:  # the first node waits for the second one
        store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=120), wait_for_workers=False)
        ran = tmp_path / "attacked"
        deadline = time.monotonic() + 10
        while not ran.exists() and time.monotonic() < deadline:
            store.set("torch.rendezvous.7", base64.b64encode(pickle.dumps(Payload(ran))))
            time.sleep(0.1)
        outcome("code of the pickle ran" if ran.exists() else "nothing unpickled in 10 s")
        assert not ran.exists() and job.poll() is None
    finally:
        for process in [*job.children(recursive=True), job]:
            process.kill()


RANKS = """
import psutil
from reinforcepp.distributed.ranks import Ranks, init_process_group
from reinforcepp.distributed.rank_zero import RankZero

init_process_group(60)
ranks = Ranks()
zero = RankZero(ranks, 60)
listening = [each.laddr.ip for each in psutil.Process().net_connections() if each.status == "LISTEN"]
addresses = [ip for of_rank in ranks.gather(listening) for ip in of_rank]
if ranks.is_main:
    print("listening:", *addresses, flush=True)
"""


@pytest.mark.full
@pytest.mark.attack("L6", "another machine connects to the ports by which ranks on one machine exchange pickles")
def test_ranks_on_one_machine_listen_on_the_loopback_address(tmp_path, outcome):
    interfaces = [
        each.address for found in psutil.net_if_addrs().values() for each in found if each.family == socket.AF_INET
    ]
    own = next((address for address in interfaces if not address.startswith("127.")), None)
    # As on most servers, the host name resolves to an address that other machines reach.
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', own]
    if own is None or subprocess.run([*named, "true"], capture_output=True).returncode:
        pytest.skip("needs a network and the right to change the host name")
    (tmp_path / "ranks.py").write_text(RANKS)
    words = [*named, sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*words, tmp_path / "ranks.py"], env=environment(tmp_path), capture_output=True, text=True, timeout=120
    )
    addresses = next(line for line in done.stdout.splitlines() if line.startswith("listening:")).split()[1:]
    exposed = [address for address in addresses if not address.startswith("127.")]
    outcome(f"{len(exposed)} of {len(addresses)} ports listen on an address that others reach")
    assert len(addresses) >= 2 and not exposed
