"""Memory that the process frees: kept during a training on a CPU, otherwise returned to the system."""

import ctypes
import platform

import psutil
import pytest
import small_trainer
import tiny
import torch

from reinforcepp.runtime.memory import keep_freed_memory, release_free_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
PART = 50 << 20


def kept():
    """Return the bytes that stay resident after a tensor of 100 MiB is freed."""
    before = psutil.Process().memory_info().rss
    torch.ones(25 << 20)
    return psutil.Process().memory_info().rss - before


def test_free_memory_is_returned_to_the_system():
    process = psutil.Process()
    blocks = [bytearray(100_000) for _ in range(2000)]  # too small for glibc to return one by one
    last = bytearray(100_000)  # otherwise glibc returns the end of its heap
    del blocks
    before = process.memory_info().rss
    release_free_memory()
    assert before - process.memory_info().rss > 100 << 20
    del last


def test_freed_memory_is_kept_in_the_block_only():
    with keep_freed_memory("cpu"):
        assert kept() > PART
        inside = psutil.Process().memory_info().rss
    assert inside - psutil.Process().memory_info().rss > PART
    assert kept() < PART


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_environment_takes_precedence(name, monkeypatch):
    monkeypatch.setenv(name, "65536")
    with keep_freed_memory("cpu"):
        assert kept() < PART


def test_nothing_changes_on_a_gpu():
    with keep_freed_memory("cuda"):
        assert kept() < PART


def test_an_unknown_c_library_is_not_called(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    with keep_freed_memory("cpu"):
        pass


def test_a_training_keeps_freed_memory(tmp_path):
    found = []

    def reward(completions, **_):
        found.append(kept())
        return [float(len(text)) for text in completions]

    model, tokenizer = tiny.model(), tiny.tokenizer()
    arguments = {"processing_class": tokenizer}
    small_trainer.trainer(model, tmp_path, reward, arguments=arguments, max_steps=1, eval_prompts=0).train()
    assert found[0] > PART
    assert kept() < PART
