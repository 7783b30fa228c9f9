"""``reinforcepp serve``: vLLM's OpenAI-compatible server on a trained model, for as long as nobody stops it."""

from __future__ import annotations

import ipaddress
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

from reinforcepp.commands.export.command import write_folder
from reinforcepp.commands.export.source import Source, find_source
from reinforcepp.config import ServeConfig
from reinforcepp.errors import ConfigError, RolloutError
from reinforcepp.models.loading import context_length, load_config, load_tokenizer, resolve
from reinforcepp.models.lora import is_adapter_dir
from reinforcepp.models.tokenization import PLAIN_TEMPLATE
from reinforcepp.monitoring import echo
from reinforcepp.monitoring.signals import handle_signals
from reinforcepp.rollout.vllm.compat import vllm_status
from reinforcepp.rollout.vllm.server import environment_key, server_command, server_environment, vllm_is_for_gpus

USUAL_LENGTH = 8192  # a model may have room for a million tokens, and the server would reserve memory for them


def run_server(config: ServeConfig) -> int:
    """Serve until a signal comes; returns the exit code, 128 and the signal's number.

    Raises:
        ReinforceError: the model, the address or the key can't be used, vLLM can't run the model, or its server fails.
    """
    key = _key(config)
    source = find_source(config.model)
    model_config = load_config(source.name)
    context = context_length(model_config)
    length = config.max_length or min(context or USUAL_LENGTH, USUAL_LENGTH)
    if context is not None and length > context:
        raise ConfigError(f"max_length {length} exceeds the model's context of {context} tokens: lower it.")
    _check_port(config)
    dtype: torch.dtype = getattr(torch, config.dtype) if config.dtype != "auto" else model_config.dtype or torch.float32
    usable, reason = vllm_status(model_config, dtype)
    if not usable:
        raise RolloutError(f"{config.model} can't be served: {reason}.")
    framed_plainly = load_tokenizer(source.name).chat_template == PLAIN_TEMPLATE
    name = config.name or (config.model if config.model.startswith("builtin:") else Path(source.name).resolve().name)
    with tempfile.TemporaryDirectory(prefix="reinforcepp-serve-") as folder:
        template = Path(folder) / "chat_template.jinja"
        template.write_text(PLAIN_TEMPLATE, encoding="utf-8")
        command = server_command(
            _plain_folder(source, Path(folder) / "model"),
            model_config,
            dtype,
            host=config.host,
            port=config.port,
            name=name,
            max_length=length,
            batch_size=config.batch_size,
            chat_template=str(template) if framed_plainly else None,
            on_gpu=vllm_is_for_gpus(),
        )
        return _run(command, server_environment(os.environ, key), config, name, with_key=key is not None)


def _plain_folder(source: Source, place: Path) -> str:
    """Where the model is; an adapter is first merged into the model that it belongs to, in ``place``."""
    if not is_adapter_dir(Path(source.name)):
        return resolve(source.name)
    place.mkdir()
    write_folder(source, "auto", place, place.name)
    return str(place)


def _key(config: ServeConfig) -> str | None:
    """What clients must send, None for nothing."""
    if config.api_key_file is None:
        return environment_key()
    path = Path(config.api_key_file).expanduser()
    if not path.is_file():
        raise ConfigError(f"There is no file {config.api_key_file} for the key: give api_key_file another name.")
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    if len(lines) != 1 or not lines[0].isascii():
        raise ConfigError(f"{config.api_key_file} must hold one line, the key, without spaces.")
    return lines[0]


def _check_port(config: ServeConfig) -> None:
    """Refuse an address that isn't this machine's, or a port that is taken, before anything is loaded."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"{config.host}:{config.port} can't be listened on ({error.strerror}): give another port or host."
        ) from error


def _run(command: list[str], environment: dict[str, str], config: ServeConfig, name: str, *, with_key: bool) -> int:
    """Start the server, tell when it answers, and wait for its end."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    if not with_key and not _is_loopback(config.host):
        echo("Everybody who reaches this address can use the model: set VLLM_API_KEY to ask for a key.", "yellow")
    echo(f"Starting vLLM with {config.model}; this takes up to a minute.")
    child = subprocess.Popen(command, env=environment, start_new_session=True)  # so that Ctrl-C reaches it through us
    try:
        with _passing_signals(child) as came:
            while child.poll() is None and not _answers(url):
                time.sleep(0.2)
            if child.poll() is None:
                asked = "a key" if with_key else "no key"
                echo(f"Serving {name} at {url}/v1, which asks for {asked}; Ctrl-C stops.", "green")
            code = child.wait()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its engine, if that is left
    if came:
        return 128 + came[0]
    raise RolloutError(f"vLLM's server ended with exit code {code}: what it said stands above.")


@contextmanager
def _passing_signals(child: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """The signals that came; the first one asks the server to end, the second one ends it."""
    came: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        came.append(number)
        with suppress(ProcessLookupError):
            if len(came) == 1:
                child.terminate()
            else:
                os.killpg(child.pid, signal.SIGKILL)

    with handle_signals(pass_on):
        yield came


def _answers(url: str) -> bool:
    """Whether the server is ready."""
    try:
        with build_opener(ProxyHandler({})).open(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
