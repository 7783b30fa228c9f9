"""The device that a training is planned for: its memory, and how fast it computes and reads."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from reinforcepp.config import PlanConfig
from reinforcepp.config.accelerators import ACCELERATORS
from reinforcepp.errors import ConfigError, setting
from reinforcepp.models.precision import least_seconds, matmul_flops

GIB = 1 << 30
ROUNDS, ROUNDS_SECONDS = 8, 2.0
"""Limits of a measurement: repetitions, and seconds, because emulated bfloat16 takes seconds per repetition."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Rates:
    """Peak rates of a device per second."""

    flops: float
    """FLOPs of large matrix products."""
    bytes: float
    """Bytes read from memory."""
    measured: bool
    """Whether they were measured on this node just now; otherwise they are from a data sheet."""


@dataclass(frozen=True)
class Device:
    """A GPU of a node that has ``gpus`` of them, or the CPU."""

    title: str
    gpus: int
    memory: float
    """Bytes of one device."""
    rates: Rates | None
    """None if only the memory is known."""


def precision_device(config: PlanConfig) -> str:
    """Return the device that ``config`` names, as :func:`~reinforcepp.models.precision.automatic_precision` takes it."""
    if config.device in ACCELERATORS:
        return ACCELERATORS[config.device].title
    present = torch.cuda.device_count()
    if not _gpus(config, present):
        return "cpu"
    return "cuda" if present else "the planned GPU"


def _gpus(config: PlanConfig, present: int) -> int:
    return 0 if config.device == "cpu" else present if config.gpus is None else config.gpus


def device_for(config: PlanConfig, dtype: torch.dtype) -> Device:
    """Return the device that ``config`` names.

    Raises:
        ConfigError: the plan is for GPUs, this node has none, and their memory isn't given.
    """
    given = None if config.gpu_memory is None else config.gpu_memory * GIB
    if config.device in ACCELERATORS:
        sheet = ACCELERATORS[config.device]
        tera = sheet.float32_tflops if dtype == torch.float32 else sheet.half_tflops
        rates = Rates(tera * 1e12, sheet.gigabytes_per_second * 1e9, measured=False)
        return Device(sheet.title, config.gpus or 1, given or sheet.gigabytes * 1e9, rates)
    present = torch.cuda.device_count()
    gpus = _gpus(config, present)
    if not gpus:
        return Device("CPU", 0, given or cpu_memory(), measured_rates("cpu", dtype))
    if present:
        total = torch.cuda.get_device_properties(0).total_memory
        return Device(torch.cuda.get_device_name(0), gpus, given or total, measured_rates("cuda", dtype))
    if given is None:
        raise ConfigError(
            f"gpus: the plan is for {gpus}, but this node has no GPU. Name the GPU (for example {setting('device')} "
            f"h100), or give its memory in GiB ({setting('gpu_memory')} 24)."
        )
    return Device("GPU", gpus, given, None)


def cpu_memory() -> float:
    """Return the bytes of CPU memory that this process can use."""
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = CGROUP_LIMIT.read_text(encoding="utf-8").strip() if CGROUP_LIMIT.is_file() else ""
    return min(physical, float(limit)) if limit.isdigit() else physical


def measured_rates(device: str, dtype: torch.dtype) -> Rates:
    """Return the best of a few measured rates: a large matrix product, and reading a block larger than any cache."""
    size, length = (8192, GIB) if device == "cuda" else (1024, GIB // 8)
    block = torch.ones(length, dtype=torch.uint8, device=device).view(torch.int64)
    flops = matmul_flops(device, dtype, size, ROUNDS_SECONDS, ROUNDS)
    reading = least_seconds(device, lambda: block.sum(), ROUNDS_SECONDS, ROUNDS)
    return Rates(flops, block.nbytes / reading, measured=True)
