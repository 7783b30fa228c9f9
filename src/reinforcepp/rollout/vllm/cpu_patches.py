"""What vLLM 0.32 is spared on a CPU, and what is given back there."""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reinforcepp.rollout.sampling import draw


def spare_work() -> None:
    """Exchange five things that vLLM does on a CPU for others with the same outcome; the first three are a seventh of a step.

    - It draws tokens by the Gumbel trick, two logarithms for each token of the vocabulary; ``draw`` needs one exponential.
    - It counts each sampled token's rank in the vocabulary, by a function that is compiled first, in 8 to 25 s; nobody
      reads ranks here.
    - It computes GPT-2's activation in eight passes over memory; torch has the same function in one.
    - It packs each matrix over the vocabulary a second time with every load of weights, also those that only look up tokens.
      Here it is packed when it is first multiplied with.
    - It loads an output layer that is tied to the embeddings as a layer of its own. Here it is the embeddings.
    """
    from vllm.model_executor.layers import activation
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.TopKTopPSampler.forward_cpu = _sample
    sampler.batched_count_greater_than = _no_ranks
    activation.NewGELU.forward_native = _tanh_gelu
    UnquantizedEmbeddingMethod.process_weights_after_loading = _unpacked
    UnquantizedEmbeddingMethod.tie_weights = _the_embeddings


def give_back_freed() -> None:
    """Give back to the system what is free in this process, where the C library can: glibc keeps it, up to 100 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _sample(
    _self: Any, logits_BV: Tensor, generators: dict[int, torch.Generator], k: Tensor | None, p: Tensor | None
) -> tuple[Tensor, Tensor]:
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    logits_BV = apply_top_k_top_p(logits_BV, k, p)
    uniforms_B = torch.rand(len(logits_BV), dtype=torch.float64)
    for row, generator in generators.items():
        uniforms_B[row] = torch.rand((), generator=generator, dtype=torch.float64)
    ids_B, logprobs_B = draw(logits_BV, uniforms_B)
    log_z_B1 = logits_BV.gather(-1, ids_B[:, None]).float() - logprobs_B[:, None]
    return ids_B, logits_BV.float() - log_z_B1


def _no_ranks(logprobs_BV: Tensor, _sampled_B1: Tensor) -> Tensor:
    return logprobs_BV.new_zeros(logprobs_BV.shape[0], dtype=torch.int64)


def _tanh_gelu(_self: Any, x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _unpacked(_self: Any, layer: Any) -> None:
    """In place of packing ``layer``, which may have packed weights of before."""
    layer.cpu_linear = partial(_pack_and_multiply, layer)


def _the_embeddings(_self: Any, _output_layer: Any, embeddings: Any) -> Any:
    return embeddings


def _pack_and_multiply(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    product: Tensor = layer.cpu_linear(x, weight, bias)
    return product
