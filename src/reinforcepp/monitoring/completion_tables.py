"""Tables of completions as TRL shows them, on the terminal and in trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor

from reinforcepp.monitoring.turns import episode_text, turns
from reinforcepp.rewards.functions import RewardScores, messages_or_text
from reinforcepp.types import RolloutBatch

Columns = Mapping[str, Sequence[Any]]


def completion_table(
    batch: RolloutBatch, scores: RewardScores, advantages_BT: Tensor, step: int, *, unique_prompts: bool = False
) -> dict[str, list[Any]]:
    """Return TRL's columns, one row per completion: step, prompt, completion, the scores, logged columns, and advantage.

    The completion of an episode is its conversation as text. The advantage is the mean over the sampled tokens of a completion.
    With ``unique_prompts``, each prompt has one row.
    """
    pairs = [messages_or_text(completion) for completion in batch.completions]
    advantages_B = (advantages_BT * batch.mask_BT).sum(1) / batch.mask_BT.sum(1).clamp(min=1)
    columns = {
        "step": [step] * len(pairs),
        "prompt": [prompt for prompt, _ in pairs],
        "completion": [
            episode_text(c.turns) if c.turns else completion
            for c, (_, completion) in zip(batch.completions, pairs, strict=True)
        ],
        **scores.by_function,
        **scores.extra,
        "advantage": advantages_B.tolist(),
    }
    rows = {str(prompt): i for i, (prompt, _) in reversed(list(enumerate(pairs)))} if unique_prompts else {}
    kept = sorted(rows.values()) or range(len(pairs))
    return {name: [values[i] for i in kept] for name, values in columns.items()}


def completion_panel(columns: Columns, number: int) -> Panel:
    """Return up to ``number`` rows of :func:`completion_table` for the terminal, evenly spaced."""
    count = len(columns["step"])
    shown = [i * count // min(number, count) for i in range(min(number, count))]
    table = Table(show_lines=True, expand=True)
    names = [name for name in columns if name != "step"]
    for name in names:
        text = name in ("prompt", "completion")
        table.add_column(Text(name), ratio=3 if text else None, justify="left" if text else "right")
    for i in shown:
        table.add_row(*(_cell(columns[name][i]) for name in names))
    return Panel(table, title=f"Step {columns['step'][0]}", title_align="left", border_style="dim")


def _cell(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.2f}")
    if not isinstance(value, str | list):
        return Text("" if value is None else str(value))
    cell = Text()
    for turn in turns(value):
        cell.append(f"{turn.label}\n" if turn.label else "", "bold").append(f"{turn.text}\n")
    cell.rstrip()
    return cell
