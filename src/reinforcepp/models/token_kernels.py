"""Triton kernels for log-probabilities and entropy: each pass reads the logits once and holds none in float32.

Import this module only on a GPU: it needs Triton. The torch operations in ``token_logprobs`` define the results.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_COLUMNS, BACKWARD_COLUMNS, WARPS = 8192, 4096, 8


def forward(logits_NV: Tensor, ids_N: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probability of each id, the entropy, and the log of the softmax's denominator."""
    logits_NV = logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()
    results = tuple(torch.empty(len(ids_N), device=logits_NV.device) for _ in range(3))
    if len(ids_N):
        grid, sizes = (len(ids_N),), (logits_NV.stride(0), logits_NV.shape[1])
        _forward_kernel[grid](
            logits_NV, ids_N, *results, *sizes, float(temperature), COLUMNS=FORWARD_COLUMNS, num_warps=WARPS
        )
    logprobs_N, entropy_N, log_z_N = results
    return logprobs_N, entropy_N, log_z_N


def backward(
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
    rows, columns = logits_NV.shape
    if rows:
        bonus = slope_N if bonus_N is None else bonus_N
        values = ids_N, log_z_N, entropy_N, slope_N.contiguous(), bonus.contiguous()
        _backward_kernel[(rows, triton.cdiv(columns, BACKWARD_COLUMNS))](
            gradient_NV,
            logits_NV,
            *values,
            *(gradient_NV.stride(0), gradient_NV.stride(1), logits_NV.stride(0), logits_NV.stride(1), columns),
            float(temperature),
            HAS_BONUS=bonus_N is not None,
            COLUMNS=BACKWARD_COLUMNS,
            num_warps=WARPS,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(
    logits: Any,
    ids: Any,
    logprobs: Any,
    entropy: Any,
    log_zs: Any,
    stride: Any,
    columns: Any,
    temperature: Any,
    COLUMNS: tl.constexpr,
) -> None:
    """One program per row. ``total`` = Σ exp(x - best) and ``weighted`` = Σ x · exp(x - best) follow a rising maximum."""
    row = tl.program_id(0).to(tl.int64)
    begin = logits + row * stride
    best = float("-inf")
    total = 0.0
    weighted = 0.0
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(begin + column, mask=column < columns, other=float("-inf")).to(tl.float32) / temperature
        new_best = tl.maximum(best, tl.max(x, 0))
        shrink = tl.exp(best - new_best)
        p = tl.exp(x - new_best)
        total = total * shrink + tl.sum(p, 0)
        weighted = weighted * shrink + tl.sum(tl.where(column < columns, p * x, 0.0), 0)
        best = new_best
    log_z = best + tl.log(total)
    chosen = tl.load(begin + tl.load(ids + row)).to(tl.float32) / temperature
    tl.store(logprobs + row, chosen - log_z)
    tl.store(entropy + row, log_z - weighted / total)
    tl.store(log_zs + row, log_z)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(
    gradient: Any,
    logits: Any,
    ids: Any,
    log_zs: Any,
    entropy: Any,
    slopes: Any,
    bonuses: Any,
    gradient_row: Any,
    gradient_column: Any,
    logits_row: Any,
    logits_column: Any,
    columns: Any,
    temperature: Any,
    HAS_BONUS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    place = logits + row * logits_row + column * logits_column
    x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32) / temperature
    logp = x - tl.load(log_zs + row)
    p = tl.exp(logp)
    slope = tl.load(slopes + row)
    result = tl.where(column == tl.load(ids + row), slope, 0.0) - slope * p
    if HAS_BONUS:
        result -= tl.load(bonuses + row) * p * (logp + tl.load(entropy + row))
    place = gradient + row * gradient_row + column * gradient_column
    tl.store(place, (result / temperature).to(gradient.dtype.element_ty), mask=inside)
