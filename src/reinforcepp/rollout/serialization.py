"""Completions in a checkpoint's JSON. Prompts are left out but for their keys: data, seed and step give them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reinforcepp.types import Completion, Prompt


def as_rows(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """One row for each completion."""
    rows: list[dict[str, Any]] = []
    for c in completions:
        row = {"prompt": c.prompt.key, "ids": c.ids, "logprobs": c.logprobs, "text": c.text, "finish": c.finish_reason}
        own = {"old_logprobs": c.old_logprobs, "entropy": c.entropy} if c.old_logprobs else {}
        rows.append({**row, **own})
    return rows


def from_rows(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> list[Completion]:
    """What :func:`as_rows` was given; ``prompts`` are those that were asked."""
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
