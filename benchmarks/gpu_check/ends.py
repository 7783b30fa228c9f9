"""Ends of vLLM engines in one process: closed, dropped, next to another one, and after a failure."""

from __future__ import annotations

import gc
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import torch
from common import (
    GIB,
    MIB,
    Node,
    check_completions,
    emulate_sleep,
    greedy,
    prompts,
    random_model,
    start_vllm,
    tokenizer,
    vllm_engine,
)

from reinforcepp import Sampling
from reinforcepp.rollout.vllm import lifecycle
from reinforcepp.rollout.vllm_integration import VllmEngine
from reinforcepp.rollout.weight_sync_check import check_sync


def close(node: Node) -> dict[str, Any]:
    """After each way to end an engine, its memory is free and the next engine works."""
    ways: dict[str, Callable[[list[VllmEngine]], None]] = {
        "asleep": lambda held: held.pop().close(),
        "awake": _close_awake,
        "without_memory": _close_without_memory,
        "dropped": lambda held: held.clear(),
    }
    if not node.on_gpu:
        del ways["without_memory"]  # nothing to allocate when it wakes up
    model = random_model(node, "small")
    problems, measured = {}, {}
    before = None
    for way, end in ways.items():
        try:
            held = [start_vllm(node, model)]
            emulate_sleep(node, held[0])
            loaded = _weak_model(held[0])
            check_sync(held[0], model, tokenizer())
            end(held)
            gc.collect()
            if before is None:  # The first engine also loads kernels and libraries, which stay.
                before = _free(node)
            left = {
                "pool_bytes": lifecycle._pool_bytes(),
                "engines": lifecycle._engines_alive,
                "models": _models(node, loaded),
                "lost_gib": int((before - _free(node)) / GIB),
            }
            measured[way] = left
            if any(left.values()):
                problems[way] = str(left)
        except Exception as error:
            traceback.print_exc()
            problems[way] = f"{type(error).__name__}: {error}"[:300]
    with vllm_engine(node, model) as engine:
        check_sync(engine, model, tokenizer())
    assert not problems, problems
    return measured


def _close_awake(held: list[VllmEngine]) -> None:
    held[0].wake_up()
    held.pop().close()


def _close_without_memory(held: list[VllmEngine]) -> None:
    """Close a sleeping engine that can't wake up, because another tensor has the memory."""
    assert held[0]._asleep
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(free - 256 * MIB, dtype=torch.uint8, device="cuda")
    held.pop().close()
    del ballast
    torch.cuda.empty_cache()


def _weak_model(engine: VllmEngine) -> Callable[[], Any]:
    """Return a weak reference to vLLM's model."""
    (found,) = engine._llm.apply_model(lambda loaded: weakref.ref(loaded))
    return found


def _models(node: Node, loaded: Callable[[], Any]) -> int:
    """Return whether the model still exists; 0 on a GPU, where compiled code can keep it without its memory."""
    return int(loaded() is not None and not node.on_gpu)


def _free(node: Node) -> int:
    if not node.on_gpu:
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def two_engines(node: Node) -> dict[str, Any]:
    """An engine that shares the GPU with a trainer, and one that doesn't: closing either leaves the other one working."""
    model, judge = random_model(node, "small"), random_model(node, "small", seed=1)
    alone = {"exclusive_gpu": True} | ({"gpu_memory_utilization": 0.2} if node.on_gpu else {})
    gaps = []

    def check(engine: VllmEngine, own: Any) -> None:
        gaps.append(check_sync(engine, own, tokenizer()).logprob_gap_max)

    trained = start_vllm(node, model)
    emulate_sleep(node, trained)
    check(trained, model)
    with vllm_engine(node, judge, **alone) as second:
        check(second, judge)
        check(trained, model)
    check(trained, model)
    with vllm_engine(node, judge, **alone) as second:
        check(trained, model)
        trained.close()
        check(second, judge)
    return {"logprob_gap_max": gaps, "pool_bytes": lifecycle._pool_bytes()}


def failure_in_a_forward(node: Node) -> dict[str, Any]:
    """After an exception in vLLM's forward pass, a new engine fits into the memory and repeats the batch."""
    model = random_model(node, "0.5B")
    # Two such engines don't fit, so the new one starts only if nothing holds the old one.
    settings = {"gpu_memory_utilization": 0.55} if node.on_gpu else {}
    with vllm_engine(node, model, **settings) as engine:
        emulate_sleep(node, engine)
        old = _weak_model(engine)

        def fail(*_: Any) -> None:
            raise RuntimeError("made by the check")

        # Inside compute_logits, so that frames with the model are in the traceback.
        engine._llm.apply_model(lambda loaded: loaded.logits_processor.register_forward_pre_hook(fail) and None)
        completions = engine.generate(prompts(4, 16), greedy(8))
        check_completions(completions, 4, 8)
        gap = check_sync(engine, model, tokenizer()).logprob_gap_max
        gc.collect()
        measured = {"restarts": engine.restarts, "old_models": _models(node, old), "logprob_gap_max": gap}
        engine.generate(prompts(4, 16), Sampling(8))
    assert measured["restarts"] == 1 and not measured["old_models"], measured
    return measured
