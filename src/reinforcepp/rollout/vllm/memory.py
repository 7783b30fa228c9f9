"""Memory of vLLM's KV cache and of its copy of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import RolloutError, option, setting
from reinforcepp.models.lora import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MIB = 1 << 20
CPU_CACHE_CAP = 256 * MIB
"""Bytes of the KV cache on a CPU, unless one sequence needs more or the user sets more."""
CPU_BLOCK = 32
"""Tokens of a cache block on a CPU. vLLM's default of 128 would share no shorter prompt between its samples."""


def head_size(text: Any) -> int:
    """Return the width of one attention head from a text model's configuration; 0 for a model without attention."""
    heads = getattr(text, "num_attention_heads", None)
    return int(getattr(text, "head_dim", None) or text.hidden_size // heads) if heads else 0


def cache_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers; a state without attention counts as one hidden state."""
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    width = kv_heads * head_size(text) if kv_heads else text.hidden_size
    return int(2 * text.num_hidden_layers * width * dtype.itemsize)


def cache_budget(per_token: int, length: int, sequences: int, available: int, cap: int | None) -> int:
    """Return the bytes of the KV cache: enough for the batch, at most ``cap``, but at least enough for one sequence.

    A cache smaller than the batch isn't an error: the engine queues sequences.

    Args:
        per_token: Bytes of one token.
        length: Tokens of a sequence.
        sequences: Sequences that are generated at a time.
        available: Bytes that are free.
        cap: Bytes; None is unlimited.

    Raises:
        RolloutError: ``available`` is too small for one sequence.
    """
    block = per_token * CPU_BLOCK
    one = block * -(-length // CPU_BLOCK)
    least, wanted = one + block, one * sequences + block  # vLLM reserves one block for itself
    if least > available:
        raise RolloutError(
            f"{setting('rollout')} vllm: the KV cache of one sequence needs {least / MIB:.0f} MiB, but "
            f"{max(available, 0) / MIB:.0f} MiB are free. Lower max_prompt_length or max_new_tokens, use a smaller "
            f"dtype, or use {option('rollout', 'transformers')}."
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
    cache_bytes: int | None = None,
    gpu_memory_utilization: float | None = None,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """Return vLLM's memory arguments: on a CPU the cache size, on a GPU the share of memory for engine and cache."""
    if gpu_memory_utilization is not None and on_gpu:
        return {"gpu_memory_utilization": gpu_memory_utilization}
    sequences = cache_bytes_per_token(config, dtype), max_length, max_num_seqs
    if not on_gpu:
        import psutil  # a dependency of vllm

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
    """Return the size of the weights of a live or a saved model in ``dtype``."""
    if not isinstance(source, str):
        return sum(p.numel() for p in base_model(source).parameters()) * dtype.itemsize
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
