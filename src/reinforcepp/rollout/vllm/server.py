"""The command and the environment of a vLLM server, which runs in a separate process."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from reinforcepp.errors import ConfigError
from reinforcepp.rollout.vllm.compat import load_format
from reinforcepp.rollout.vllm.memory import CPU_BLOCK, memory_settings
from reinforcepp.runtime.redaction import is_secret

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MODULE = "vllm.entrypoints.openai.api_server"
IN_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"  # our own engine sets it; a server needs its engine in a separate process
KEY = "VLLM_API_KEY"
DEV_MODE = "VLLM_SERVER_DEV_MODE"
GUARD = "reinforcepp.commands.access.RequireKey"
"""Import path of the middleware that requires the key on every path except ``/health``."""

PASSED_VARIABLES = """
    PATH HOME USER LOGNAME SHELL HOSTNAME TERM COLORTERM COLUMNS NO_COLOR FORCE_COLOR LANG LANGUAGE TZ TMPDIR TEMP TMP
    VIRTUAL_ENV CONDA_PREFIX CONDA_DEFAULT_ENV CONDA_EXE
    CC CXX CFLAGS CXXFLAGS CPPFLAGS LDFLAGS CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH LIBRARY_PATH CUDACXX CUDAHOSTCXX MAX_JOBS
    HF_HOME HF_ENDPOINT HF_MODULES_CACHE HF_HUB_DISABLE_IMPLICIT_TOKEN HUGGINGFACE_HUB_CACHE DO_NOT_TRACK DISABLE_TELEMETRY
    HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GPU_DEVICE_ORDINAL ATEN_CPU_CAPABILITY
    VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
"""
"""Variables that a server gets from the user's environment. Two of them only sound secret: ``*_TOKEN`` and ``*_TOKENS``."""
PASSED_PREFIXES = """
    LC_ XDG_ LD_ DYLD_ PYTHON VLLM_ TORCH PYTORCH_ TRITON_ INDUCTOR_ FLASHINFER_ FLASH_ATTENTION_ TILELANG_ CUTE_DSL_ DG_ NUMBA_
    CUDA_ CUDNN_ CUBLAS_ NVIDIA_ NVCC_ NCCL_ NVSHMEM_ HIP_ HIPBLASLT_ HSA_ ROCM_ ROCR_ MIOPEN_ AITER_ ZE_ SYCL_ ONEAPI_ CCL_
    GLOO_ UCX_ OMP_ GOMP_ KMP_ MKL_ OPENBLAS_ ONEDNN_ DNNL_ NUMEXPR_ RAYON_ TOKENIZERS_ MALLOC_
    HF_HUB_ HF_XET_ TRANSFORMERS_ SAFETENSORS_ TIKTOKEN_
"""
"""Prefixes of further variables that a server gets, unless they are secret: settings of GPUs, threads and libraries."""
UNSAFE_VARIABLES = frozenset(
    {
        DEV_MODE,  # endpoints that run methods of the workers
        "VLLM_ALLOW_INSECURE_SERIALIZATION",  # pickled functions in requests to these
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",  # endpoints that load any folder of the node
        "VLLM_USE_RUST_FRONTEND",  # another HTTP server, which runs no middleware
    }
)
"""vLLM's variables that a server doesn't get, because they open endpoints, let requests run code or skip the key."""


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
        "load-format": load_format(model),
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
    """Return the server's environment: the variables that vLLM needs, and no secret but the key.

    It holds the key because every user of the node can read the command line.
    """
    kept = {name: value for name, value in environment.items() if _is_passed(name)}
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",  # vLLM's own deprecations, which no user can act on
        "OMP_WAIT_POLICY": "PASSIVE",
        # Otherwise "python -m" imports modules of the current folder, which can be that of an untrusted model.
        "PYTHONSAFEPATH": "1",
    }
    return quiet | kept | ({KEY: key} if key else {})


def unsafe_settings(environment: Mapping[str, str]) -> list[str]:
    """Return the variables that are set to open more of vLLM, and that :func:`server_environment` doesn't pass."""
    return sorted(name for name in UNSAFE_VARIABLES if environment.get(name, "0").lower() not in ("", "0", "false"))


def _is_passed(name: str) -> bool:
    if name == IN_PROCESS or name in UNSAFE_VARIABLES:
        return False
    with_prefix = name.startswith(tuple(PASSED_PREFIXES.split())) and not is_secret(name)
    return with_prefix or name in PASSED_VARIABLES.split()


def training_command(model: str, max_length: int, *, with_key: bool = False) -> str:
    """Return the command with which a user starts a server for training.

    The server listens on the loopback address, because vLLM's endpoints for weights require no key and can run code.
    ``with_key`` adds the middleware that requires a key there, too.
    """
    flags = f"--host 127.0.0.1 --max-model-len {max_length} --logprobs-mode processed_logprobs"
    flags += f" --middleware {GUARD}" if with_key else ""
    return f"{DEV_MODE}=1 vllm serve {model} {flags}"


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
