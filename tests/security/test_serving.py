"""Attacks on real vLLM servers: one of ``serve`` with a key, one without, and one that a training uses."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from commands.served import KEY, Server, free_port

from reinforcepp.data.builtin import model_path
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm.server import training_command
from scripts import SOURCE

pytestmark = [pytest.mark.full, pytest.mark.skipif(bool(node_problem()), reason=node_problem())]

TOKEN = "hf_quite-secret"
CHAT = {"model": "builtin:tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
SAVE = {"method": "save_sharded_state"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Start a server with a key, in the environment of a user who also trains and uploads."""
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "HF_TOKEN": TOKEN}
    server = Server(tmp_path_factory.mktemp("guarded"), **settings)
    yield server
    server.end()


@pytest.fixture(scope="module")
def keyless(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("keyless"), with_key=False)
    yield server
    server.end()


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """Start a server with the command that error messages give."""
    log, port = tmp_path_factory.mktemp("training") / "log", free_port()
    command = shlex.split(training_command(str(model_path()), 64))
    flags = command[command.index("serve") + 2 :]  # after the model
    flags += [
        "--model",
        str(model_path()),
        "--port",
        str(port),
        "--enforce-eager",
        "--kv-cache-memory-bytes",
        "67108864",
    ]
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "OMP_NUM_THREADS": "1", "VLLM_NO_USAGE_STATS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
        env=environment | {"PYTHONPATH": str(SOURCE)},
        stdout=log.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    end = time.monotonic() + 300
    while request("127.0.0.1", port, "GET", "/health") != "HTTP 200":
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(log.read_text(errors="replace")[-3000:])
        time.sleep(0.3)
    yield port
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=60)


def request(host: str, port: int, method: str, path: str, body: object = None, **headers: str) -> str:
    """Return the status of a response as ``HTTP 200``, or that there is none."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with httpx2.Client(trust_env=False, timeout=60) as client:
            return f"HTTP {client.request(method, f'http://{host}:{port}{path}', json=body, headers=given).status_code}"
    except httpx2.ConnectError:
        return "no connection"


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.attack("H1", "generate with POST /invocations without the key")
def test_invocations_require_the_key(guarded, outcome):
    status = request("127.0.0.1", guarded.port, "POST", "/invocations", CHAT)
    outcome(status)
    assert status == "HTTP 401"
    assert request("127.0.0.1", guarded.port, "POST", "/invocations", CHAT, **WITH_KEY) == "HTTP 200"


@pytest.mark.attack("H1", "use an endpoint outside of /v1 without the key")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/tokenize"),
        ("POST", "/scale_elastic_ep"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/load"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
    ],
)
def test_every_endpoint_requires_the_key(guarded, outcome, method, path):
    status = request("127.0.0.1", guarded.port, method, path, {"model": "builtin:tiny", "prompt": "Hello"})
    outcome(status)
    assert status == "HTTP 401"


@pytest.mark.attack("H1", "a web page in the user's browser calls an endpoint of a server without a key")
def test_a_web_page_is_refused_without_a_key(keyless, outcome):
    """A request with text/plain needs no permission by CORS."""
    page = {"Origin": "https://evil.example", "Content-Type": "text/plain"}
    status = request("127.0.0.1", keyless.port, "POST", "/is_scaling_elastic_ep", **page)
    outcome(status)
    assert status == "HTTP 403"
    page["Origin"] = "http://localhost:3000"
    assert request("127.0.0.1", keyless.port, "POST", "/is_scaling_elastic_ep", **page) == "HTTP 200"


@pytest.mark.attack("H1", "DNS rebinding: a web page generates under its own host name, without a key")
def test_a_foreign_host_is_refused_without_a_key(keyless, outcome):
    page = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}
    status = request("127.0.0.1", keyless.port, "POST", "/v1/chat/completions", CHAT, **page)
    outcome(status)
    assert status == "HTTP 403"
    local = {"Host": f"localhost:{keyless.port}"}
    assert request("127.0.0.1", keyless.port, "POST", "/v1/chat/completions", CHAT, **local) == "HTTP 200"


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.mark.attack(
    "H2", "VLLM_SERVER_DEV_MODE in the user's environment: write files with POST /collective_rpc without the key"
)
def test_no_request_without_the_key_writes_files(guarded, outcome, tmp_path):
    status = request("127.0.0.1", guarded.port, "POST", "/collective_rpc", SAVE | {"args": [str(tmp_path)]})
    outcome(f"{status}, {len(list(tmp_path.iterdir()))} files written")
    assert status == "HTTP 401" and not list(tmp_path.iterdir())


@pytest.mark.attack("H2", "VLLM_SERVER_DEV_MODE in the user's environment: a client with the key writes files")
def test_the_key_does_not_open_development_endpoints(guarded, outcome, tmp_path):
    body = SAVE | {"args": [str(tmp_path)]}
    status = request("127.0.0.1", guarded.port, "POST", "/collective_rpc", body, **WITH_KEY)
    outcome(f"{status}, {len(list(tmp_path.iterdir()))} files written")
    assert status == "HTTP 404" and not list(tmp_path.iterdir())


@pytest.mark.attack("H2", "read HF_TOKEN in the environment of the server's processes")
def test_the_server_has_no_token_of_the_hub(guarded, outcome):
    holders = [pid for pid in guarded.children() if TOKEN in Path(f"/proc/{pid}/environ").read_text()]
    outcome(f"{len(holders)} processes have it")
    assert len(guarded.children()) >= 2 and not holders


# --- a server for training --------------------------------------------------------------------------------------------


@pytest.mark.attack("H3", "reach the recommended training server at another address and write files, without a key")
def test_the_recommended_training_server_is_reached_on_one_address_only(training, outcome, tmp_path):
    status = request("127.0.0.2", training, "POST", "/collective_rpc", SAVE | {"args": [str(tmp_path)]})
    outcome(f"{status}, {len(list(tmp_path.iterdir()))} files written")
    assert status == "no connection"
