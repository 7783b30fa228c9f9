"""Memory that the process frees: kept for later tensors, or returned to the system. Loads no torch."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

MALLOPT = {"TRIM_THRESHOLD": (-1, -1, 64 << 20), "TOP_PAD": (-2, 64 << 20, 128 << 10), "MMAP_MAX": (-4, 0, 1 << 16)}
"""Parameters of glibc's malloc: number, value in :func:`keep_freed_memory`, and value after it, in bytes or blocks."""


@contextmanager
def keep_freed_memory(device: str) -> Iterator[None]:
    """In this block, let glibc keep freed memory for later tensors on a CPU; otherwise the system clears each page anew.

    Every training step frees and requests the same gigabytes. Nothing changes on other devices, with another C library, or if
    the environment sets glibc's malloc. A preloaded allocator (jemalloc, tcmalloc) doesn't read these parameters.
    """
    chosen = any(f"MALLOC_{name}_" in os.environ for name in (*MALLOPT, "MMAP_THRESHOLD"))
    if device != "cpu" or chosen or "GLIBC_TUNABLES" in os.environ or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    for number, value, _ in MALLOPT.values():
        library.mallopt(number, value)
    try:
        yield
    finally:
        for number, _, value in MALLOPT.values():
            library.mallopt(number, value)
        release_free_memory()


def release_free_memory() -> None:
    """Return this process's free memory to the system if the C library supports it; glibc keeps up to 100 MiB."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
