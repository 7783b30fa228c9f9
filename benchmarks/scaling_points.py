"""The trainings of benchmarks/scaling.py: what constants are fitted on, and what they are checked on."""

from __future__ import annotations

from typing import Any

from planner import configuration, gpt2, llama


def point(policy: dict[str, Any], prompt: int, new: int, batch_size: int, **changes: Any) -> dict[str, Any]:
    """A training by transformers, in float32, from its shape, lengths and batch."""
    ends = {"ends": changes.pop("ends")} if "ends" in changes else {}
    micro = changes.pop("mini_batch_size", min(8, batch_size))
    job = configuration(policy, None, prompt, new, batch_size=batch_size, mini_batch_size=micro, **changes)
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
    "gpt2 8M, ends by chance": point(gpt2(4, 320, 5, 8000), 32, 96, 24, ends=1 / 24),
}
CHECKED = {
    "gpt2 0.9M, 24 rows": point(gpt2(4, 128, 4, 1000), 16, 128, 24),
    "llama 2M": point(llama(4, 160, 448, (5, 5), 4000), 16, 64, 32),
    "llama 21M": point(llama(6, 384, 1024, (6, 2), 16000), 48, 64, 16),
    "gpt2 10M, long": point(gpt2(4, 384, 6, 8000), 32, 192, 12),
    "llama 36M, wide": point(llama(3, 768, 2048, (12, 4), 12000), 24, 40, 16),
    "gpt2 82M": point(gpt2(6, 768, 12), 32, 32, 4),
    "llama 24M, vocabulary of 32k": point(llama(4, 320, 896, (5, 1), 32000), 32, 48, 24),
    "gpt2 10M, ends by chance": point(gpt2(4, 384, 6, 8000), 32, 128, 32, ends=1 / 32),
    "gpt2 29M, 4 a prompt": point(
        gpt2(6, 512, 8, 20000), 64, 48, 4, num_generations=4, estimator="reinforce_plus_plus_baseline"
    ),
}
