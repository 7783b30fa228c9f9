"""The launch examples on one machine: with_ray.sh without ssh, Slurm's scripts with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from packaging.version import Version

from reinforcepp import __version__
from reinforcepp.commands import cli
from reinforcepp.monitoring import read_metrics
from reinforcepp.rollout.ray.worker import MIN_RAY
from reinforcepp.runtime.process import versions_of
from reinforcepp.training import checkpoint
from scripts import ROOT, SOURCE

pytest.importorskip("ray")
EXAMPLES = ROOT / "examples" / "cluster"
BIN = Path(sys.executable).parent
SRUN = """#!/usr/bin/env bash
nodes=$SLURM_JOB_NUM_NODES
kill_on_bad_exit=0
while [[ ${1-} == --* ]]; do
  if [[ $1 == --nodes=* ]]; then nodes=${1#*=}; fi
  if [[ $1 == --kill-on-bad-exit=1 ]]; then kill_on_bad_exit=1; fi
  shift
done
trap 'kill $(jobs -p)' TERM
for i in $(seq "$nodes"); do SLURM_NODEID=$((i - 1)) "$@" <&0 & done
code=0
for _ in $(seq "$nodes"); do
  wait -n || code=$?
  if (( kill_on_bad_exit && code )); then kill $(jobs -p); fi
done
exit "$code"
"""
SCONTROL = '#!/usr/bin/env bash\n[ "$*" = "show hostnames node[1-2]" ] && printf "%s\\n" 127.0.0.1 node2\n'
NAMES = ("srun", "scontrol")


@pytest.fixture
def place(tmp_path):
    """Environment of a machine that plays all nodes: a free port, and Slurm's commands as far as the scripts need them."""
    for name, text in zip(NAMES, (SRUN, SCONTROL), strict=True):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_ID": "7",
    }
    path = os.pathsep.join([str(tmp_path), str(BIN), os.environ["PATH"]])
    alone = {"PORT": port, "PATH": path, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    python_path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return os.environ | alone | slurm | {"PYTHONPATH": python_path}


def settings(model, data, folder, **more):
    given = {"model": model, "data": data, "rewards": "rule:length?max=20", "output_dir": folder, "max_new_tokens": 8}
    given |= {"max_prompt_length": 40, "batch_size": 3, "eval_prompts": 0, "save_every": 1} | more
    return [str(word) for name, value in given.items() for word in (f"--{name}", value)]


def left(environment):
    """Processes of the cluster that are still there."""
    named = (f":{environment['PORT']}", f"port={environment['PORT']}")
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if any(name in words for name in named) and ("raylet" in words or "gcs_server" in words):
            found.append(words)
    return found


@pytest.mark.full
def test_a_pool_lives_as_long_as_the_training(place, tmp_path, model_folder, pairs_csv):
    """By ssh's stand-in until it is told to end, then by Slurm's from where it stopped."""
    flags = settings(model_folder, pairs_csv, tmp_path / "run", max_steps=200)
    command = [EXAMPLES / "with_ray.sh", "localhost", "reinforcepp", "train", "--rollout", "ray://auto", *flags]
    command += ["--staleness", "1", "--rollout_workers", "1"]
    started = subprocess.Popen(command, env=place | {"ON": "env HOST={} bash -c"}, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoints" / "step-000001").is_dir() and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    started.send_signal(signal.SIGTERM)
    told = started.communicate(timeout=120)[1]
    assert started.returncode == 143, told
    done = max(checkpoint.position_of(folder)[0] for folder in checkpoint.list_checkpoints(tmp_path / "run"))
    assert 1 <= done < 200 and not left(place)

    flags = settings(model_folder, pairs_csv, tmp_path / "run", max_steps=done + 2)
    command = [
        EXAMPLES / "slurm" / "ray_pool.sbatch",
        *flags,
        "--rollout_workers",
        "1",
        "--resume",
        "--allow_changes",
        "max_steps",
    ]
    place |= {"WITH_RAY": str(EXAMPLES / "with_ray.sh"), "SLURM_GPUS_ON_NODE": "2"}  # two train from here on
    again = subprocess.run(command, env=place, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert len(read_metrics(tmp_path / "run")) == done + 2 and (tmp_path / "run" / "model.safetensors").is_file()
    assert not left(place)


@pytest.mark.parametrize("command", [["with_ray.sh", "localhost", "true"], ["slurm/several_trainers.sbatch"]])
def test_a_port_in_use_is_an_error(place, command):
    """By one who says nothing, of whom a torchrun would wait for an answer without end."""
    place["HEAD"] = "127.0.0.1"
    with socket.create_server(("127.0.0.1", int(place["PORT"]))):
        words = [EXAMPLES / command[0], *command[1:]]
        done = subprocess.run(words, env=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: 127.0.0.1:{place['PORT']} is in use. Stop the program that listens there, or"
    )


def test_a_node_that_fails_to_start_ends_the_job(place, tmp_path):
    """Else the other one would wait for it for as long as torchrun does."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text('#!/usr/bin/env bash\n[ "$SLURM_NODEID" = 1 ] && exit 3\nexec sleep 300\n')
    torchrun.chmod(0o755)
    begin = time.monotonic()
    done = subprocess.run([EXAMPLES / "slurm" / "several_trainers.sbatch"], env=place, timeout=120)
    assert done.returncode != 0 and time.monotonic() - begin < 60


def test_without_a_command_the_usage_is_printed(place):
    done = subprocess.run(
        [EXAMPLES / "with_ray.sh", "localhost"], env=place, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


@pytest.mark.full
def test_nodes_with_one_rank_each_train_together(place, tmp_path, model_folder, pairs_csv):
    """Two nodes of one process each find each other and train together."""
    flags = settings(model_folder, pairs_csv, tmp_path / "run", max_steps=2, rollout="transformers")
    command = [EXAMPLES / "slurm" / "several_trainers.sbatch", *flags]
    done = subprocess.run(command, env=place, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run")) == 2 and done.stderr.count("Saved policy to") == 1


def manifest():
    """The NetworkPolicy and the RayJob for Kubernetes."""
    policy, job = yaml.safe_load_all((EXAMPLES / "kuberay" / "train.yaml").read_text())
    assert (policy["kind"], job["kind"]) == ("NetworkPolicy", "RayJob")
    return policy["spec"], job["spec"]


def templates(job):
    """The templates of all pods of a RayJob."""
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [job["submitterPodTemplate"], *(group["template"] for group in groups)]


def test_the_kubernetes_job_runs_a_valid_command():
    _, job = manifest()
    program, verb, *flags = job["entrypoint"].split()
    assert (program, verb) == ("reinforcepp", "train")
    config = cli.parse(verb, flags)
    cluster = job["rayClusterSpec"]
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    mounts = head["template"]["spec"]["containers"][0]["volumeMounts"]
    assert all(path.startswith(mounts[0]["mountPath"]) for path in (config.data, config.output_dir))
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"} and workers["minReplicas"] >= 1
    images = {template["spec"]["containers"][0]["image"] for template in templates(job)}
    assert images == {f"registry.example/reinforcepp:{__version__}"}
    own = versions_of(["ray"])["ray"]
    assert cluster["rayVersion"] == own and (EXAMPLES / "kuberay" / "Dockerfile").read_text().count(own) == 2


def test_the_kubernetes_job_is_restricted():
    """By authentication, and to the rights that the Pod Security Standard "restricted" of Kubernetes leaves."""
    policy, job = manifest()
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and Version(cluster["rayVersion"]) >= Version(MIN_RAY)
    assert "enableInTreeAutoscaling" not in cluster  # it would need the token of a service account
    for template in templates(job):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        assert template["metadata"]["labels"] == policy["podSelector"]["matchLabels"]
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
    members, operator = policy["ingress"]
    assert policy["policyTypes"] == ["Ingress"] and members == {"from": [{"podSelector": policy["podSelector"]}]}
    (peer,) = operator["from"]
    assert all(selector["matchLabels"] for selector in peer.values()) and len(peer) == 2
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
