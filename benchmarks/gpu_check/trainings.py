"""Short trainings of which each uses one feature of a GPU."""

from __future__ import annotations

import gc
from typing import Any

import torch
from common import GIB, Node, Skipped, train

from reinforcepp.rollout.vllm import memory

LEFT_GIB = 16
"""Memory that the tight trainings leave themselves: AdamW's moments of 0.5B parameters are 4 GiB of it."""
LONGEST_PROMPT = 65_536
"""Tokens for which vLLM wants a cache, so that it takes all memory that it may. The prompts are short."""
KINDS: dict[str, dict[str, Any]] = {
    "all_weights": {},
    "offload": {"offload_optimizer": True},
    "lora": {"use_peft": True},
}


def tight_cache(node: Node) -> dict[str, Any]:
    """Three steps each with vLLM in a memory that AdamW's moments, which step 1 creates, fill."""
    ballast, settings = None, {}
    if node.on_gpu:
        free, _ = torch.cuda.mem_get_info()
        ballast = torch.empty(max(0, free - LEFT_GIB * GIB), dtype=torch.uint8, device="cuda")
        settings = {"max_prompt_length": LONGEST_PROMPT}
    else:
        memory.CPU_CACHE_CAP = 1  # a cache for one sequence
    measured: dict[str, Any] = {"ballast_gib": round(ballast.nbytes / GIB, 1) if ballast is not None else 0}
    for name, kind in KINDS.items():
        measured[name] = _tight_training(node, f"tight_{name}", settings | kind)
        gc.collect()
        torch.cuda.empty_cache()
    return measured


def _tight_training(node: Node, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    trainer, steps = train(node, name, "0.5B", **settings)
    engine: Any = trainer.engine
    try:
        cache = engine._llm.llm_engine.vllm_config.cache_config
        wanted = trainer.args.vllm_batch_size(1, on_gpu=node.on_gpu)
        facts = {
            "steps": len(steps),
            "restarts": engine.restarts,
            "wanted_sequences": wanted,
            "sequences": engine.max_num_seqs,
            "cache_sequences": cache.num_gpu_blocks * cache.block_size / engine.max_length,
        }
    finally:
        engine.close()
    assert facts["steps"] == 3 and not facts["restarts"], f"{name}: {facts}"
    assert facts["sequences"] == wanted, f"{name}: memory ran out, so fewer sequences at a time: {facts}"
    assert facts["cache_sequences"] < wanted, f"{name}: the cache isn't tight: {facts}"
    return facts | _facts(steps)


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
