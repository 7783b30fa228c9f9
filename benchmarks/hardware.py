"""Plan trainings of common model sizes on common GPUs: memory and time of a step, from data sheets.

python benchmarks/hardware.py

Nothing is measured: each row is the result of `reinforcepp plan` for models of Qwen2.5's shapes without a reward model, with 64
completions of 512 tokens per step for prompts of 256. Written to benchmarks/results/hardware.json.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from results import write_result
from transformers import Qwen2Config

from reinforcepp import ReinforceConfig, plan

SHAPES = {
    "0.5B": (896, 24, 14, 2, 4864, 151_936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151_936, True),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, True),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
}
"""Hidden size, layers, heads, key-value heads, inner size, vocabulary, and whether embeddings and output layer are shared."""
COMMON = {
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "batch_size": 64,
    "micro_batch_size": 4,
    "max_prompt_length": 256,
    "max_new_tokens": 512,
    "max_length": 768,
}
LORA = {"use_peft": True, "lora_r": 32, "rollout": "transformers", "rollout_batch_size": 32}
WAYS: dict[str, dict[str, Any]] = {
    "all weights": {"rollout": "vllm"},
    "all weights, AdamW in CPU memory": {"rollout": "vllm", "offload_optimizer": True},
    "LoRA": LORA,
    "LoRA with vLLM": LORA | {"rollout": "vllm"},
    "LoRA on 4 bits": LORA | {"load_in_4bit": True},
}
CASES = [
    ("0.5B", "all weights", "l4", 1),
    ("1.5B", "all weights", "rtx4090", 1),
    ("1.5B", "all weights, AdamW in CPU memory", "rtx4090", 1),
    ("1.5B", "all weights", "l40s", 1),
    ("3B", "LoRA", "rtx4090", 1),
    ("3B", "all weights", "h100", 1),
    ("7B", "LoRA", "rtx4090", 1),
    ("7B", "LoRA on 4 bits", "rtx4090", 1),
    ("7B", "LoRA with vLLM", "h100", 1),
    ("7B", "all weights, AdamW in CPU memory", "h100", 1),
    ("7B", "all weights", "h200", 1),
    ("7B", "all weights", "h100", 4),
]
"""Model, way of training, device, and GPUs; several GPUs share weights and optimizer (FSDP2)."""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_result("hardware", {"rows": [planned(Path(folder), *case) for case in CASES]})


def planned(folder: Path, size: str, way: str, device: Any, gpus: int) -> dict[str, Any]:
    """Return one row."""
    model = folder / size
    width, layers, heads, kv_heads, inner, vocabulary, tied = SHAPES[size]
    shape = Qwen2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        architectures=["Qwen2ForCausalLM"],
    )
    shape.save_pretrained(model)
    args = ReinforceConfig(**COMMON | WAYS[way])
    estimate = plan(model, None, args, device=device, gpus=gpus, fsdp=gpus > 1)
    print(f"{size} {way} on {gpus} x {device}: {estimate.peak_memory / 2**30:.1f} GiB", flush=True)
    return {
        "model": size,
        "way": way,
        "device": estimate.device.title,
        "gpus": gpus,
        "peak_gib": estimate.peak_memory / 2**30,
        "memory_gib": estimate.device.memory / 2**30,
        "fits": estimate.fits,
        "seconds_per_step": estimate.seconds_per_step,
    }


if __name__ == "__main__":
    main()
