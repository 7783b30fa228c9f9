"""Memory of vLLM's KV cache and of its copy of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import RolloutError, option, setting
from reinforcepp.models.lora import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

MIB = 1 << 20
CPU_CACHE_CAP = 256 * MIB
"""Bytes of the KV cache on a CPU, unless one sequence needs more or the user sets more."""
GPU_BATCHED_TOKENS = 8192
"""Tokens of a forward pass on a GPU: vLLM's own default for GPUs below 70 GB. More would only take memory."""
GPU_RUNTIME_BYTES = 768 * MIB
"""An estimate of vLLM's other allocations on a GPU: CUDA graphs and workspaces of kernels."""
LOGITS_COPIES = 4
"""Copies of the logits in float32 at a time: logits, log-probabilities, and both for the filters of sampling."""
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


@dataclass(frozen=True)
class ActivationSize:
    """Bytes of vLLM's activations on a GPU."""

    token: int
    """Per token of a forward pass."""
    sequence: int
    """Per sequence that gets a token: its logits."""

    def peak(self, sequences: int) -> int:
        """Return the largest bytes for this many sequences at a time, with what vLLM allocates at its start."""
        tokens = max(GPU_BATCHED_TOKENS, sequences)
        return GPU_RUNTIME_BYTES + max(tokens * self.token, sequences * self.sequence)


def activation_size(config: PreTrainedConfig, dtype: torch.dtype) -> ActivationSize:
    """Return the size of vLLM's activations, which its profile run measures when it starts.

    In a layer, either hidden states, gate and up projection and their product exist at a time, or hidden states, queries, keys
    and values, and the output of the attention.
    """
    text = config.get_text_config()
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", 0) or 0
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    wide = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    experts = (getattr(text, "num_experts_per_tok", None) or 0) * (getattr(text, "moe_intermediate_size", None) or wide)
    layer = 4 * hidden + max(3 * max(wide, experts), 2 * (heads + kv_heads) * head_size(text))
    per_logit = dtype.itemsize + LOGITS_COPIES * torch.float32.itemsize
    return ActivationSize(layer * dtype.itemsize, text.vocab_size * per_logit)


def gpu_utilization(
    free: int,
    total: int,
    reserved: int,
    weights: int,
    activations: int,
    sequences: tuple[int, int, int],
    cap: int | None,
) -> float:
    """Return the share of a GPU's memory for vLLM.

    Args:
        free: Bytes that are free when vLLM starts.
        total: Bytes of the GPU.
        reserved: Bytes that the trainer will allocate later and keep while vLLM generates.
        weights: Bytes of vLLM's weights.
        activations: Bytes of its activations.
        sequences: Bytes of a token in the cache, tokens of a sequence, and sequences at a time.
        cap: Bytes of the cache; None is as much as the sequences need.

    Raises:
        RolloutError: The cache of one sequence doesn't fit.
    """
    room = int(0.95 * free) - reserved - weights - activations
    cache = cache_budget(*sequences, room if cap is None else min(cap, room), cap)
    return (weights + activations + cache) / total


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
    reserved_bytes: int = 0,
) -> dict[str, Any]:
    """Return vLLM's memory arguments: on a CPU the cache size, on a GPU the share of memory and the tokens of a forward pass.

    On a GPU, ``reserved_bytes`` are those that the trainer will allocate later and keep while vLLM generates.
    """
    batch = {"max_num_batched_tokens": max(GPU_BATCHED_TOKENS, max_num_seqs)} if on_gpu else {}
    if gpu_memory_utilization is not None and on_gpu:
        return batch | {"gpu_memory_utilization": gpu_memory_utilization}
    sequences = cache_bytes_per_token(config, dtype), max_length, max_num_seqs
    if not on_gpu:
        import psutil  # a dependency of vllm

        available = psutil.virtual_memory().available
        bound = available if cache_bytes is None else min(cache_bytes, available)
        cap = CPU_CACHE_CAP if cache_bytes is None else cache_bytes
        return {"kv_cache_memory_bytes": cache_budget(*sequences, bound, cap)}
    free, total = torch.cuda.mem_get_info()
    weights = weight_bytes(source, config, dtype) // tensor_parallel_size
    activations = activation_size(config, dtype).peak(max_num_seqs)
    share = gpu_utilization(free, total, reserved_bytes, weights, activations, sequences, cache_bytes)
    return batch | {"gpu_memory_utilization": share}


def weight_bytes(source: PreTrainedModel | str, config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the size of the weights of a live or a saved model in ``dtype``."""
    if not isinstance(source, str):
        return sum(p.numel() for p in base_model(source).parameters()) * dtype.itemsize
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) * dtype.itemsize
