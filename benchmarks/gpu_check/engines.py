"""vLLM in this process: start, weights, log-probabilities, end, and failures."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from common import (
    GIB,
    Node,
    Skipped,
    greedy,
    logprob_gaps,
    prompts,
    random_model,
    run_python,
    start_vllm,
    tokenizer,
    vllm_engine,
)

from reinforcepp import Sampling
from reinforcepp.rollout.weight_sync_check import check_sync

MAIN = str(Path(__file__).with_name("__main__.py"))


def start_once(node: Node) -> dict[str, Any]:
    """Start an engine, in a separate process."""
    model = random_model(node, "small")
    begin = time.perf_counter()
    with vllm_engine(node, model) as engine:
        started = time.perf_counter() - begin
        engine.generate(prompts(4, 16), Sampling(8))
        return {"start_seconds": started, "first_batch_seconds": time.perf_counter() - begin - started}


def compile_cache(node: Node) -> dict[str, Any]:
    """The second process finds the kernels that the first one compiled."""
    starts = []
    cache = node.folder / "cold_cache"
    places = {"XDG_CACHE_HOME": cache, "VLLM_CACHE_ROOT": cache / "vllm", "TRITON_CACHE_DIR": cache / "triton"}
    for number in (1, 2):
        output = node.folder / f"start_{number}.json"
        words = [MAIN, str(node.folder), "--device", node.device, "--item", "start_once", "--output", str(output)]
        done = run_python(*words, timeout=150, **{name: str(place) for name, place in places.items()})
        result = json.loads(output.read_text()) if output.is_file() else {"reason": done.stderr[-2000:]}
        assert result.get("status") == "pass", result.get("reason")
        starts.append(result["measured"]["start_seconds"])
    entries = [path.name for path in cache.glob("vllm/torch_compile_cache/*") if path.is_dir()]
    measured = {"first_seconds": starts[0], "second_seconds": starts[1], "entries": entries}
    if node.on_gpu:
        assert len(entries) <= 1, f"each start has a new entry in the compile cache: {measured}"
        assert starts[1] < 0.8 * starts[0], f"the second start isn't faster: {measured}"
    return measured


def threads(node: Node) -> dict[str, Any]:
    """The trainer keeps its CPU threads."""
    before = torch.get_num_threads()
    with vllm_engine(node, random_model(node, "small")) as engine:
        after_start = torch.get_num_threads()
        engine.generate(prompts(2, 16), Sampling(4))
        after_batch = torch.get_num_threads()
    measured = {"before": before, "after_start": after_start, "after_batch": after_batch}
    assert before == after_start == after_batch, measured
    return measured


def weights(node: Node) -> dict[str, Any]:
    """The engine generates with the trainer's weights, also after two updates."""
    gaps = []
    with vllm_engine(node, random_model(node, "small")) as engine:
        for seed in (0, 1, 2):
            model = random_model(node, "small", seed=seed)
            if seed:
                engine.load_weights(model)
            gaps.append(check_sync(engine, model, tokenizer()).logprob_gap_max)
    return {"logprob_gap_max": gaps}


def logprobs(node: Node) -> dict[str, Any]:
    """Log-probabilities equal the trainer's at each temperature."""
    if not node.on_gpu and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise Skipped("vLLM's V2 model runner needs Triton")
    model = random_model(node, "small")
    measured: dict[str, Any] = {}
    with vllm_engine(node, model) as engine:
        config = engine._llm.llm_engine.vllm_config
        measured["v2_model_runner"] = bool(getattr(config, "use_v2_model_runner", False))
        for temperature in (0.0, 0.7, 1.0):
            completions = engine.generate(prompts(16, 24), Sampling(32, temperature=temperature))
            gap = logprob_gaps(model, completions, temperature)
            measured[f"mean_gap_at_{temperature}"], measured[f"max_gap_at_{temperature}"] = (
                gap.mean().item(),
                gap.max().item(),
            )
    limit = 0.05 if node.on_gpu else 1e-3
    means = [value for name, value in measured.items() if name.startswith("mean")]
    assert max(means) < limit, f"mean differences above {limit}: {measured}"
    return measured


def batch_dependence(node: Node) -> dict[str, Any]:
    """Tokens of a prompt alone and in a batch: equal up to rounding, because seeds don't depend on the batch."""
    given = prompts(32, 24)
    with vllm_engine(node, random_model(node, "small")) as engine:
        sampling = Sampling(32, temperature=1.0, seed=3)
        together = engine.generate(given, sampling)
        alone = [engine.generate([prompt], sampling)[0] for prompt in given[:8]]
    shared = [
        sum(a == b for a, b in zip(one.ids, many.ids, strict=False)) / len(one.ids)
        for one, many in zip(alone, together, strict=False)
    ]
    first = [abs(one.logprobs[0] - many.logprobs[0]) for one, many in zip(alone, together, strict=False)]
    measured = {"equal_tokens": sum(shared) / len(shared), "first_token_gap_max": max(first)}
    assert max(first) < (0.2 if node.on_gpu else 1e-3), measured
    return measured


def close_asleep(node: Node) -> dict[str, Any]:
    """An engine that sleeps is closed, and the next one starts."""
    return _close_and_start(node, wake=False)


def close_awake(node: Node) -> dict[str, Any]:
    """An engine is woken and closed, and the next one starts."""
    return _close_and_start(node, wake=True)


def _close_and_start(node: Node, *, wake: bool) -> dict[str, Any]:
    free = []
    model = random_model(node, "small")
    for _ in range(2):
        free.append(_free(node))
        engine = start_vllm(node, model)
        try:
            engine.generate(prompts(4, 16), Sampling(8))
            check_sync(engine, model, tokenizer())
            if wake:
                engine.wake_up()
        finally:
            engine.close()
    free.append(_free(node))
    measured = {"free_gib": [round(amount / GIB, 2) for amount in free]}
    assert not node.on_gpu or free[1] - free[2] < GIB, f"each engine keeps memory: {measured}"
    return measured


def _free(node: Node) -> int:
    if not node.on_gpu:
        return 0
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def failure_in_a_forward(node: Node) -> dict[str, Any]:
    """After an exception in vLLM's forward pass, a new engine fits into the memory and repeats the batch."""
    model = random_model(node, "0.5B" if node.on_gpu else "small")
    settings = {"gpu_memory_utilization": 0.55} if node.on_gpu else {}
    with vllm_engine(node, model, **settings) as engine:

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("made by the check")

        engine._llm.apply_model(lambda loaded: setattr(loaded, "compute_logits", fail))
        completions = engine.generate(prompts(4, 16), greedy(8))
        check_sync(engine, model, tokenizer())
        measured = {"restarts": engine.restarts, "completions": len(completions)}
    assert measured == {"restarts": 1, "completions": 4}, measured
    return measured


def adapter_asleep(node: Node) -> dict[str, Any]:
    """A LoRA adapter is updated while the engine sleeps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(
        random_model(node, "small"), LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    )
    gaps = []
    with vllm_engine(node, model) as engine:
        for _ in range(3):
            gaps.append(check_sync(engine, model, tokenizer()).logprob_gap_max)
            engine.sleep()
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    if "lora_B" in name:
                        weight.add_(torch.randn_like(weight) * 0.02)
            engine.load_weights(model)
        gaps.append(check_sync(engine, model, tokenizer()).logprob_gap_max)
        by_adapter = engine._adapter is not None
    return {"logprob_gap_max": gaps, "adapter_sent": by_adapter}
