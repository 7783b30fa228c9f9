"""What a training is planned for: how much memory there is, and how fast it computes and reads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reinforcepp.config import PlanConfig
from reinforcepp.config.accelerators import ACCELERATORS
from reinforcepp.errors import ConfigError

GIB = 1 << 30
ROUNDS = 8
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    operations: float
    """Floating-point operations of large matrix products."""
    bytes: float
    """Read from memory."""
    measured: bool
    """On this machine, just now; else from a data sheet."""


@dataclass(frozen=True)
class Machine:
    """One device out of ``gpus``, or the CPU."""

    title: str
    gpus: int
    memory: float
    """Bytes of one device."""
    rates: Rates | None
    """None where nothing is known but the memory."""


def machine_for(config: PlanConfig, dtype: torch.dtype) -> Machine:
    """What ``config`` means.

    Raises:
        ConfigError: GPUs are wanted, this machine has none, and nothing says how large they are.
    """
    given = None if config.gpu_memory is None else config.gpu_memory * GIB
    if config.device in ACCELERATORS:
        sheet = ACCELERATORS[config.device]
        tera = sheet.bf16_tflops if dtype == torch.bfloat16 else sheet.float32_tflops
        rates = Rates(tera * 1e12, sheet.gigabytes_per_second * 1e9, measured=False)
        return Machine(sheet.title, config.gpus or 1, given or sheet.gigabytes * 1e9, rates)
    here = torch.cuda.device_count()
    gpus = 0 if config.device == "cpu" else here if config.gpus is None else config.gpus
    if not gpus:
        return Machine("CPU", 0, given or main_memory(), measured("cpu", dtype))
    if here:
        total = torch.cuda.get_device_properties(0).total_memory
        return Machine(torch.cuda.get_device_name(0), gpus, given or total, measured("cuda", dtype))
    if given is None:
        raise ConfigError(
            f"This machine has no GPU that could be asked, and gpus is {gpus}: say which you mean (--device h100, for "
            "example), or how much memory each has (--gpu_memory 24)."
        )
    return Machine("GPU", gpus, given, None)


def main_memory() -> float:
    """Bytes that this process may have."""
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = CGROUP_LIMIT.read_text(encoding="utf-8").strip() if CGROUP_LIMIT.is_file() else ""
    return min(physical, float(limit)) if limit.isdigit() else physical


def measured(device: str, dtype: torch.dtype) -> Rates:
    """Rates of this machine: the best of a few large products, and of reading a block that no cache holds."""
    size, length = (8192, GIB) if device == "cuda" else (1024, GIB // 8)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    block = torch.ones(length, dtype=torch.uint8, device=device).view(torch.int64)
    product = _seconds(device, lambda: matrix @ matrix)
    reading = _seconds(device, lambda: block.sum())
    return Rates(2 * size**3 / product, block.nbytes / reading, measured=True)


def _seconds(device: str, job: Callable[[], Any]) -> float:
    job()  # the first time something is set up
    least = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        job()
        if device == "cuda":
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - start)
    return least
