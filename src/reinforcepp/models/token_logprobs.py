"""Log-probabilities and entropy from hidden states, without holding all logits in float32.

Dimensions: N response tokens of the batch, D hidden size, V vocabulary. Two optimizations reduce the work of size V
without changing results:

- Softmax and its gradient are computed in blocks that fit the CPU cache, or on a GPU by kernels that read logits once. The
  gradient overwrites the logits.
- Large logits are computed in chunks, and recomputed in the backward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils.checkpoint import checkpoint

from reinforcepp.models.mkldnn_linear import linear
from reinforcepp.runtime.terminal import warn_once

CHUNK_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Size, by device, up to which logits in the model's dtype are kept for the backward pass; larger ones are recomputed."""
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 128 << 20}
"""Size of a block of float32 logits: on a CPU it fits the cache; on a GPU the kernels hold none, if Triton compiles them."""


def head_logprobs(
    head: nn.Module, hidden_ND: Tensor, ids_N: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id and the entropy of softmax(head(hidden) / temperature), in float32.

    Returns:
        ``(logprobs_N, entropy_N)``; the entropy is in nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    weight = getattr(head, "weight", None)
    columns = hidden_ND.shape[-1] if weight is None else weight.shape[0]
    limit = CHUNK_BYTES.get(hidden_ND.device.type, CHUNK_BYTES["cpu"])
    rows = max(1, limit // (columns * hidden_ND.element_size()))
    overwrite = type(head) is nn.Linear  # nothing else needs its output in the backward pass

    def chunk(part_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = linear(head, part_ND)
        return token_logprobs(logits_NV, part_N, temperature, entropy_gradient=entropy_gradient, overwrite=overwrite)

    if len(ids_N) <= rows or weight is None:
        return chunk(hidden_ND, ids_N)
    recompute = torch.is_grad_enabled()
    parts = [
        checkpoint(chunk, part_ND, part_N, use_reentrant=False) if recompute else chunk(part_ND, part_N)
        for part_ND, part_N in zip(torch.split(hidden_ND, rows), torch.split(ids_N, rows), strict=True)
    ]
    logprobs_N, entropy_N = (torch.cat(side) for side in zip(*parts, strict=True))
    return logprobs_N, entropy_N


def token_logprobs(
    logits_NV: Tensor,
    ids_N: Tensor,
    temperature: float = 1.0,
    *,
    entropy_gradient: bool = False,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id and the entropy of softmax(logits / temperature), in float32.

    With ``overwrite``, the backward pass, which then can run once only, writes the gradient over the logits.

    Returns:
        ``(logprobs_N, entropy_N)``; the entropy is in nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    logprobs_N, entropy_N = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits_NV, ids_N, temperature, entropy_gradient, overwrite
    )
    return logprobs_N, entropy_N


class _TokenLogprobs(torch.autograd.Function):
    """Saves only the logits, in their dtype, for backward, with p = softmax(logits / temperature):

    d logp / d logits = (onehot - p) / temperature, and d H / d logits = -p · (log p + H) / temperature for the entropy H.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_N: Tensor, temperature: float, entropy_gradient: bool, overwrite: bool
    ) -> tuple[Tensor, Tensor]:
        kernels = fused_kernels(logits_NV.device.type)
        forward = _forward if kernels is None else kernels.forward
        logprobs_N, entropy_N, log_z_N = forward(logits_NV, ids_N, temperature)
        ctx.save_for_backward(logits_NV, ids_N, log_z_N, entropy_N)
        ctx.backward = _backward if kernels is None else kernels.backward
        ctx.temperature, ctx.entropy_gradient, ctx.overwrite = temperature, entropy_gradient, overwrite
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None, None]:
        slope_N, bonus_N = slopes[0], slopes[1] if ctx.entropy_gradient else None
        logits_NV, *rest = ctx.saved_tensors  # once only, because the checkpoint recomputes them once
        gradient_NV = logits_NV if ctx.overwrite else torch.empty_like(logits_NV)
        ctx.backward(gradient_NV, logits_NV, *rest, slope_N, bonus_N, ctx.temperature)
        increment_version(gradient_NV)  # torch doesn't see what a kernel writes
        return gradient_NV, None, None, None, None


def _forward(logits_NV: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability of each id, the entropy, and the log of the softmax's denominator."""
    logprobs_N, entropy_N, log_z_N = (torch.empty(len(ids_N), device=logits_NV.device) for _ in range(3))
    for rows in _blocks(logits_NV):
        scaled_NV, probs_NV = _softmax(logits_NV[rows], temperature)
        log_z_N[rows] = scaled_NV.amax(-1) - probs_NV.amax(-1).log()  # at least 1/V, so its logarithm is accurate
        logprobs_N[rows] = scaled_NV.gather(-1, ids_N[rows, None]).squeeze(-1) - log_z_N[rows]
        entropy_N[rows] = log_z_N[rows] - torch.linalg.vecdot(probs_NV, scaled_NV)
    return logprobs_N, entropy_N, log_z_N


def _backward(
    gradient_NV: Tensor,
    logits_NV: Tensor,
    ids_N: Tensor,
    log_z_N: Tensor,
    entropy_N: Tensor,
    slope_N: Tensor,
    bonus_N: Tensor | None,
    temperature: float,
) -> None:
    """Write the gradient of ``slope_N`` · log-probabilities + ``bonus_N`` · entropy; it can overwrite the logits."""
    slope_N1 = (slope_N / temperature).unsqueeze(-1)
    for rows in _blocks(logits_NV):
        scaled_NV, probs_NV = _softmax(logits_NV[rows], temperature)
        bonus_NV: Tensor | float = 0.0
        if bonus_N is not None:  # before probs_NV is overwritten
            surprise_NV = scaled_NV - (log_z_N[rows] - entropy_N[rows]).unsqueeze(-1)  # log p + H
            bonus_NV = surprise_NV.mul_(probs_NV).mul_(-bonus_N[rows, None] / temperature)
        probs_NV.mul_(-slope_N1[rows]).scatter_add_(-1, ids_N[rows, None], slope_N1[rows])
        gradient_NV[rows] = probs_NV if bonus_N is None else probs_NV + bonus_NV


def _softmax(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``(logits / temperature, softmax(logits / temperature))`` in float32."""
    scaled_NV = logits_NV.float()
    if temperature != 1:
        scaled_NV = scaled_NV / temperature
    return scaled_NV, scaled_NV.softmax(-1)


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    limit = BLOCK_BYTES.get(logits_NV.device.type, BLOCK_BYTES["cpu"])
    rows = max(1, limit // (4 * logits_NV.shape[-1]))
    for start in range(0, len(logits_NV), rows):
        yield slice(start, start + rows)


@cache
def fused_kernels(device_type: str) -> Any:
    """Return the kernels that read logits once on a GPU; None on a CPU, or if Triton can't compile them."""
    if device_type != "cuda":
        return None
    try:
        from reinforcepp.models import token_kernels

        token_kernels.forward(torch.zeros(1, 2, device=device_type), torch.zeros(1, dtype=torch.long).cuda(), 1.0)
    except Exception as error:  # Triton fails in many ways: no C compiler, no Python.h, a GPU that it doesn't support
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        reason = str(error).strip().partition("\n")[0][:200]
        warn_once(
            f"Triton can't compile kernels ({type(error).__name__}: {reason}). Log-probabilities use slower operations of "
            f"torch. Run: apt-get install build-essential {python}-dev"
        )
        return None
    return token_kernels
