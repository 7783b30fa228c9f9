"""Episodes as the run report shows them: conversations turn by turn, and the episodes that failed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from math import fsum
from pathlib import Path
from typing import Any

from reinforcepp.data import count
from reinforcepp.monitoring.completion_log import turns_of
from reinforcepp.monitoring.turns import Turn, one_line, turns
from reinforcepp.run_dir import FAILED_EPISODES
from reinforcepp.types import EpisodeTurn

OPEN_TURNS = 3  # at each end of a long conversation; those between are collapsed
MIDDLE_TURNS = 40  # of the collapsed ones, the most that the page has
MAX_MESSAGES = 8  # of one turn
CHARACTERS = 12_000  # of one conversation, shared by its messages
MESSAGE_CHARACTERS = (100, 3000)
FAILED_SHOWN, REASONS_SHOWN = 3, 10
MOST_EXAMPLES = 100  # reasons with episodes that are kept while reading
REASON_CHARACTERS = 400
LONGEST_LINE = 2_000_000  # characters; a longer line of the file counts as damaged

UNSEEN = "never seen by the policy"


def transcript(episode: Sequence[EpisodeTurn], sampled: str = "sampled", given: str = "given") -> dict[str, Any]:
    """Return the conversation of an episode for the page.

    Args:
        episode: its turns.
        sampled: the mark of turns whose tokens the policy sampled.
        given: the mark of turns whose tokens the environment gave.
    """
    number = len(episode) - 2 * OPEN_TURNS
    if number < 2:
        head, middle, tail = episode, episode[:0], episode[:0]
    else:
        head, middle, tail = episode[:OPEN_TURNS], episode[OPEN_TURNS:-OPEN_TURNS], episode[-OPEN_TURNS:]
    summary = f"{number} turns in between: {_facts(middle)}" if middle else ""
    if number > MIDDLE_TURNS:
        half = MIDDLE_TURNS // 2
        middle, summary = [*middle[:half], *middle[-half:]], f"{summary}. Open for the first and the last {half}"
    messages = sum(min(len(turn.messages), MAX_MESSAGES) for turn in (*head, *middle, *tail))
    low, high = MESSAGE_CHARACTERS
    return {
        **{
            name: [_turn(turn, sampled, given) for turn in part]
            for name, part in (("head", head), ("middle", middle), ("tail", tail))
        },
        "summary": summary,
        "most": max(low, min(high, CHARACTERS // max(1, messages))),
    }


def _turn(turn: EpisodeTurn, sampled: str, given: str) -> dict[str, Any]:
    said = turns(turn.messages[:MAX_MESSAGES])
    more = len(turn.messages) - len(said)
    unseen = turn.start == turn.stop
    return {
        "kind": "unread" if unseen else "policy" if turn.sampled else "environment",
        "author": "Policy" if turn.sampled else _author(said),
        "mark": UNSEEN if unseen else sampled if turn.sampled else given,
        "tokens": _facts([replace(turn, reward=None)]),
        "reward": "" if turn.reward is None else f"reward {turn.reward:+.2f}",
        "messages": [(message.label if len(said) > 1 else "", message.text) for message in said],
        "more": f"{count(more, 'more message')} of this turn" if more else "",
    }


def _author(said: Sequence[Turn]) -> str:
    if len(said) != 1 or said[0].role == "user":
        return "Environment"
    return said[0].label


def _facts(episode: Sequence[EpisodeTurn]) -> str:
    """Return tokens and reward of turns, as in "12 tokens, reward +0.50"."""
    tokens = sum(turn.stop - turn.start for turn in episode)
    rewards = [turn.reward for turn in episode if turn.reward is not None]
    parts = [count(tokens, "token")] if tokens else []
    parts += [f"reward {fsum(rewards):+.2f}"] if rewards else []
    return ", ".join(parts)


# --- failed episodes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failed:
    """The failed episodes of a run.

    Attributes:
        number: all of them.
        reasons: with their numbers, the most frequent first.
        shown: some of them as (reason, prompt, turns), of different reasons as far as possible.
        damaged: lines of the file that can't be read.
    """

    number: int
    reasons: Sequence[tuple[str, int]]
    shown: Sequence[tuple[str, str, Sequence[EpisodeTurn]]]
    damaged: int = 0


def read_failed(run: Path) -> Failed | None:
    """Return the failed episodes of a run, None if it has none."""
    found, examples, damaged = Counter[str](), dict[str, list[dict[str, Any]]](), 0
    try:
        for row in _rows(run / FAILED_EPISODES):
            if row is None:
                damaged += 1
                continue
            reason = one_line(str(row["error"]), REASON_CHARACTERS)
            found[reason] += 1
            if reason in examples or len(examples) < MOST_EXAMPLES:
                examples.setdefault(reason, []).append(row)
                del examples[reason][FAILED_SHOWN:]
    except OSError:
        damaged += 1
    if not found and not damaged:
        return None
    reasons = found.most_common()
    rounds = zip_longest(*(examples.get(reason, ()) for reason, _ in reasons[:REASONS_SHOWN]))
    rows = [row for one in rounds for row in one if row is not None][:FAILED_SHOWN]
    shown = [
        (one_line(str(row["error"]), REASON_CHARACTERS), str(row.get("prompt", "")), turns_of(row)) for row in rows
    ]
    return Failed(found.total(), reasons, shown, damaged)


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of the file, None for each damaged one."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        while line := file.readline(LONGEST_LINE):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if line.strip():
                yield row if isinstance(row, dict) and "error" in row else None
