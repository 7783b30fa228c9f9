"""Completions in a checkpoint's JSON. A prompt is stored as its key, because data, seed and step reproduce the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reinforcepp.types import Completion, Prompt


def as_rows(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return one JSON row per completion."""
    rows: list[dict[str, Any]] = []
    for c in completions:
        row = {"prompt": c.prompt.key, "ids": c.ids, "logprobs": c.logprobs, "text": c.text, "finish": c.finish_reason}
        trainer_metrics = {"old_logprobs": c.old_logprobs, "entropy": c.entropy} if c.old_logprobs else {}
        rows.append({**row, **trainer_metrics})
    return rows


def from_rows(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> list[Completion]:
    """Return the completions that :func:`as_rows` serialized; ``prompts`` contains their prompts."""
    by_key = {prompt.key: prompt for prompt in prompts}
    return [
        Completion(
            by_key[row["prompt"]],
            tuple(row["ids"]),
            tuple(row["logprobs"]),
            row["text"],
            row["finish"],
            tuple(row.get("old_logprobs", ())),
            tuple(row.get("entropy", ())),
        )
        for row in rows
    ]
