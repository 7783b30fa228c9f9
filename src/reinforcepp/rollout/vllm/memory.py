"""How much memory a key-value cache and a copy of the weights take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import RolloutError
from reinforcepp.models.lora import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MIB = 1 << 20
CPU_CACHE_CAP = 256 * MIB
"""Size of the key-value cache on a CPU where one sequence doesn't need more and nobody asked for more."""
CPU_BLOCK = 32
"""Tokens of a cache block on a CPU. vLLM's own 128 would share no prompt shorter than that between its samples."""


def head_size(text: Any) -> int:
    """Width of one attention head, of a text model's configuration."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers."""
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return 2 * text.num_hidden_layers * kv_heads * head_size(text) * dtype.itemsize


def cache_budget(per_token: int, length: int, sequences: int, available: int, cap: int | None) -> int:
    """Bytes for the key-value cache: what the batch needs, at most ``cap``, but at least what one sequence needs.

    A smaller cache than the batch needs is no error: the engine lets sequences wait for each other.

    Args:
        per_token: bytes.
        length: of a sequence, in tokens.
        sequences: that are generated at a time.
        available: bytes.
        cap: bytes; None is none.

    Raises:
        RolloutError: not even one sequence fits into ``available``.
    """
    block = per_token * CPU_BLOCK
    one = block * -(-length // CPU_BLOCK)
    least, wanted = one + block, one * sequences + block  # vLLM keeps one block for itself
    if least > available:
        raise RolloutError(
            f"The key-value cache of one sequence needs {least / MIB:.0f} MiB, but {max(available, 0) / MIB:.0f} MiB are "
            "free: lower max_prompt_length or max_new_tokens, use a smaller dtype, or use --rollout transformers."
        )
    return max(least, min(wanted, available, wanted if cap is None else cap))


def memory_settings(
    source: PreTrainedModel | str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    on_gpu: bool,
    max_length: int,
    max_num_seqs: int,
    cache_bytes: int | None,
    gpu_memory_utilization: float | None,
    tensor_parallel_size: int,
) -> dict[str, Any]:
    """What vLLM is told about memory: the size of the cache on a CPU, on a GPU the share that engine and cache take."""
    if gpu_memory_utilization is not None and on_gpu:
        return {"gpu_memory_utilization": gpu_memory_utilization}
    sequences = cache_bytes_per_token(config, dtype), max_length, max_num_seqs
    if not on_gpu:
        import psutil  # vllm depends on it

        available = psutil.virtual_memory().available
        bound = available if cache_bytes is None else min(cache_bytes, available)
        cap = CPU_CACHE_CAP if cache_bytes is None else cache_bytes
        return {"kv_cache_memory_bytes": cache_budget(*sequences, bound, cap)}
    free, total = torch.cuda.mem_get_info()
    weights = weight_bytes(source, config, dtype) // tensor_parallel_size
    activations = total // 20
    room = int(0.95 * free) - weights - activations
    cache = cache_budget(*sequences, room if cache_bytes is None else min(cache_bytes, room), cache_bytes)
    return {"gpu_memory_utilization": (weights + activations + cache) / total}


def weight_bytes(source: PreTrainedModel | str, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Size of the weights of a live or a saved model in ``dtype``."""
    if not isinstance(source, str):
        return sum(p.numel() for p in base_model(source).parameters()) * dtype.itemsize
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
