"""Compare the estimates of `reinforcepp plan` with the peaks and times of real trainings.

python benchmarks/planner.py [--device cuda]

Each configuration is planned, then trained for three steps with a checkpoint after the second, by the train command in a
separate process, from random weights. On a CPU, memory is the high-water mark of the resident set from process start to the
saved model; on a GPU it is that of tensors. The planner's allocator overhead is fitted on separate configurations.
Written to benchmarks/results/planner.json, or
planner_cuda.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from results import write_result

from reinforcepp.config import PlanConfig
from reinforcepp.planner import memory
from reinforcepp.planner.command import make_plan
from reinforcepp.planner.report import Plan

MIB = 1 << 20
STEPS = 3
LARGE = 100_000
"""From so many words on a small model shares embeddings and output layer, as Qwen2's and Llama 3's small ones do."""
WORKER = Path(__file__).parent / "planner_worker.py"


def gpt2(layers: int, width: int, heads: int, vocabulary: int = 50257) -> dict[str, Any]:
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary}
    return {"family": "gpt2", **shape}


def llama(layers: int, width: int, inner: int, heads: tuple[int, int], vocabulary: int) -> dict[str, Any]:
    return {
        "family": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "tie_word_embeddings": vocabulary > LARGE,
    }


def configuration(
    policy: dict[str, Any], reward: dict[str, Any] | None = None, prompt: int = 32, new: int = 64, **settings: Any
) -> dict[str, Any]:
    lengths = {"max_prompt_length": prompt, "max_new_tokens": new, "max_length": prompt + new}
    usual = {"rollout": "transformers", "eval_prompts": 0, "max_steps": STEPS, "save_every": 2, "judge": "none"}
    usual["mixed_precision"] = "no"
    return {"policy": policy, "reward": reward or policy, "settings": usual | lengths | settings}


SMALL, MEDIUM = gpt2(4, 320, 5, 8000), gpt2(6, 768, 12)
LLAMA, LLAMA_REWARD = llama(12, 768, 2048, (12, 4), 32000), llama(4, 512, 1024, (8, 8), 32000)
WORDY = llama(4, 640, 1792, (10, 2), 151_936)
TINY = gpt2(2, 64, 2, 320)

BASELINES = {
    "transformers": configuration(TINY, batch_size=8),
    "vllm": configuration(TINY, batch_size=8, rollout="vllm"),
}
"""Models that take nothing, so that what is measured is what the libraries take."""

CALIBRATION = {
    "gpt2 29M": configuration(gpt2(6, 512, 8, 20000), batch_size=16, micro_batch_size=8),
    "llama 57M": configuration(llama(8, 576, 1536, (9, 3), 24000), batch_size=8, micro_batch_size=4, new=96),
    "llama 57M, bf16": configuration(
        llama(8, 576, 1536, (9, 3), 24000), batch_size=16, micro_batch_size=8, mixed_precision="bf16"
    ),
    "gpt2 10M, long": configuration(gpt2(4, 384, 6, 8000), batch_size=32, micro_batch_size=16, new=160),
}
"""What the allocator's share is fitted on."""

CHECKED = {
    "gpt2 82M": configuration(MEDIUM, batch_size=8),
    "gpt2 82M, bf16": configuration(MEDIUM, batch_size=16, micro_batch_size=16, mixed_precision="bf16"),
    "gpt2 82M, 4 passes": configuration(MEDIUM, batch_size=16, micro_batch_size=4, eval_prompts=16),
    "gpt2 82M, ppo": configuration(MEDIUM, batch_size=8, micro_batch_size=4, new=32, estimator="ppo"),
    "gpt2 8M, many rows": configuration(SMALL, batch_size=64, micro_batch_size=32, prompt=64, new=192),
    "gpt2 8M, many rows, bf16": configuration(
        SMALL, batch_size=32, micro_batch_size=32, prompt=64, new=192, mixed_precision="bf16"
    ),
    "gpt2 8M, long completions": configuration(SMALL, batch_size=48, micro_batch_size=2, new=448),
    "llama 125M": configuration(LLAMA, LLAMA_REWARD, batch_size=8, micro_batch_size=4, new=128),
    "llama 125M, 4 a prompt, bf16": configuration(
        LLAMA,
        LLAMA_REWARD,
        batch_size=4,
        num_generations=4,
        micro_batch_size=16,
        estimator="reinforce_plus_plus_baseline",
        mixed_precision="bf16",
    ),
    "llama 115M, vocabulary of 152k": configuration(WORDY, batch_size=8),
    "gpt2 82M, bf16, vLLM": configuration(
        MEDIUM, batch_size=16, micro_batch_size=16, mixed_precision="bf16", rollout="vllm"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", nargs="+", help="names of configurations; nothing is written then")
    arguments = parser.parse_args()
    print_row = arguments.only is not None
    wanted = BASELINES | CALIBRATION | CHECKED
    if arguments.only:
        wanted = {name: wanted[name] for name in arguments.only}
    rows = {}
    for name, job in wanted.items():
        rows[name] = compared(job, arguments.device)
        shown = rows[name] if print_row else {k: v for k, v in rows[name].items() if not isinstance(v, dict)}
        print(name, json.dumps(shown), flush=True)
    if not arguments.only:
        write_result("planner" if arguments.device == "cpu" else "planner_cuda", summary(rows, arguments.device))


def compared(job: dict[str, Any], device: str) -> dict[str, Any]:
    """Estimated and measured figures of one configuration; memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"model": f"{folder}/policy", "reward_model": f"{folder}/reward", "data": f"{folder}/prompts.csv"}
        settings = job["settings"] | inputs | {"output_dir": f"{folder}/run"}
        worker(job | {"folder": folder, "make": True})
        plan = make_plan(PlanConfig(**settings, gpus=int(device == "cuda")))
        copied = job.get("copied_reference", False)
        found = worker({"folder": folder, "make": False, "settings": settings, "copied_reference": copied})
    return {
        "settings": {name: value for name, value in settings.items() if name not in {*inputs, "output_dir"}},
        "policy": job["policy"],
        "reward": job["reward"],
        "parameters": plan.job.policy.parameters,
        **memory_figures(plan, found, device),
        **time_figures(plan, found),
    }


def worker(job: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process says."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "10000", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(WORKER), json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{job['folder']} failed:\n{done.stderr[-3000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return dict(json.loads(lines[0].removeprefix("RESULT "))) if lines else {}


def memory_figures(plan: Plan, found: dict[str, Any], device: str) -> dict[str, Any]:
    """Peaks in MiB. On a GPU the estimate is that of tensors: the context and the allocator's share are outside of them."""
    outside = ("libraries", "allocator") if device == "cuda" else ()
    phases = {
        name: {part: size / MIB for part, size in parts.items() if part not in outside}
        for name, parts in plan.phases.items()
    }
    peak = max(phases, key=lambda name: sum(phases[name].values()))
    estimated, measured = sum(phases[peak].values()), max(found["peaks"].values())
    return {
        "estimated": estimated,
        "measured": measured,
        "error": estimated / measured - 1,
        "peak_phase": peak,
        "measured_peak_phase": max(found["peaks"], key=found["peaks"].__getitem__),
        "parts": phases[peak],
        "estimated_by_phase": {name: sum(parts.values()) for name, parts in phases.items()},
        "measured_by_phase": found["peaks"],
        "mean_length": found["mean_length"],
    }


def time_figures(plan: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a step, the first left out."""
    assert plan.seconds is not None
    names = {"rollout": "time/rollout", "scoring": "time/score", "update": "time/update"}
    measured = {phase: median(row[key] for row in found["timings"][1:]) for phase, key in names.items()}
    step = median(row["step_time"] for row in found["timings"][1:])
    estimated = sum(plan.seconds.values())
    return {
        "estimated_seconds": estimated,
        "measured_seconds": step,
        "time_ratio": estimated / step,
        "estimated_seconds_by_phase": plan.seconds,
        "measured_seconds_by_phase": measured,
    }


def summary(rows: dict[str, dict[str, Any]], device: str) -> dict[str, Any]:
    """Errors, of everything and of what is above the libraries, and the fit of the allocator's share."""
    baselines = {engine: rows[engine]["measured"] for engine in BASELINES}
    fitted = {name: allocator_share(rows[name], baselines["transformers"]) for name in CALIBRATION}
    checked = {}
    for name in CHECKED:
        row = rows[name]
        own = baselines[row["settings"]["rollout"]]
        above = (row["estimated"] - row["parts"].get("libraries", 0.0)) / (row["measured"] - own) - 1
        checked[name] = row | {"error_above_libraries": above}
    errors = [abs(row["error"]) for row in checked.values()]
    return {
        "unit": "MiB",
        "meaning": "error is estimated / measured - 1; time_ratio is estimated / measured seconds of a step",
        "libraries": {"measured": baselines, "in_planner": memory.LIBRARIES["cpu"] / MIB},
        "allocator": {
            "fitted": fitted,
            "median": median(fitted.values()),
            "in_planner": memory.ALLOCATOR["cpu" if device == "cpu" else "gpu"],
        },
        "largest_error": max(errors),
        "largest_error_above_libraries": max(abs(row["error_above_libraries"]) for row in checked.values()),
        "median_time_ratio": median(row["time_ratio"] for row in checked.values()),
        "time_ratio_range": [choose(row["time_ratio"] for row in checked.values()) for choose in (min, max)],
        "configurations": checked,
        "calibration": {name: rows[name] for name in CALIBRATION},
    }


def allocator_share(row: dict[str, Any], libraries: float) -> float:
    """What is measured beyond all that is counted, over what the peak's phase makes and frees."""
    parts = row["parts"]
    share = parts.get("allocator", 0.0)
    counted = sum(parts.values()) - share - parts.get("libraries", 0.0)
    passing = share / memory.ALLOCATOR["cpu"]
    return (row["measured"] - libraries - counted) / passing if passing else 0.0


if __name__ == "__main__":
    main()
