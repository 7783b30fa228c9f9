"""vLLM's memory against what this package reserves for it."""

from __future__ import annotations

from typing import Any

import torch
from common import GIB, Node, check_completions, prompts, random_model, vllm_engine

from reinforcepp import Sampling
from reinforcepp.rollout.vllm.memory import activation_size

PROMPT, NEW = 128, 128


def budget(node: Node) -> dict[str, Any]:
    """Activations stay within the estimate, and the cache holds all completions, so that none is preempted."""
    model = random_model(node, "0.5B")
    length, new = (PROMPT, NEW) if node.on_gpu else (8, 8)
    measured: dict[str, Any] = {}
    problems = []
    for count in (128, 512) if node.on_gpu else (4, 16):
        usual = {"gpu_memory_utilization": None} if node.on_gpu else {"cache_bytes": None}
        with vllm_engine(node, model, max_length=length + new, max_num_seqs=count, **usual) as engine:
            preempted = _count_preemptions(engine)
            engine.wake_up()
            _reset_peak(node)
            completions = engine.generate(prompts(count, length), Sampling(new))
            check_completions(completions, count, new)
            cache = engine._llm.llm_engine.vllm_config.cache_config
            found = {
                "estimate_gib": activation_size(engine.config, engine.dtype).peak(count) / GIB,
                "profile_gib": _profiled(engine) / GIB,
                "generate_gib": _peak(node) / GIB,
                "cache_sequences": cache.num_gpu_blocks * cache.block_size / (length + new),
                "preemptions": len(preempted),
            }
        measured[f"{count} sequences"] = found
        if max(found["profile_gib"], found["generate_gib"]) > found["estimate_gib"]:
            problems.append(f"{count} sequences: activations above the estimate")
        if found["preemptions"] or found["cache_sequences"] < count:
            problems.append(f"{count} sequences: the cache is too small")
    assert not problems, (problems, measured)
    return measured


def _count_preemptions(engine: Any) -> list[int]:
    """Return a list that gets an entry whenever vLLM takes a sequence's cache away."""
    scheduler = engine._llm.llm_engine.engine_core.engine_core.scheduler
    preempt, counted = scheduler._preempt_request, []

    def counting(*arguments: Any, **options: Any) -> Any:
        counted.append(1)
        return preempt(*arguments, **options)

    scheduler._preempt_request = counting
    return counted


def _profiled(engine: Any) -> int:
    """Return the bytes that vLLM measured at its start next to weights and cache; 0 on a CPU, where it doesn't."""

    def sizes(worker: Any) -> int:
        worker = getattr(worker, "worker", worker)
        return int(getattr(worker, "peak_activation_memory", 0))

    return int(engine._llm.collective_rpc(sizes)[0])


def _reset_peak(node: Node) -> None:
    if node.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(node: Node) -> int:
    """Return the bytes that were allocated at a time, in addition to those at the last call of ``_reset_peak``."""
    if not node.on_gpu:
        return 0
    return int(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
