"""Drawing tokens: both engines on a CPU draw alike, so with the same weights and seeds they sample the same completions."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Tokens of the vocabulary whose probabilities are added up together."""
ALMOST_ONE = 1 - 2**-53


def uniforms(seed: int, count: int) -> Tensor:
    """The random numbers of one completion, one for each token. -> (count,) float64"""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(logits_BV: Tensor, uniforms_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token at each row's uniform number, by inverting the cumulative distribution; the likeliest without numbers.

    A number belongs to a completion and not to a batch, so what is drawn doesn't depend on what is generated beside it.
    Probabilities are added up by blocks: the block that a number falls into, then the token in it, are found without
    summing the whole vocabulary token by token. Where a number falls within its block is kept as a share of it, so
    rounding can't lead to a token of probability 0.

    Returns:
        ``(ids_B, logprobs_B)``, the latter in float32.
    """
    probs_BV = logits_BV.softmax(-1, dtype=torch.float32)
    ids_B = logits_BV.argmax(-1) if uniforms_B is None else _at(probs_BV, uniforms_B)
    return ids_B, probs_BV.gather(-1, ids_B[:, None]).squeeze(-1).log()


def _at(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    size = probs_BV.shape[-1]
    whole = size - size % BLOCK
    sums_BK = torch.unflatten(probs_BV[:, :whole], -1, (-1, BLOCK)).sum(-1)
    ends_BK = torch.cat([sums_BK, probs_BV[:, whole:].sum(-1, keepdim=True)], -1).double().cumsum(-1)
    point_B1 = uniforms_B[:, None] * ends_BK[:, -1:]
    block_B1 = torch.searchsorted(ends_BK, point_B1, right=True).clamp_max(ends_BK.shape[-1] - 1)
    begin_B1 = torch.where(block_B1 > 0, ends_BK.gather(1, (block_B1 - 1).clamp_min(0)), 0.0)
    share_B1 = ((point_B1 - begin_B1) / (ends_BK.gather(1, block_B1) - begin_B1)).clamp(0, ALMOST_ONE)
    places_BJ = block_B1 * BLOCK + torch.arange(BLOCK, device=probs_BV.device)
    block_BJ = torch.where(places_BJ < size, probs_BV.gather(1, places_BJ.clamp_max(size - 1)), 0.0)
    inside_BJ = block_BJ.double().cumsum(-1)
    place_B1 = torch.searchsorted(inside_BJ, share_B1 * inside_BJ[:, -1:], right=True)
    return (block_B1 * BLOCK + place_B1).squeeze(-1)
