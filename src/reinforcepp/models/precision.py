"""The dtype that models compute in, and measurements of its speed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from reinforcepp.config import ComputeConfig
from reinforcepp.errors import option

Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

PROBE_SIZE, PROBE_SECONDS = 256, 0.05
"""Rows of the square matrices that are multiplied to measure a dtype's speed, and the time for it."""
FAST_RATIO = 1.2
"""bfloat16 at least this many times faster than float32 is native: 1.9 with AVX512-BF16, 0.4 with AVX512 only, 0.01 with AVX2."""
SLOW_RATIO = 4
"""bfloat16 this many times slower than float32 is emulated. With native instructions it is at least as fast."""
SMALL_PARAMETERS = 10_000_000
"""Models with fewer parameters compute in float32: in bfloat16 they decode as slowly, and train at most 1.5 times faster."""


def compute_dtype(config: ComputeConfig) -> torch.dtype:
    """Return the dtype that models compute in; ``mixed_precision`` must be resolved."""
    return DTYPES[config.mixed_precision]


def automatic_precision(config: ComputeConfig, parameters: int, device: str | None = None) -> tuple[Precision, str]:
    """Return the value of ``mixed_precision`` auto for a model of this many ``parameters``, and the reason.

    Args:
        config: settings of the training.
        parameters: of the model that is trained.
        device: cpu, cuda, or the title of another GPU, which has bfloat16; default: the device of this process.
    """
    if (name := config.float32_setting) is not None:
        return "no", f"as {name} requires"
    if parameters < SMALL_PARAMETERS:
        return "no", f"the default for models of fewer than {SMALL_PARAMETERS // 10**6} million parameters"
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "other" if torch.accelerator.is_available() else "cpu"
    if device == "cpu":
        return ("bf16" if bf16_is_fast() else "no"), f"a core of this CPU reaches {format_speeds()}"
    if device == "other":
        return "no", "the default for accelerators other than GPUs with CUDA"
    if device != "cuda":
        return "bf16", f"{device} has bfloat16 instructions"
    if has_bf16():
        return "bf16", f"{torch.cuda.get_device_name()} has bfloat16 instructions"
    return "no", _no_bf16()


def _no_bf16() -> str:
    name = torch.cuda.get_device_name()
    return f"{name} has no bfloat16 instructions, but {option('mixed_precision', 'fp16')} is fast"


def has_bf16() -> bool:
    """Return whether the GPU computes in bfloat16 without emulation."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def inference_dtype(requested: str, *stored: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which models generate, the same for all of them.

    On a GPU, ``auto`` is the dtype of the checkpoints, and float32 if they differ. On a CPU it is float32, so that a seed
    gives the same responses on every CPU.

    Args:
        requested: auto, float32, bfloat16 or float16.
        stored: dtypes of the checkpoints; None if unknown.
    """
    if requested != "auto":
        dtype: torch.dtype = getattr(torch, requested)
        return dtype
    if not torch.cuda.is_available():
        return torch.float32
    found = {torch.bfloat16 if dtype is None else dtype for dtype in stored}
    dtype = found.pop() if len(found) == 1 else torch.float32
    # float16 has the size and the speed that such a model needs on a GPU without bfloat16, as in vLLM.
    return torch.float16 if dtype == torch.bfloat16 and not has_bf16() else dtype


def slow_precision(config: ComputeConfig, *, on_gpu: bool = False) -> str:
    """Return a warning if a training on this CPU, or on this GPU, computes much slower in 16 bits than it could.

    A CPU without instructions for a dtype emulates them, up to 500 times slower. The flags of the CPU don't tell, because
    libraries can be limited to older instructions. So both are measured.
    """
    chosen = config.mixed_precision
    if chosen not in ("bf16", "fp16"):
        return ""
    if on_gpu:
        return "" if chosen == "fp16" or has_bf16() else f"mixed_precision bf16: {_no_bf16()}."
    dtype, (short, float32) = "bfloat16", cpu_flops()
    if chosen == "fp16":
        dtype, (short, float32) = "float16", cpu_flops(torch.float16)
    if short * SLOW_RATIO > float32:
        return ""
    return (
        f"mixed_precision {chosen}: a core of this CPU reaches {format_flops(short)} in {dtype}, compared with "
        f"{format_flops(float32)} in float32, because it has no fast {dtype} instructions. Use "
        f"{option('mixed_precision', 'no')}, which computes in float32."
    )


def bf16_is_fast() -> bool:
    """Return whether this CPU computes faster in bfloat16 than in float32."""
    bf16, float32 = cpu_flops()
    return bf16 >= FAST_RATIO * float32


def format_speeds() -> str:
    """Return both speeds of :func:`cpu_flops` as text."""
    bf16, float32 = map(format_flops, cpu_flops())
    return f"{bf16} in bfloat16, compared with {float32} in float32"


@cache
def cpu_flops(dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """Return the FLOP/s of a CPU core in a 16-bit dtype and in float32, measured once per process in about 0.1 seconds.

    The dtypes take turns, so that other processes slow both, and the best of all rounds counts. Several threads would wait
    for each other on a busy CPU, and that can take longer than the products.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _core_flops(dtype)
    finally:
        torch.set_num_threads(threads)


def _core_flops(short: torch.dtype) -> tuple[float, float]:
    least = dict.fromkeys((short, torch.float32), math.inf)
    for dtype in least:
        _ = torch.ones(8, 8, dtype=dtype) @ torch.ones(8, 8, dtype=dtype)  # The first call includes initialization.
    matrices = {dtype: torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=dtype) for dtype in least}
    begin = time.perf_counter()
    while True:
        for dtype, matrix in matrices.items():
            start = time.perf_counter()
            _ = matrix @ matrix
            least[dtype] = min(least[dtype], time.perf_counter() - start)
        if time.perf_counter() - begin > PROBE_SECONDS:
            break
    first, float32 = (2 * PROBE_SIZE**3 / seconds for seconds in least.values())
    return first, float32


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
