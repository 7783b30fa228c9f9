"""The responses that a run report shows: early, middle, late and highest-reward completions, and held-out responses."""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reinforcepp.monitoring import Progress
from reinforcepp.monitoring.completion_log import (
    COMPLETIONS,
    MESSAGES,
    conversation_of,
    evaluation_file,
    read_completions,
    step_files,
    turns_of,
)
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.types import Conversation, EpisodeTurn

MAX_POINTS = 700  # of the early and of the late third, in reward against length
BEST_COMPLETIONS = 1000  # of highest reward, among which distinct texts are found
MISSING_REASON = "because an older version wrote it or they were removed"
PROGRESS_FILES = 300  # from this many files, reading takes a while and shows its progress

_Columns = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """A completion; ``seen`` counts its text, or its messages in an environment, among the completions of highest reward."""

    step: int
    prompt: Conversation
    completion: str
    reward: float
    rewards: Mapping[str, float] = field(default_factory=dict)
    kl: float | None = None
    length: int | None = None
    finish_reason: str | None = None
    seen: int = 1
    turns: Sequence[EpisodeTurn] = ()


@dataclass(frozen=True)
class Group:
    """Samples under one title."""

    title: str
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Samples:
    """The completions to show, or the reason why there are none.

    ``early`` and ``late`` are (length, reward, step) of completions from the first and the last third of the steps.
    """

    groups: Sequence[Group] = ()
    early: Sequence[tuple[int, float, int]] = ()
    late: Sequence[tuple[int, float, int]] = ()
    missing: str | None = None
    damaged: Sequence[str] = ()


@dataclass(frozen=True)
class Pair:
    """A held-out prompt with its responses and their metrics, each as (before, later)."""

    prompt: Conversation
    responses: tuple[str, str]
    rewards: tuple[float | None, float | None]
    judge: tuple[float | None, float | None]
    lengths: tuple[float | None, float | None] = (None, None)
    turns: tuple[Sequence[EpisodeTurn], Sequence[EpisodeTurn]] = ((), ())

    @property
    def same(self) -> bool:
        """Whether the policy's responses are equal, in an environment with all messages."""
        one, other = (_said(turns) for turns in self.turns)
        return self.responses[0] == self.responses[1] and one == other

    @property
    def change(self) -> float:
        """Change of the reward; 0 if one of the two is unknown."""
        before, after = self.rewards
        return after - before if before is not None and after is not None else 0.0


@dataclass(frozen=True)
class Pairs:
    """Held-out responses before training and at ``when``, the largest gain first, or the reason why there are none."""

    when: str = "after"
    pairs: Sequence[Pair] = ()
    missing: str | None = None


class _Row(NamedTuple):
    """A completion's reward, negative so that the highest sorts first, and its location."""

    cost: float
    step: int
    file: Path
    position: int
    length: int | None


def choose_samples(record: RunRecord, number: int) -> Samples:
    """Return ``number`` completions of the first, middle and last step each, and of the highest rewards of the run.

    Those of a step are spread evenly over the order of its rewards.
    """
    files = step_files(record.folder)
    if not files or not number:
        return Samples(missing=_why_none(record, number))
    scan = _Scan(files)
    best = heapq.nsmallest(BEST_COMPLETIONS, scan.rows())
    if not best:
        return Samples(missing=f"No file in {COMPLETIONS} can be read.", damaged=scan.damaged)
    tables = _Tables()
    steps = sorted({step for step, _ in scan.readable})
    chosen: dict[int, str] = {}
    for name, step in (("Early", steps[0]), ("Middle", steps[len(steps) // 2]), ("Late", steps[-1])):
        chosen.setdefault(step, f"{name}: step {step}")
    groups = [
        Group(title, [tables.sample(row) for row in _spread(scan.of_step(step), number)])
        for step, title in chosen.items()
    ]
    groups.append(Group("Highest rewards of the run", _highest(best, number, tables)))
    return Samples(groups, scan.early, scan.late, None, scan.damaged)


def choose_pairs(record: RunRecord) -> Pairs:
    """Return the held-out responses before training with the latest ones."""
    when = latest(record.evaluations)
    if "before" not in record.evaluations:
        return Pairs(missing="No held-out prompts were evaluated. See eval_prompts and heldout_fraction.")
    if when is None:
        return Pairs(missing="Held-out prompts were evaluated before training, but not yet again.")
    try:
        before, after = (read_completions(evaluation_file(record.folder, name)) for name in ("before", when))
    except (OSError, ValueError) as error:
        return Pairs(when, missing=f"The held-out responses can't be read: {error}.")
    if not before or not after:
        return Pairs(
            when,
            missing=f"The run has no held-out responses {MISSING_REASON}.",
        )
    pairs = [
        Pair(
            conversation_of(one),
            (str(one["completion"]), str(other["completion"])),
            (_number(one.get("reward")), _number(other.get("reward"))),
            (_number(one.get("judge")), _number(other.get("judge"))),
            (_number(one.get("length")), _number(other.get("length"))),
            (turns_of(one), turns_of(other)),
        )
        for one, other in _matched(before, after)
    ]
    return Pairs(when, sorted(pairs, key=lambda pair: -pair.change))


def latest(evaluations: Mapping[str, Any]) -> str | None:
    """Return the name of the last evaluation after training began: ``after``, otherwise ``step N``."""
    steps = [name for name in evaluations if name.startswith("step ")]
    return "after" if "after" in evaluations else max(steps, key=step_of, default=None)


def step_of(name: str) -> int:
    """Return N for an evaluation called ``step N``."""
    return int(name.removeprefix("step "))


# --- completions ------------------------------------------------------------------------------------------------------


def _why_none(record: RunRecord, number: int) -> str:
    if not number:
        return "samples is 0, so the page shows no completions."
    if record.settings.get("log_completions") is False:
        return "The run saved no completions because log_completions was off."
    return f"The run has no completions {MISSING_REASON}."


class _Scan:
    """One pass over all completions without their texts, because a long run has millions."""

    def __init__(self, files: Sequence[tuple[int, Path]]) -> None:
        self.files = files
        self.readable: list[tuple[int, Path]] = []
        self.damaged: list[str] = []
        self.early: list[tuple[int, float, int]] = []
        self.late: list[tuple[int, float, int]] = []

    def rows(self) -> Iterator[_Row]:
        """Yield every completion, and keep points of the early and the late third."""
        third = len(self.files) // 3
        quiet = len(self.files) < PROGRESS_FILES
        with nullcontext() if quiet else Progress("reading completions", len(self.files)) as progress:
            for i, (step, file) in enumerate(self.files):
                rows = self._of_file(step, file)
                if rows:
                    self.readable.append((step, file))
                for points, index in ((self.early, i), (self.late, len(self.files) - 1 - i)):
                    if index < third:
                        points += _points(rows, MAX_POINTS * (index + 1) // third - MAX_POINTS * index // third)
                yield from rows
                if progress is not None:
                    progress.step(f"step {step}")

    def of_step(self, step: int) -> list[_Row]:
        """Return the completions of one step."""
        return [row for number, file in self.readable if number == step for row in self._of_file(number, file)]

    def _of_file(self, step: int, file: Path) -> list[_Row]:
        from pyarrow import parquet

        try:
            columns = parquet.ParquetFile(file).read(columns=["reward", "length"]).to_pydict()
        except (OSError, ValueError):
            self.damaged.append(file.name)
            return []
        rewards = columns.get("reward", [])
        lengths = columns.get("length", [None] * len(rewards))
        return [
            _Row(-float(reward), step, file, index, length)
            for index, (reward, length) in enumerate(zip(rewards, lengths, strict=True))
            if reward is not None and math.isfinite(reward)
        ]


class _Tables:
    """Completion files with texts, each read once."""

    def __init__(self) -> None:
        self._read: dict[Path, list[dict[str, Any]]] = {}

    def row(self, row: _Row) -> dict[str, Any]:
        if row.file not in self._read:
            self._read[row.file] = read_completions(row.file)
        return self._read[row.file][row.position]

    def sample(self, row: _Row, seen: int = 1) -> Sample:
        values = self.row(row)
        parts = {name.removeprefix("reward/"): v for name, v in values.items() if name.startswith("reward/")}
        return Sample(
            step=row.step,
            prompt=conversation_of(values),
            completion=str(values.get("completion", "")),
            reward=-row.cost,
            rewards={name: value for name, value in parts.items() if value is not None} if len(parts) > 1 else {},
            kl=_number(values.get("kl")),
            length=row.length,
            finish_reason=values.get("finish_reason"),
            seen=seen,
            turns=turns_of(values),
        )


def _spread(rows: Sequence[_Row], number: int) -> list[_Row]:
    """Return ``number`` of ``rows``, evenly spaced in the order of their rewards, the highest first."""
    ranked = sorted(rows)
    if len(ranked) <= number:
        return ranked
    if number == 1:
        return [ranked[len(ranked) // 2]]
    return [ranked[round(i * (len(ranked) - 1) / (number - 1))] for i in range(number)]


def _highest(ranked: Sequence[_Row], number: int, tables: _Tables) -> list[Sample]:
    """Return the completions of highest reward, each text or episode once, at its first occurrence."""
    first: dict[str, _Row] = {}
    seen: dict[str, int] = {}
    for row in ranked:
        values = tables.row(row)
        text = _said(turns_of(values)) or str(values.get("completion", ""))
        if text not in first and len(first) == number:
            break
        first.setdefault(text, row)
        seen[text] = seen.get(text, 0) + 1
    return [tables.sample(row, seen[text]) for text, row in first.items()]


def _said(turns: Sequence[EpisodeTurn]) -> str:
    """Return the messages of an episode as one text, empty without turns."""
    return json.dumps([turn.messages for turn in turns]) if turns else ""


def _points(rows: Sequence[_Row], number: int) -> list[tuple[int, float, int]]:
    """Return up to ``number`` of ``rows``, evenly spaced."""
    known = [(row.length, -row.cost, row.step) for row in rows if row.length is not None]
    return known if len(known) <= number else [known[i * len(known) // number] for i in range(number)]


# --- held-out responses -----------------------------------------------------------------------------------------------


def _matched(before: Sequence[_Columns], after: Sequence[_Columns]) -> list[tuple[_Columns, _Columns]]:
    """Return pairs of rows with the same prompt. The responses to a repeated prompt pair up in their order."""
    known = all(MESSAGES in row for row in (*before, *after))  # an older version didn't save messages

    def prompt_of(row: _Columns) -> str:
        return repr(conversation_of(row)) if known else str(row["prompt"])

    waiting: dict[str, list[_Columns]] = {}
    for row in after:
        waiting.setdefault(prompt_of(row), []).append(row)
    return [(row, waiting[prompt_of(row)].pop(0)) for row in before if waiting.get(prompt_of(row))]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
