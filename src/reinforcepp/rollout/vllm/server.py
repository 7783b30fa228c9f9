"""The command and the environment of a vLLM server, which runs in a separate process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from reinforcepp.errors import ConfigError
from reinforcepp.rollout.vllm.memory import CPU_BLOCK, memory_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODULE = "vllm.entrypoints.openai.api_server"
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # our own engine sets it; a server needs its engine in a separate process
KEY = "VLLM_API_KEY"


def server_command(
    model: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    host: str,
    port: int,
    name: str,
    max_length: int,
    batch_size: int,
    chat_template: str | None,
    on_gpu: bool,
    middleware: str | None = None,
) -> list[str]:
    """Return the command line that starts a server.

    Args:
        model: Folder or Hugging Face Hub name.
        config: The model's configuration.
        dtype: Data type of the weights.
        host: Address to listen on.
        port: Port to listen on.
        name: The model's name in requests.
        max_length: Tokens of prompt and completion together.
        batch_size: Completions generated at a time.
        chat_template: File with the template, for a tokenizer without one.
        on_gpu: Whether the installed vLLM is the GPU build, which then takes its default share of memory.
        middleware: Import path of a class of ASGI middleware, which gets each request first.
    """
    settings: dict[str, object] = {
        "model": model,
        "host": host,
        "port": port,
        "served-model-name": name,
        "dtype": str(dtype).removeprefix("torch."),
        "max-model-len": max_length,
        "max-num-seqs": batch_size,
        "uvicorn-log-level": "warning",
    }
    if chat_template is not None:
        settings["chat-template"] = chat_template
    if middleware is not None:
        settings["middleware"] = middleware
    if not on_gpu:
        memory = memory_settings(model, config, dtype, on_gpu=False, max_length=max_length, max_num_seqs=batch_size)
        settings |= {"block-size": CPU_BLOCK, "kv-cache-memory-bytes": memory["kv_cache_memory_bytes"]}
    flags = [f"--{flag}={value}" for flag, value in settings.items()]
    eager = [] if on_gpu else ["--enforce-eager"]
    return [sys.executable, "-m", MODULE, *flags, "--disable-log-stats", *eager]


def server_environment(environment: Mapping[str, str], key: str | None) -> dict[str, str]:
    """Return the server's environment; it holds the key because every user of the node can read the command line."""
    kept = {name: value for name, value in environment.items() if name not in (IN_PROCESS, KEY)}
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",  # vLLM's own deprecations, which no user can act on
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return quiet | kept | ({KEY: key} if key else {})


def training_command(model: str, max_length: int) -> str:
    """Return the command with which a user starts a server for training."""
    flags = f"--max-model-len {max_length} --logprobs-mode processed_logprobs"
    return f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} {flags}"


def vllm_is_for_gpus() -> bool:
    """Return whether the installed vLLM is the GPU build; it must be installed."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def environment_key() -> str | None:
    """Return the API key for vLLM's server from the environment, if it is set.

    Raises:
        ConfigError: The key has characters that a header can't hold. The message never shows the key.
    """
    key = os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"{KEY}: the key holds a space, a line break or another character that a key can't have. Remove it."
        )
    return key
