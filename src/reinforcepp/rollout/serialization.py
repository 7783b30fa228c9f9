"""Completions in a checkpoint's JSON. A prompt is stored as its key, because data, seed and step reproduce the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from reinforcepp.types import Completion, EpisodeTurn, Prompt


def as_rows(completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return one JSON row per completion."""
    rows: list[dict[str, Any]] = []
    for c in completions:
        row = {"prompt": c.prompt.key, "ids": c.ids, "logprobs": c.logprobs, "text": c.text, "finish": c.finish_reason}
        trainer_metrics = {"old_logprobs": c.old_logprobs, "entropy": c.entropy} if c.old_logprobs else {}
        rows.append({**row, **trainer_metrics, **_episode(c)})
    return rows


def from_rows(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt]) -> list[Completion]:
    """Return the completions that :func:`as_rows` serialized; ``prompts`` contains their prompts."""
    by_key = {prompt.key: prompt for prompt in prompts}
    return [
        Completion(
            _prompt(by_key[row["prompt"]], row.get("started")),
            tuple(row["ids"]),
            tuple(row["logprobs"]),
            row["text"],
            row["finish"],
            tuple(row.get("old_logprobs", ())),
            tuple(row.get("entropy", ())),
            tuple(EpisodeTurn(**{**turn, "messages": tuple(turn["messages"])}) for turn in row.get("turns", ())),
            row.get("error", ""),
        )
        for row in rows
    ]


def _episode(c: Completion) -> dict[str, Any]:
    """Return what a completion of an environment has in addition; its prompt is that of the environment."""
    if not c.turns and not c.error:
        return {}
    started = {"text": c.prompt.text, "ids": c.prompt.ids, "messages": c.prompt.messages}
    return {"started": started, "turns": [asdict(turn) for turn in c.turns], "error": c.error}


def _prompt(prompt: Prompt, started: Mapping[str, Any] | None) -> Prompt:
    if started is None:
        return prompt
    return replace(prompt, text=started["text"], ids=tuple(started["ids"]), messages=tuple(started["messages"]))
