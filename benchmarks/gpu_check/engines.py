"""vLLM in this process: start, state of the trainer's process, weights, log-probabilities."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    MIB,
    Node,
    Skipped,
    emulate_sleep,
    logprob_gaps,
    perturb,
    prompts,
    random_model,
    resident_bytes,
    run_python,
    start_vllm,
    tokenizer,
    vllm_engine,
)

from reinforcepp import Sampling
from reinforcepp.rollout.weight_sync_check import check_sync

MAIN = str(Path(__file__).with_name("__main__.py"))
SLEEPS = 6


def start_once(node: Node) -> dict[str, Any]:
    """Start an engine, in a separate process."""
    model = random_model(node, "small")
    begin = time.perf_counter()
    with vllm_engine(node, model) as engine:
        started = time.perf_counter() - begin
        engine.generate(prompts(4, 16), Sampling(8))
        config = engine._llm.llm_engine.vllm_config
        return {
            "start_seconds": started,
            "first_batch_seconds": time.perf_counter() - begin - started,
            "folder": config.model_config.model,
            "config_hash": config.compute_hash(),
        }


def compile_cache(node: Node) -> dict[str, Any]:
    """The second process finds the kernels that the first one compiled."""
    cache = Path(os.environ["VLLM_CACHE_ROOT"]) / "torch_compile_cache"
    entries, starts = [_entries(cache)], []
    for number in (1, 2):
        output = node.folder / f"start_{number}.json"
        words = [MAIN, str(node.folder), "--device", node.device, "--item", "start_once", "--output", str(output)]
        done = run_python(*words, timeout=150)
        result = json.loads(output.read_text()) if output.is_file() else {"reason": done.stderr[-2000:]}
        assert result.get("status") == "pass", result.get("reason")
        starts.append(result["measured"])
        entries.append(_entries(cache))
    first, second = starts
    measured = {
        "first_seconds": first["start_seconds"],
        "second_seconds": second["start_seconds"],
        "first_entries": len(entries[1] - entries[0]),
        "second_entries": sorted(entries[2] - entries[1]),
    }
    for name in ("folder", "config_hash"):
        assert first[name] == second[name], f"{name} differs, so nothing is found: {first[name]}, {second[name]}"
    assert not measured["second_entries"], f"the second process compiled again: {measured}"
    assert entries[2] or not node.on_gpu, f"nothing was compiled: {measured}"
    return measured


def _entries(cache: Path) -> set[str]:
    """Return vLLM's keys of compiled code; one kind is a level deeper."""
    folders = (path for pattern in ("*", "*/*") for path in cache.glob(pattern) if path.is_dir())
    return {path.relative_to(cache).as_posix() for path in folders}


def process_state(node: Node) -> dict[str, Any]:
    """The trainer keeps its CPU threads, random numbers and current GPU, whatever the engine does."""
    assert "OMP_NUM_THREADS" not in os.environ, "vLLM leaves the number of threads alone if it is set"
    torch.set_num_threads(torch.get_num_threads() + 1)  # a number that vLLM doesn't set by itself
    model = random_model(node, "small")
    before, changed = _state(node), {}

    def after(phase: str, call: Callable[[], Any]) -> Any:
        result = call()
        now = _state(node)
        if differences := [name for name, value in before.items() if now[name] != value]:
            changed[phase] = differences
        return result

    engine = after("start", lambda: start_vllm(node, model))
    for phase, call in (
        ("generate", lambda: engine.generate(prompts(2, 16), Sampling(4))),
        ("load_weights", lambda: engine.load_weights(model)),
        ("generate again", lambda: engine.generate(prompts(2, 16), Sampling(4))),
        ("close", engine.close),
    ):
        after(phase, call)
    torch.set_num_threads(1)
    assert torch.get_num_threads() == 1, "vLLM's replacement of torch.set_num_threads is still there"
    assert not changed, f"changed in these phases: {changed}"
    return {"threads": before["threads"], "compared": list(before)}


def _state(node: Node) -> dict[str, Any]:
    state: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "python": random.getstate(),
    }
    if node.on_gpu:
        state |= {"cuda": torch.cuda.get_rng_state().tolist(), "current_gpu": torch.cuda.current_device()}
    return state


def weights(node: Node) -> dict[str, Any]:
    """The engine drops its weights in its sleep, has the trainer's when it wakes, and takes no CPU memory for them."""
    model = random_model(node, "0.5B")
    size = sum(weight.nbytes for weight in model.parameters())
    gaps, resident = [], []
    with vllm_engine(node, model) as engine:
        emulate_sleep(node, engine)
        assert engine._drops_weights, "vLLM keeps a copy of the weights while it sleeps"

        def check() -> None:
            gaps.append(check_sync(engine, model, tokenizer()).logprob_gap_max)

        check()
        check()
        for _ in range(2):
            perturb(model)
            engine.load_weights(model)
            check()
        other = random_model(node, "0.5B", seed=1)
        engine.load_weights(other)
        gaps.append(check_sync(engine, other, tokenizer()).logprob_gap_max)
        for _ in range(SLEEPS):
            engine.wake_up()
            engine.sleep()
            resident.append(resident_bytes())
        gaps.append(check_sync(engine, other, tokenizer()).logprob_gap_max)
    growth = resident[-1] - resident[1]
    measured = {"logprob_gap_max": gaps, "weights_mib": size / MIB, "growth_mib": growth / MIB}
    assert growth < max(size / 2, 64 * MIB), f"CPU memory grows with each sleep: {measured}"
    return measured


def adapter_asleep(node: Node) -> dict[str, Any]:
    """A LoRA adapter is updated while the engine sleeps, which keeps the base weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapter = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(random_model(node, "small"), adapter)
    gaps = []
    with vllm_engine(node, model) as engine:
        emulate_sleep(node, engine)
        assert engine._adapter is not None, "vLLM gets merged weights instead of the adapter"
        assert not engine._drops_weights, "the base weights are lost in the sleep"
        for _ in range(3):
            gaps.append(check_sync(engine, model, tokenizer()).logprob_gap_max)
            assert engine._asleep
            perturb(model, "lora_B")
            engine.load_weights(model)
        gaps.append(check_sync(engine, model, tokenizer()).logprob_gap_max)
    return {"logprob_gap_max": gaps}


def logprobs(node: Node) -> dict[str, Any]:
    """Log-probabilities equal the trainer's at each temperature, and those of a prompt don't depend on its batch."""
    if not node.on_gpu and os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        raise Skipped("vLLM's V2 model runner needs Triton")
    model = random_model(node, "small")
    measured: dict[str, Any] = {}
    given, sampling = prompts(32, 24), Sampling(32, temperature=1.0, seed=3)
    with vllm_engine(node, model) as engine:
        config = engine._llm.llm_engine.vllm_config
        measured["v2_model_runner"] = bool(getattr(config, "use_v2_model_runner", False))
        for temperature in (0.0, 0.7, 1.0):
            completions = engine.generate(prompts(16, 24), Sampling(32, temperature=temperature))
            gap = logprob_gaps(model, completions, temperature)
            measured[f"mean_gap_at_{temperature}"] = gap.mean().item()
            measured[f"max_gap_at_{temperature}"] = gap.max().item()
        together = engine.generate(given, sampling)
        alone = [engine.generate([prompt], sampling)[0] for prompt in given[:8]]
    limit = 0.05 if node.on_gpu else 1e-3
    means = [value for name, value in measured.items() if name.startswith("mean")]
    assert max(means) < limit, f"mean differences above {limit}: {measured}"
    pairs = list(zip(alone, together, strict=False))
    equal = [sum(a == b for a, b in zip(one.ids, many.ids, strict=False)) / len(one.ids) for one, many in pairs]
    measured["equal_tokens"] = sum(equal) / len(equal)
    # Only where both sampled the same token: rounding can move a random number across the border of two tokens.
    first = [abs(one.logprobs[0] - many.logprobs[0]) for one, many in pairs if one.ids[0] == many.ids[0]]
    measured["first_token_gap_max"] = max(first)
    assert len(first) >= 6 and max(first) < (0.2 if node.on_gpu else 1e-3), measured
    return measured
