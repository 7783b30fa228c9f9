"""The dtype that models compute in, and measurements of its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from reinforcepp.config import ComputeConfig
from reinforcepp.errors import option

PROBE_SIZE, PROBE_SECONDS = 256, 0.05
"""Rows of the square matrices that are multiplied to measure a dtype's speed, and the time for it."""
SLOW_RATIO = 4
"""bfloat16 this many times slower than float32 is emulated. With native instructions it is at least as fast."""


def compute_dtype(config: ComputeConfig) -> torch.dtype:
    """Return the dtype that models compute in."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.mixed_precision]


def slow_precision(config: ComputeConfig) -> str:
    """Return a warning if a training on this CPU computes much slower in ``mixed_precision`` bf16 than in float32.

    A CPU without bfloat16 instructions emulates them, up to 100 times slower. The flags of the CPU don't tell, because
    libraries can be limited to older instructions. So both are measured, which takes about 0.1 seconds.
    """
    if config.mixed_precision != "bf16":
        return ""
    flops = {dtype: matmul_flops("cpu", dtype, PROBE_SIZE, PROBE_SECONDS) for dtype in (torch.bfloat16, torch.float32)}
    if flops[torch.bfloat16] * SLOW_RATIO > flops[torch.float32]:
        return ""
    return (
        f"mixed_precision bf16: this CPU reaches {format_flops(flops[torch.bfloat16])} in bfloat16, compared with "
        f"{format_flops(flops[torch.float32])} in float32, because it has no fast bfloat16 instructions. Use "
        f"{option('mixed_precision', 'no')}, which computes in float32."
    )


def matmul_flops(device: str, dtype: torch.dtype, size: int, seconds: float, max_rounds: int = 1000) -> float:
    """Return the best measured FLOP/s of square matrix products, repeated for about ``seconds``."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    return 2 * size**3 / least_seconds(device, lambda: matrix @ matrix, seconds, max_rounds)


def least_seconds(device: str, function: Callable[[], Any], seconds: float, max_rounds: int) -> float:
    """Return the least time of ``function``, which is repeated up to ``max_rounds`` times and for about ``seconds``."""
    function()  # The first call includes initialization.
    least, begin = math.inf, time.perf_counter()
    for _ in range(max_rounds):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        end = time.perf_counter()
        least = min(least, end - start)
        if end - begin > seconds:
            break
    return least


def format_flops(rate: float) -> str:
    """Return FLOP/s with a unit and two digits or more."""
    if rate >= 1e13:
        return f"{rate / 1e12:,.0f} TFLOP/s"
    return f"{rate / 1e9:,.0f} GFLOP/s" if rate >= 1e10 else f"{rate / 1e9:.2g} GFLOP/s"


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast floating-point parameters to ``dtype``; buffers (rotary frequencies need float32) and 4-bit weights stay."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
