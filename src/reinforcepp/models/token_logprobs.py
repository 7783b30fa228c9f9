"""Log-probabilities and entropy from hidden states, without holding all logits in float32.

Dimensions: N response tokens of the batch, D hidden size, V vocabulary. Two optimizations reduce the work of size V
without changing results:

- Softmax and its gradient are computed in blocks that fit the CPU cache.
- Large logits are computed in chunks, and recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 128 << 20
"""Size up to which logits, in the model's dtype, are kept for the backward pass; larger ones are recomputed."""
BLOCK_BYTES = {"cpu": 2 << 20}
"""Size of a block of float32 logits by device: on a CPU it fits the cache; other devices use a chunk."""


def head_logprobs(
    head: nn.Module, hidden_ND: Tensor, ids_N: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id and the entropy of softmax(head(hidden) / temperature), in float32.

    Returns:
        ``(logprobs_N, entropy_N)``; the entropy is in nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    weight = getattr(head, "weight", None)
    columns = hidden_ND.shape[-1] if weight is None else weight.shape[0]
    rows = max(1, CHUNK_BYTES // (columns * hidden_ND.element_size()))

    def chunk(part_ND: Tensor, part_N: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(head(part_ND), part_N, temperature, entropy_gradient=entropy_gradient)

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
    logits_NV: Tensor, ids_N: Tensor, temperature: float = 1.0, *, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each id and the entropy of softmax(logits / temperature), in float32.

    Returns:
        ``(logprobs_N, entropy_N)``; the entropy is in nats and carries a gradient only if ``entropy_gradient`` is set.
    """
    logprobs_N, entropy_N = _TokenLogprobs.apply(logits_NV, ids_N, temperature, entropy_gradient)  # type: ignore[no-untyped-call]
    return logprobs_N, entropy_N


class _TokenLogprobs(torch.autograd.Function):
    """Saves only the logits, in their dtype, for backward, with p = softmax(logits / temperature):

    d logp / d logits = (onehot - p) / temperature, and d H / d logits = -p · (log p + H) / temperature for the entropy H.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, ids_N: Tensor, temperature: float, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs_N, entropy_N = (torch.empty(len(ids_N), device=logits_NV.device) for _ in range(2))
        for rows in _blocks(logits_NV):
            block_NV, probs_NV = _softmax(logits_NV[rows], temperature)
            best_N1, index_N1 = probs_NV.max(-1, keepdim=True)  # at least 1/V, so its logarithm is accurate
            log_z_N1 = block_NV.gather(-1, index_N1) - best_N1.log()
            logprobs_N[rows] = (block_NV.gather(-1, ids_N[rows, None]) - log_z_N1).squeeze(-1)
            entropy_N[rows] = log_z_N1.squeeze(-1) - torch.linalg.vecdot(probs_NV, block_NV)
        ctx.save_for_backward(logits_NV, ids_N)
        ctx.temperature, ctx.entropy_gradient = temperature, entropy_gradient
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, ids_N = ctx.saved_tensors
        slope_N1 = (gradients[0] / ctx.temperature).unsqueeze(-1)
        gradient_NV = torch.empty_like(logits_NV)
        for rows in _blocks(logits_NV):
            block_NV, probs_NV = _softmax(logits_NV[rows], ctx.temperature)
            if ctx.entropy_gradient:  # before probs_NV is overwritten
                bonus_NV = _entropy_gradient(block_NV, probs_NV) * (gradients[1][rows, None] / ctx.temperature)
            probs_NV.mul_(-slope_N1[rows]).scatter_add_(-1, ids_N[rows, None], slope_N1[rows])
            gradient_NV[rows] = probs_NV + bonus_NV if ctx.entropy_gradient else probs_NV
        return gradient_NV, None, None, None


def _entropy_gradient(scaled_NV: Tensor, probs_NV: Tensor) -> Tensor:
    """Return -p · (log p + H), the gradient of the entropy H with respect to the scaled logits."""
    logprobs_NV = scaled_NV - torch.logsumexp(scaled_NV, -1, keepdim=True)
    entropy_N1 = -torch.linalg.vecdot(probs_NV, logprobs_NV).unsqueeze(-1)
    return -probs_NV * (logprobs_NV + entropy_N1)


def _softmax(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return ``(logits / temperature, softmax(logits / temperature))`` in float32."""
    scaled_NV = logits_NV.float()
    if temperature != 1:
        scaled_NV = scaled_NV / temperature
    return scaled_NV, scaled_NV.softmax(-1)


def _blocks(logits_NV: Tensor) -> Iterator[slice]:
    limit = BLOCK_BYTES.get(logits_NV.device.type, CHUNK_BYTES)
    rows = max(1, limit // (4 * logits_NV.shape[-1]))
    for start in range(0, len(logits_NV), rows):
        yield slice(start, start + rows)
