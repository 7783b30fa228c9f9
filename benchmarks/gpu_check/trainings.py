"""Short trainings of which each uses one feature of a GPU."""

from __future__ import annotations

import gc
from typing import Any

import torch
from common import GIB, Node, Skipped, train

LEFT_GIB = 16
"""Memory that the tight training leaves itself: AdamW's moments of 0.5B parameters are 4 GiB of it."""


def tight_cache(node: Node) -> dict[str, Any]:
    """Three steps with vLLM in a memory that AdamW's moments, which step 1 creates, fill."""
    ballast = None
    if node.on_gpu:
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(max(0, free - LEFT_GIB * GIB), dtype=torch.uint8, device="cuda")
    trainer, steps = train(node, "tight_cache", "0.5B")
    try:
        measured = _facts(steps) | {"ballast_gib": round(ballast.nbytes / GIB, 1) if ballast is not None else 0}
        assert len(steps) >= 3, f"{len(steps)} of 3 steps"
        return measured
    finally:
        trainer.engine.close()


def offload(node: Node) -> dict[str, Any]:
    """AdamW's state in CPU memory: less GPU memory and the same loss."""
    if not node.on_gpu:
        raise Skipped("on a CPU, AdamW's state is in CPU memory anyway")
    measured: dict[str, Any] = {}
    for name, away in (("resident", False), ("offloaded", True)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        trainer, steps = train(node, name, "0.5B", rollout="transformers", max_steps=2, offload_optimizer=away)
        measured[name] = _facts(steps) | {"peak_gib": torch.cuda.max_memory_allocated() / GIB}
        trainer.engine.close()
        del trainer
        gc.collect()
    assert measured["offloaded"]["peak_gib"] < measured["resident"]["peak_gib"], measured
    return measured


def qlora(node: Node) -> dict[str, Any]:
    """Two steps of LoRA on 4-bit weights."""
    settings = {"use_peft": True, "load_in_4bit": True, "max_steps": 2, "rollout": "transformers"}
    trainer, steps = train(node, "qlora", "small", **settings)
    trainer.engine.close()
    assert all(step["grad_norm"] > 0 for step in steps), "no gradient"
    return _facts(steps)


def compiled(node: Node) -> dict[str, Any]:
    """torch_compile changes the gradient of the first step by rounding only."""
    settings = {"rollout": "transformers", "max_steps": 2, "mixed_precision": "no"}
    norms, facts = [], {}
    for name, compiles in (("plain", False), ("compiled", True)):
        trainer, steps = train(node, name, "small", torch_compile=compiles, **settings)
        trainer.engine.close()
        norms.append(steps[0]["grad_norm"])
        facts = _facts(steps)
    assert abs(norms[1] / norms[0] - 1) < 1e-3, f"gradient norms: {norms}"
    return facts | {"grad_norm_plain": norms[0], "grad_norm_compiled": norms[1]}


def _facts(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the times and the loss of the last step."""
    last = steps[-1]
    wanted = ("loss", "reward", "step_time")
    return {key: value for key, value in last.items() if key in wanted or key.startswith("time/")}
