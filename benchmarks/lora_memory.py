"""What LoRA saves: peak memory of a training of all weights, of adapters, with a copied reference, and of QLoRA.

    python benchmarks/lora_memory.py [--device cuda]

Each training runs three steps, with a checkpoint, in a separate process, as in planner.py; the planner's estimate is
beside. "Above libraries" leaves out what Python and its libraries take before there is any model.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from planner import BASELINES, LLAMA_REWARD, compared, configuration, llama
from results import write_result

SIZE = llama(12, 768, 2048, (12, 4), 32000)
USUAL: dict[str, Any] = {"batch_size": 8, "micro_batch_size": 4, "new": 64}
LORA: dict[str, Any] = {"use_peft": True, "lora_r": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": LORA,
    "LoRA, activations computed again": LORA | {"gradient_checkpointing": True},
    "all weights, bf16": {"mixed_precision": "bf16"},
    "LoRA, bf16": LORA | {"mixed_precision": "bf16"},
    "QLoRA, bf16": LORA | {"mixed_precision": "bf16", "load_in_4bit": True},
}
COPIED = "LoRA with a copied reference"
"""What the same training takes where the reference is a second model, as it has to be without an adapter."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = parser.parse_args().device
    libraries = compared(BASELINES["transformers"], device)["measured"]
    jobs = {name: configuration(SIZE, LLAMA_REWARD, **USUAL, **settings) for name, settings in VARIANTS.items()}
    jobs[COPIED] = jobs["LoRA"] | {"copied_reference": True}
    rows = {}
    for name, job in jobs.items():
        found = compared(job, device)
        rows[name] = {
            "settings": job["settings"],
            "parameters": found["parameters"],
            "measured": found["measured"],
            "measured_above_libraries": found["measured"] - libraries,
            "estimated": found["estimated"],
            "measured_seconds": found["measured_seconds"],
        }
        print(name, json.dumps(rows[name]), flush=True)
    weights = 4 * rows["all weights"]["parameters"] / (1 << 20)
    result = {
        "unit": "MiB",
        "model": SIZE,
        "libraries": libraries,
        "float32_weights": weights,
        "saved_by_sharing_the_reference": rows[COPIED]["measured"] - rows["LoRA"]["measured"],
        "configurations": rows,
    }
    write_result("lora_memory" if device == "cpu" else "lora_memory_cuda", result)


if __name__ == "__main__":
    main()
