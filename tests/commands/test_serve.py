"""The serve command: its errors, and the real server on the CPU with OpenAI's client."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from commands.served import KEY, Server, free_port

from reinforcepp.commands import cli, serve
from reinforcepp.config import ServeConfig
from reinforcepp.data.builtin import model_path
from reinforcepp.models.loading import load_config
from reinforcepp.models.prompt_format import PLAIN_TEMPLATE
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm.server import server_command, server_environment
from reinforcepp.training.publish.source import Source

needs_vllm = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


# --- the real server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.end()


@pytest.fixture(scope="module")
def client(server):
    httpx = pytest.importorskip("httpx")
    openai = pytest.importorskip("openai")
    return openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key=KEY, http_client=httpx.Client(trust_env=False)
    )


@pytest.mark.full
@needs_vllm
class TestServer:
    def test_the_official_client_is_answered_as_generate_answers(self, client, capsys):
        flags = ["--prompt", "How do I see my routes?", "--temperature", "0", "--engine", "transformers"]
        assert cli.main(["generate", *flags, "--max_new_tokens", "40"]) == 0
        expected = capsys.readouterr().out.strip()
        assert [model.id for model in client.models.list()] == ["builtin:tiny"]
        answer = client.chat.completions.create(
            model="builtin:tiny",
            messages=[{"role": "user", "content": "How do I see my routes?"}],
            temperature=0,
            max_tokens=40,
        )
        assert answer.choices[0].message.content.strip() == expected
        assert answer.choices[0].finish_reason == "stop"

    def test_it_streams(self, client):
        def said(stream: bool):
            return client.chat.completions.create(
                model="builtin:tiny",
                messages=[{"role": "user", "content": "Which port is open?"}],
                seed=3,
                max_tokens=12,
                stream=stream,
            )

        parts = [part.choices[0].delta.content or "" for part in said(True) if part.choices]
        assert len(parts) > 1  # on a busy machine, vLLM sends several tokens at a time
        assert "".join(parts) == said(False).choices[0].message.content

    def test_without_the_key_nobody_is_served_and_nobody_sees_it(self, client, server):
        import openai

        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        for pid in [server.process.pid, *server.children()]:
            assert KEY not in Path(f"/proc/{pid}/cmdline").read_text()
        assert KEY not in server.said
        assert "requires a key" in server.said

    def test_every_path_but_health_requires_the_key(self, server):
        paths = [
            "/invocations",
            "/metrics",
            "/docs",
            "/nothing",
            "/ping",
            "/health/",
            "//health",
            "/health/../invocations",
        ]
        paths += ["/health%2f..%2finvocations", "/health%00", "/HEALTH", f"http://127.0.0.1:{server.port}/metrics"]
        assert {path: status_of(server.port, path) for path in paths} == dict.fromkeys(paths, 401)
        allowed = ["/health", "/health?x=1", "/%68ealth"]
        assert {path: status_of(server.port, path) for path in allowed} == dict.fromkeys(allowed, 200)
        upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
        upgrade += ["Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng=="]
        assert status_of(server.port, "/v1/realtime", *upgrade) == 403

    def test_a_port_that_is_taken_is_refused(self, server, capsys, monkeypatch):
        monkeypatch.setattr("reinforcepp.commands.serve.vllm_status", lambda *_: pytest.fail("vLLM was loaded"))
        assert cli.main(["serve", "--port", str(server.port)]) == 2
        err = capsys.readouterr().err
        assert f"127.0.0.1:{server.port}: can't listen" in err and err.count("\n") == 1

    def test_a_signal_ends_it_with_all_that_belongs_to_it(self, server):  # the last one of the class
        children = server.children()
        assert len(children) >= 2
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=60) == 128 + signal.SIGINT
        end = time.monotonic() + 30
        while any(alive(pid) for pid in children):
            assert time.monotonic() < end
            time.sleep(0.2)
        assert "Traceback" not in server.said


def status_of(port: int, path: str, *headers: str) -> int:
    """Return the status of a request whose path no client normalizes."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *(headers or ["Connection: close"]), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        return int(connection.recv(100).split()[1])


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, monkeypatch):
    """``refused("--x", ...)``: the one sentence; no server may have been started."""
    monkeypatch.setattr(
        "reinforcepp.commands.serve.subprocess.Popen", lambda *_, **__: pytest.fail("a server was started")
    )

    def run(*flags: object) -> str:
        assert cli.main(["serve", "--port", str(free_port()), *map(str, flags)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        return err

    return run


def test_invalid_models_and_addresses_are_errors(refused, monkeypatch, tmp_path, reward_folder):
    assert "is a reward model" in refused(reward_folder)
    assert "model folder not found" in refused(tmp_path / "none")
    assert "exceeds the model's context of 512" in refused("--max_length", 513)
    assert "can't listen" in refused("--host", "192.0.2.1")
    monkeypatch.setattr(
        "reinforcepp.commands.serve.vllm_status", lambda *_: (False, "vLLM isn't installed; to get it: pip")
    )
    message = refused()
    assert "builtin:tiny" in message and "can't be served (vLLM isn't installed; to get it: pip)" in message


def test_invalid_key_files_are_errors(refused, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "two").write_text("secret-one secret-two\n")
    assert "not found" in refused("--api_key_file", tmp_path / "none")
    assert "one line" in refused("--api_key_file", tmp_path / "empty")
    message = refused("--api_key_file", tmp_path / "two")
    assert "one line" in message and "secret" not in message


def test_a_key_on_the_command_line_is_an_error(refused):
    message = refused("--api_key", "sk-secret")
    assert "--api_key_file" in message and "sk-secret" not in message


def test_a_failing_server_is_an_error_with_its_output(monkeypatch, capfd):
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_status", lambda *_: (True, ""))
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_is_for_gpus", lambda: False)
    command = [sys.executable, "-c", "import sys; sys.exit('last words')"]
    monkeypatch.setattr("reinforcepp.commands.serve.server_command", lambda *_, **__: command)
    assert cli.main(["serve", "--port", str(free_port())]) == 2
    err = capfd.readouterr().err
    assert "last words\n" in err and "error: vLLM's server ended with exit code 1" in err


def test_a_public_address_without_a_key_is_a_warning(monkeypatch, capfd):
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_status", lambda *_: (True, ""))
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_is_for_gpus", lambda: False)
    monkeypatch.setattr("reinforcepp.commands.serve.server_command", lambda *_, **__: [sys.executable, "-c", ""])
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    warned = []
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        assert cli.main(["serve", "--port", str(free_port()), "--host", host]) == 2
        warned.append("Every client that reaches this address" in capfd.readouterr().err.replace("\n", " "))
    assert warned == [False, False, True]


def test_a_tokenizer_without_a_template_gets_the_template_of_the_training(monkeypatch, tmp_path, model_folder):
    shown = []

    def command(*_, chat_template, **__) -> list[str]:
        shown.append(None if chat_template is None else Path(chat_template).read_text())
        return [sys.executable, "-c", ""]

    monkeypatch.setattr("reinforcepp.commands.serve.vllm_status", lambda *_: (True, ""))
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_is_for_gpus", lambda: False)
    monkeypatch.setattr("reinforcepp.commands.serve.server_command", command)
    templated = shutil.copytree(model_folder, tmp_path / "templated")
    (templated / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for model in (model_folder, templated):
        assert cli.main(["serve", str(model), "--port", str(free_port())]) == 2
    assert shown == [PLAIN_TEMPLATE, None]


# --- command and environment ------------------------------------------------------------------------------------------


def command_for(*, on_gpu: bool, **changes) -> list[str]:
    settings = {
        "host": "::1",
        "port": 9,
        "name": "n",
        "max_length": 64,
        "batch_size": 4,
        "chat_template": None,
    } | changes
    config = load_config("builtin:tiny")
    return server_command(str(model_path()), config, torch.bfloat16, on_gpu=on_gpu, **settings)


def test_cpu_flags_are_only_in_the_command_for_a_cpu():
    cpu, gpu = command_for(on_gpu=False), command_for(on_gpu=True)
    per_token = 2 * 4 * 192 * 2  # keys and values of 4 layers in bfloat16
    assert f"--kv-cache-memory-bytes={(4 * 64 + 32) * per_token}" in cpu
    assert {"--enforce-eager", "--block-size=32"} <= set(cpu)
    assert not [flag for flag in gpu if flag.startswith(("--kv-cache", "--enforce", "--block"))]
    assert {"--dtype=bfloat16", "--max-model-len=64", "--max-num-seqs=4", "--served-model-name=n"} <= set(gpu)
    assert not [flag for flag in gpu if flag.startswith("--chat-template")]
    assert "--chat-template=/t" in command_for(on_gpu=True, chat_template="/t")


NEEDED = """
    PATH HOME LANG LC_ALL TMPDIR PYTHONPATH VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH LD_PRELOAD CC CXX CUDA_HOME
    CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES HIP_VISIBLE_DEVICES NCCL_SOCKET_IFNAME OMP_NUM_THREADS TOKENIZERS_PARALLELISM
    HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE TRANSFORMERS_OFFLINE XDG_CACHE_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
    TORCH_CUDA_ARCH_LIST https_proxy SSL_CERT_FILE VLLM_LOGGING_LEVEL VLLM_CPU_KVCACHE_SPACE VLLM_CACHE_ROOT
    VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
"""
WITHHELD = """
    HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH WANDB_API_KEY OPENAI_API_KEY NVIDIA_API_KEY AWS_SECRET_ACCESS_KEY
    S3_SECRET_ACCESS_KEY GITHUB_TOKEN SSH_AUTH_SOCK REWARD_SERVER_TOKEN DATABASE_URL CUSTOM_PRE_PROCESS SAGEMAKER_X
    PYTHON_INDEX_PASSWORD HF_HUB_PAT VLLM_ENABLE_V1_MULTIPROCESSING VLLM_API_KEY VLLM_SERVER_DEV_MODE
    VLLM_ALLOW_INSECURE_SERIALIZATION
    VLLM_ALLOW_RUNTIME_LORA_UPDATING VLLM_USE_RUST_FRONTEND
"""


def test_the_server_gets_the_variables_that_it_needs():
    needed = dict.fromkeys(NEEDED.split(), "x")
    variables = server_environment(needed, "k")
    assert needed.items() <= variables.items() and variables["VLLM_API_KEY"] == "k"


def test_the_server_gets_no_secret_and_no_unsafe_setting():
    variables = server_environment(dict.fromkeys(WITHHELD.split(), "1"), None)
    assert not set(WITHHELD.split()) & set(variables)


def test_the_server_imports_no_code_of_the_current_folder(tmp_path):
    """The folder can be that of an untrusted model."""
    (tmp_path / "planted.py").write_text("print('ran')")
    command = [sys.executable, "-m", "planted"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).stdout == b"ran\n"
    environment = server_environment(os.environ, None)
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).stdout == b""


def test_a_model_of_the_hub_is_downloaded_before_the_server_starts(monkeypatch, tmp_path):
    """So the server needs no token."""
    tiny.save(tmp_path / "downloaded")
    monkeypatch.setattr(serve, "local_folder", {"ada/model": tmp_path / "downloaded"}.__getitem__)
    with serve._plain_folder(Source("ada/model", None, None), tmp_path) as folder:
        assert folder == str(tmp_path / "downloaded")


def test_a_merged_adapter_has_the_same_path_at_each_start(monkeypatch, tmp_path):
    """vLLM's key of compiled code includes the path."""
    monkeypatch.setenv("REINFORCEPP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(serve, "is_adapter_dir", lambda _: True)
    monkeypatch.setattr(serve, "write_folder", lambda source, _, folder, __: (folder / "from").write_text(source.name))

    def served(adapter, target):
        return serve._plain_folder(Source(adapter, None, None), tmp_path / target)

    with served("one", "a") as first, served("other", "b") as other, served("one", "c") as meanwhile:
        assert first != other and meanwhile == str(tmp_path / "c")  # another process has the path
        assert [Path(path, "from").read_text() for path in (first, other, meanwhile)] == ["one", "other", "one"]
    assert not os.path.lexists(first)
    with served("one", "d") as again:
        assert again == first and Path(again).resolve() == tmp_path / "d"


def test_an_unsafe_setting_is_ignored_with_a_warning(monkeypatch, capfd):
    started = {}

    def popen(*_, env, **__):
        started.update(env)
        raise KeyboardInterrupt

    monkeypatch.setattr("reinforcepp.commands.serve.vllm_status", lambda *_: (True, ""))
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_is_for_gpus", lambda: False)
    monkeypatch.setattr("reinforcepp.commands.serve.subprocess.Popen", popen)
    for value, warned in (("1", True), ("0", False)):
        monkeypatch.setenv("VLLM_SERVER_DEV_MODE", value)
        cli.main(["serve", "--port", str(free_port())])
        message = capfd.readouterr().err.replace("\n", " ")
        assert ("Ignored VLLM_SERVER_DEV_MODE, because" in message) == warned
        assert started and "VLLM_SERVER_DEV_MODE" not in started


@pytest.mark.parametrize(
    ("host", "key", "middleware"),
    [
        ("127.0.0.1", None, "RefuseWebPages"),
        ("localhost", None, "RefuseWebPages"),
        ("0.0.0.0", None, None),
        ("127.0.0.1", "k", "RequireKey"),
        ("0.0.0.0", "k", "RequireKey"),
    ],
)
def test_the_middleware_of_the_server(monkeypatch, host, key, middleware):
    given = []
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_status", lambda *_: (True, ""))
    monkeypatch.setattr("reinforcepp.commands.serve.vllm_is_for_gpus", lambda: False)
    monkeypatch.setattr("reinforcepp.commands.serve._run", lambda command, *_, **__: given.append(command) or 0)
    monkeypatch.setenv("VLLM_API_KEY", key or "")
    assert cli.main(["serve", "--host", host, "--port", str(free_port())]) == 0
    flags = [flag for flag in given[0] if flag.startswith("--middleware")]
    assert flags == ([f"--middleware=reinforcepp.commands.access.{middleware}"] if middleware else [])


def test_an_invalid_key_in_the_environment_is_an_error(refused, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk secret")
    message = refused()
    assert message.startswith("error: VLLM_API_KEY: the key holds a space") and "secret" not in message


def test_a_cpu_serves_in_bfloat16_only_if_it_is_fast_in_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = {}
    for fast in (True, False):
        monkeypatch.setattr(serve, "bf16_is_fast", lambda fast=fast: fast)
        found[fast] = [serve._dtype(ServeConfig(), stored) for stored in (torch.bfloat16, torch.float16, None)]
        assert serve._dtype(ServeConfig(dtype="bfloat16"), torch.float32) == torch.bfloat16
    assert found == {True: [torch.bfloat16, torch.float32, torch.float32], False: [torch.float32] * 3}
