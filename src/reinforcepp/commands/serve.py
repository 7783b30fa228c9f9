"""The command ``serve``: run vLLM's OpenAI-compatible server on a trained model until a signal stops it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import torch

from reinforcepp.commands.access import RefuseWebPages, RequireKey
from reinforcepp.commands.export.command import write_folder
from reinforcepp.config import ServeConfig
from reinforcepp.errors import ConfigError, RolloutError
from reinforcepp.models.folder_checks import check_weights
from reinforcepp.models.loading import context_length, load_config, load_tokenizer, local_folder
from reinforcepp.models.lora import is_adapter_dir
from reinforcepp.models.precision import bf16_is_fast, inference_dtype
from reinforcepp.models.prompt_format import prompt_form
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.rollout.vllm.compat import vllm_status
from reinforcepp.rollout.vllm.model_folder import stable_path
from reinforcepp.rollout.vllm.server import (
    environment_key,
    server_command,
    server_environment,
    unsafe_settings,
    vllm_is_for_gpus,
)
from reinforcepp.runtime.process import is_loopback
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.publish.source import Source, find_source

# The context of a model can be a million tokens, and the server would reserve memory for all of them.
USUAL_LENGTH = 8192


def run_server(config: ServeConfig) -> int:
    """Serve until a signal arrives; return the exit code, 128 plus the number of the signal.

    Raises:
        ReinforceError: If the model, the address or the key can't be used, vLLM can't run the model, or its server fails.
    """
    key = _key(config)
    source = find_source(config.model)
    model_config = load_config(source.name)
    context = context_length(model_config)
    length = config.max_length or min(context or USUAL_LENGTH, USUAL_LENGTH)
    if context is not None and length > context:
        raise ConfigError(f"max_length: {length} exceeds the model's context of {context} tokens. Lower it.")
    _check_port(config)
    dtype = _dtype(config, model_config.dtype)
    usable, reason = vllm_status(model_config, dtype)
    if not usable:
        raise RolloutError(
            f"{config.model}: the model can't be served ({reason}). Run reinforcepp chat, which needs no vLLM."
        )
    tokenizer = load_tokenizer(source.name)
    name = config.name or (config.model if config.model.startswith("builtin:") else Path(source.name).resolve().name)
    with (
        tempfile.TemporaryDirectory(prefix="reinforcepp-serve-") as folder,
        _plain_folder(source, Path(folder) / "model") as plain,
    ):
        template = Path(folder) / "chat_template.jinja"
        template.write_text(str(tokenizer.chat_template), encoding="utf-8")
        command = server_command(
            plain,
            model_config,
            dtype,
            host=config.host,
            port=config.port,
            name=name,
            max_length=length,
            batch_size=config.batch_size,
            chat_template=str(template) if prompt_form(tokenizer) != "chat template" else None,
            on_gpu=vllm_is_for_gpus(),
            middleware=_middleware(config.host, key),
        )
        return _run(command, server_environment(os.environ, key), config, name, with_key=key is not None)


def _dtype(config: ServeConfig, stored: torch.dtype | None) -> torch.dtype:
    """Return the dtype of the weights: on a CPU, bfloat16 only if the model has it and the CPU is fast in it."""
    if config.dtype == "auto" and stored == torch.bfloat16 and not torch.cuda.is_available() and bf16_is_fast():
        return torch.bfloat16
    return inference_dtype(config.dtype, stored)


@contextmanager
def _plain_folder(source: Source, merged: Path) -> Iterator[str]:
    """Yield the folder of the model, so that the server needs no token of the Hub.

    An adapter is first merged into its base model, in the folder ``merged``.
    """
    if not is_adapter_dir(Path(source.name)):
        folder = local_folder(source.name)
        check_weights(folder, source.name)
        yield str(folder)
        return
    merged.mkdir()
    write_folder(source, "auto", merged, merged.name)
    with stable_path(merged, str(Path(source.name).resolve())) as path:
        yield path


def _key(config: ServeConfig) -> str | None:
    """Return the key that clients must send, or None if the server requires no key."""
    if config.api_key_file is None:
        return environment_key()
    path = Path(config.api_key_file).expanduser()
    if not path.is_file():
        raise ConfigError(f"api_key_file: file {config.api_key_file} not found. Give a file that contains the key.")
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    if len(lines) != 1 or not (lines[0].isascii() and lines[0].isprintable()):
        raise ConfigError(
            f"api_key_file: {config.api_key_file} isn't one line without spaces. Write only the key to it."
        )
    return lines[0]


def _middleware(host: str, key: str | None) -> str | None:
    """Return the import path of the middleware; vLLM's own check of the key covers a few of its paths only."""
    if key is None and not is_loopback(host):
        return None  # Every client may use the model, as a warning says.
    middleware = RefuseWebPages if key is None else RequireKey
    return f"{middleware.__module__}.{middleware.__name__}"


def _check_port(config: ServeConfig) -> None:
    """Refuse an address of another host, or a port in use, before anything is loaded."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port}: can't listen on this address ({error.strerror}). Choose another --port or --host."
        ) from error


def _run(command: list[str], environment: dict[str, str], config: ServeConfig, name: str, *, with_key: bool) -> int:
    """Start the server, print its address when it is ready, and wait until it exits."""
    all_interfaces = "0.0.0.0"  # nosec B104  # compared only
    host = {all_interfaces: "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    if not with_key and not is_loopback(config.host):
        echo("Every client that reaches this address can use the model. To require a key, set VLLM_API_KEY.", "yellow")
    if ignored := unsafe_settings(os.environ):
        echo(
            f"Ignored {', '.join(ignored)}, because requests to such a server can load files or run code. For a server that "
            "a training uses, see docs/vllm_server.md.",
            "yellow",
        )
    echo(f"Starting vLLM with {config.model}. This takes up to a minute.")
    # In a session apart from the terminal, the server gets Ctrl-C only from this process.
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        with _forward_signals(child) as received:
            while child.poll() is None and not _answers(url):
                time.sleep(0.2)
            if child.poll() is None:
                required = "requires a key" if with_key else "requires no key"
                echo(f"Serving {name} at {url}/v1 ({required}). To stop, press Ctrl-C.", "green")
            code = child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # vLLM's engine process can outlive the server.
    if received:
        return 128 + received[0]
    raise RolloutError(f"vLLM's server ended with exit code {code}. Read its output above.")


@contextmanager
def _forward_signals(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Yield the list of received signals; the first one terminates the server, the second one kills it."""
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        with suppress(ProcessLookupError):
            if len(received) == 1:
                child.terminate()
            else:
                os.killpg(child.pid, signal.SIGKILL)

    with handle_signals(forward):
        yield received


def _answers(url: str) -> bool:
    """Return whether the server is ready."""
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
