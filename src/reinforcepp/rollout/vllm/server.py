"""The command and the environment of vLLM's server, which runs in a process of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from reinforcepp.rollout.vllm.memory import CPU_BLOCK, memory_settings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODULE = "vllm.entrypoints.openai.api_server"
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # what our own engine sets; a server needs its engine apart
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
) -> list[str]:
    """How the server is started.

    Args:
        model: folder or hub name.
        config: the model's.
        dtype: of the weights.
        host: address to listen on.
        port: port to listen on.
        name: what clients call the model.
        max_length: prompt and answer together, in tokens.
        batch_size: answers generated at a time.
        chat_template: file with the template, where the tokenizer has none.
        on_gpu: whether the installed vLLM is the one for GPUs, which then takes the share of memory that it always does.
    """
    told: dict[str, object] = {
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
        told["chat-template"] = chat_template
    if not on_gpu:
        memory = memory_settings(
            model,
            config,
            dtype,
            on_gpu=False,
            max_length=max_length,
            max_num_seqs=batch_size,
            cache_bytes=None,
            gpu_memory_utilization=None,
            tensor_parallel_size=1,
        )
        told |= {"block-size": CPU_BLOCK, "kv-cache-memory-bytes": memory["kv_cache_memory_bytes"]}
    flags = [f"--{flag}={value}" for flag, value in told.items()]
    alone = [] if on_gpu else ["--enforce-eager"]
    return [sys.executable, "-m", MODULE, *flags, "--disable-log-stats", *alone]


def server_environment(given: Mapping[str, str], key: str | None) -> dict[str, str]:
    """The server's environment; a key is there, and not in the command, which every user of the machine can read."""
    kept = {name: value for name, value in given.items() if name not in (IN_PROCESS, KEY)}
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",  # vLLM's own deprecations, which no user can act on
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    return quiet | kept | ({KEY: key} if key else {})


def training_command(model: str, max_length: int) -> str:
    """How a user starts a server to train against."""
    flags = f"--max-model-len {max_length} --logprobs-mode processed_logprobs"
    return f"VLLM_SERVER_DEV_MODE=1 vllm serve {model} {flags}"


def vllm_is_for_gpus() -> bool:
    """Whether the installed vLLM runs on GPUs; it must be installed."""
    from vllm.platforms import current_platform

    return not current_platform.is_cpu()


def environment_key() -> str | None:
    """The key that the user's environment holds for vLLM's server."""
    return os.environ.get(KEY) or None
