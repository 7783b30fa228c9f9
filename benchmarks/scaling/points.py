"""The trainings of benchmarks/scaling.py: what constants are fitted on, what they are checked on, and large ones."""

from __future__ import annotations

from typing import Any

from planner import configuration, gpt2, llama
from transformers import LlamaConfig


def point(policy: dict[str, Any], prompt: int, new: int, batch_size: int, **changes: Any) -> dict[str, Any]:
    """A training by transformers, in float32, from its shape, lengths and batch."""
    ends = {"ends": changes.pop("ends")} if "ends" in changes else {}
    micro = changes.pop("micro_batch_size", min(8, batch_size))
    job = configuration(policy, None, prompt, new, batch_size=batch_size, micro_batch_size=micro, **changes)
    without = ("max_steps", "save_every")
    return job | ends | {"settings": {name: v for name, v in job["settings"].items() if name not in without}}


FITTED = {
    "gpt2 0.2M": point(gpt2(2, 64, 2, 1000), 16, 96, 8),
    "gpt2 0.2M, 64 rows": point(gpt2(2, 64, 2, 1000), 16, 48, 64),
    "gpt2 8M": point(gpt2(4, 320, 5, 8000), 32, 64, 8),
    "gpt2 8M, 48 rows": point(gpt2(4, 320, 5, 8000), 32, 64, 48),
    "llama 9M": point(llama(6, 256, 704, (8, 4), 8000), 32, 96, 16),
    "gpt2 29M": point(gpt2(6, 512, 8, 20000), 32, 48, 8),
    "llama 57M": point(llama(8, 576, 1536, (9, 3), 24000), 32, 32, 8),
    "gpt2 29M, 1 row": point(gpt2(6, 512, 8, 20000), 32, 48, 1),
    "llama 57M, 2 rows": point(llama(8, 576, 1536, (9, 3), 24000), 32, 32, 2),
    "gpt2 8M, ends by chance": point(gpt2(4, 320, 5, 8000), 32, 96, 24, ends=1 / 24),
}
CHECKED = {
    "gpt2 0.5M, 40 rows": point(gpt2(3, 96, 3, 1000), 16, 64, 40),
    "llama 3M": point(llama(5, 192, 512, (6, 3), 4000), 24, 80, 12),
    "llama 20M": point(llama(7, 320, 896, (5, 5), 16000), 40, 56, 20),
    "gpt2 13M, long": point(gpt2(5, 384, 6, 10000), 32, 224, 10),
    "llama 36M, wide": point(llama(3, 704, 1920, (11, 11), 12000), 24, 36, 20),
    "gpt2 51M": point(gpt2(6, 640, 10, 32000), 32, 40, 6),
    "llama 23M, vocabulary of 40k": point(llama(3, 256, 704, (4, 2), 40000), 32, 48, 16),
    "gpt2 39M, 2 rows": point(gpt2(6, 576, 9, 24000), 32, 40, 2),
    "gpt2 11M, ends by chance": point(gpt2(5, 352, 11, 8000), 32, 112, 28, ends=1 / 28),
    "gpt2 24M, 4 a prompt": point(
        gpt2(5, 512, 8, 16000), 64, 40, 5, num_generations=4, estimator="reinforce_plus_plus_baseline"
    ),
}
"""Shapes, batches and lengths that nothing was fitted on."""

LARGE = {
    "7B": llama(32, 4096, 14336, (32, 8), 32000),
    "70B": llama(80, 8192, 28672, (64, 8), 128256) | {"tie_word_embeddings": False},
}
"""Mistral's 7B and Llama 3's 70B."""
USUAL: dict[str, Any] = {
    "device": "h100",
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
    "max_prompt_length": 512,
    "max_new_tokens": 1024,
    "max_length": 1536,
    "mean_new_tokens": 400.0,
    "batch_size": 1024,
    "micro_batch_size": 4,
    "rollout_batch_size": 32,
    "eval_prompts": 0,
    "rewards": ("http://127.0.0.1:5000/get_reward",),
}
"""How those are trained: completions end by chance, and a server gives the rewards."""


def save_shape(name: str, folder: str) -> None:
    """The configuration of a large model, which is all that a plan needs."""
    settings = {key: value for key, value in LARGE[name].items() if key != "family"}
    LlamaConfig(**settings, max_position_embeddings=4096).save_pretrained(folder)
