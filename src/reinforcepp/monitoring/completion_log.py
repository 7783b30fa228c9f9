"""The policy's completions as Parquet files that ``datasets`` reads: one per training step and evaluation.

completions/step-000012.parquet   step, prompt, completion, reward, reward/NAME per reward function, extra/NAME per column that
                                  a function logged, kl, length, finish_reason, messages, chat_template_kwargs; kl is the
                                  completion's mean of k3 per token, in nats, length in tokens
evaluations/before.parquet        prompt, completion, reward, judge (if available), extra/NAME, length, finish_reason, messages,
                                  chat_template_kwargs

``prompt`` is text for people. ``messages`` has the messages of a prompt that is a list of messages, as a list of ``role`` and
``content``, and is null for a prompt that is a text. Fields such as ``name`` are added if a message of the data has them, and
``tool_calls`` are JSON text. ``chat_template_kwargs`` is JSON text, and null without variables. All files of a run have the same
columns and fields, because ``datasets`` needs that. Metadata mark them, so training on such a file reads the messages as
prompts.

In an environment, ``completion`` is the policy's last message, and the column ``turns`` is JSON text: a list of objects with
``messages``, ``tokens`` (their number), ``sampled`` and ``reward``.

``datasets.load_dataset("parquet", data_dir="RUN/completions")`` loads all steps as one table.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.data.tables import PROMPTS_IN_MESSAGES
from reinforcepp.files import copy_file, no_link, whole_file
from reinforcepp.run_dir import FAILED_EPISODES
from reinforcepp.runtime.redaction import redacted
from reinforcepp.types import EpisodeTurn

if TYPE_CHECKING:
    import pyarrow

    from reinforcepp.types import Completion, Conversation, Prompt

COMPLETIONS, EVALUATIONS = "completions", "evaluations"
MESSAGES, VARIABLES, TURNS = "messages", "chat_template_kwargs", "turns"


def step_file(step: int) -> str:
    """Return the name of a step's file."""
    return f"step-{step:06d}.parquet"


def evaluation_file(run: Path, when: str) -> Path:
    """Return the file of the evaluation ``before``, ``step N`` or ``after``."""
    name = when if not when.startswith("step ") else f"step-{int(when.removeprefix('step ')):06d}"
    return run / EVALUATIONS / f"{name}.parquet"


def columns_of(completions: Sequence[Completion]) -> dict[str, Sequence[Any]]:
    """Return the columns that depend on the completions alone."""
    return {
        "prompt": [c.prompt.text for c in completions],
        "completion": [c.text for c in completions],
        "length": [len(c.sampled_ids) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
        MESSAGES: [c.prompt.messages for c in completions],
        VARIABLES: [
            _json(c.prompt.chat_template_kwargs) if c.prompt.chat_template_kwargs else None for c in completions
        ],
        **({TURNS: [_json(turn_rows(c)) for c in completions]} if any(c.turns for c in completions) else {}),
    }


def turn_rows(episode: Completion) -> list[dict[str, Any]]:
    """Return the turns of an episode for JSON: messages, number of tokens, whether they are sampled, and reward."""
    return [
        {"messages": turn.messages, "tokens": turn.stop - turn.start, "sampled": turn.sampled, "reward": turn.reward}
        for turn in episode.turns
    ]


def turns_of(row: Mapping[str, Any]) -> tuple[EpisodeTurn, ...]:
    """Return the turns that :func:`turn_rows` stored in a row; none if the row has none, or something else in their place."""
    stored, turns, start = row.get(TURNS), [], 0
    try:
        for turn in json.loads(stored) if isinstance(stored, str) else stored or ():
            messages, stop = tuple(dict(message) for message in turn["messages"]), start + int(turn["tokens"])
            reward = turn["reward"]
            reward = float(reward) if isinstance(reward, int | float) and math.isfinite(reward) else None
            turns.append(EpisodeTurn(messages, start, max(start, stop), bool(turn["sampled"]), reward))
            start = turns[-1].stop
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return ()
    return tuple(turns)


def log_failed_episodes(run: Path, episodes: Sequence[Completion]) -> None:
    """Append failed episodes to failed_episodes.jsonl, which a resume doesn't restore."""
    with open(run / FAILED_EPISODES, "a", encoding="utf-8", errors="backslashreplace", opener=no_link) as file:
        for episode in episodes:
            row = {"error": redacted(episode.error), "prompt": episode.prompt.text, "turns": turn_rows(episode)}
            file.write(_json(row) + "\n")


def conversation_of(row: Mapping[str, Any]) -> Conversation:
    """Return the prompt of a row that :func:`read_completions` returned: its messages, or its text."""
    return row.get(MESSAGES) or str(row.get("prompt", ""))


def message_fields(prompts: Iterable[Prompt]) -> list[str]:
    """Return the fields of the prompts' messages."""
    return list(dict.fromkeys(field for prompt in prompts for message in prompt.messages for field in message))


def save_completions(path: Path, columns: Mapping[str, Sequence[Any]], fields: Sequence[str] = ()) -> None:
    """Write a table atomically; equal values give equal bytes. Messages have ``fields``, even if the table's don't."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({name: _array(name, values, fields) for name, values in columns.items()})
    if MESSAGES in columns:
        table = table.replace_schema_metadata(PROMPTS_IN_MESSAGES)
    with whole_file(path, "xb") as file:
        parquet.write_table(table, file, compression="zstd")


def _array(name: str, values: Sequence[Any], fields: Sequence[str]) -> pyarrow.Array:
    """Return a column, whose type doesn't depend on whether a completion has a value."""
    import pyarrow

    if name.startswith(("reward", "judge")):
        return pyarrow.array(values, pyarrow.float64())
    if name.startswith("extra/"):
        if all(isinstance(value, int | float | None) for value in values):
            return pyarrow.array(values, pyarrow.float64())
        return pyarrow.array([None if value is None else str(value) for value in values], pyarrow.string())
    if name == VARIABLES:
        return pyarrow.array(values, pyarrow.string())
    if name != MESSAGES:
        return pyarrow.array(values)
    rows = [[_stored(message) for message in messages] or None for messages in values]
    found = dict.fromkeys(
        ["role", "content", *fields, *(key for row in rows for message in row or () for key in message)]
    )
    message = pyarrow.struct([(field, pyarrow.string()) for field in found])
    return pyarrow.array(rows, pyarrow.list_(message))


def _stored(message: Mapping[str, Any]) -> dict[str, str | None]:
    return {key: value if isinstance(value, str | None) else _json(value) for key, value in message.items()}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _message(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as it was before :func:`_stored`."""
    if not isinstance(stored, Mapping):
        raise ValueError(f"{MESSAGES} holds {stored!r}, not a message")
    message = {key: value for key, value in stored.items() if value is not None or key in ("role", "content")}
    if isinstance(message.get("tool_calls"), str):
        message["tool_calls"] = json.loads(message["tool_calls"])
    return message


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Return the rows of one file, or of all files of a folder in the order of steps; none if there are no files."""
    from pyarrow import parquet

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    rows = [row for file in files for row in parquet.read_table(file).to_pylist()]
    for row in rows:
        if row.get(MESSAGES):
            row[MESSAGES] = [_message(message) for message in row[MESSAGES]]
    return rows


def saved_steps(run: Path) -> list[int]:
    """Return the steps whose completions ``run`` contains, in order."""
    return sorted({step for step, _ in step_files(run)})


def step_files(run: Path) -> list[tuple[int, Path]]:
    """Return step and file of all completions that ``run`` contains, in order."""
    return sorted((_step(path), path) for path in (run / COMPLETIONS).glob("step-*.parquet"))


def restore_completions(source: Path, run: Path, step: int) -> None:
    """Remove completions after ``step``. If ``run`` resumes another folder ``source``, copy its completions up to ``step``.

    Files of older versions get the columns that they lack.
    """
    for path in _files(run):
        if _step(path) > step:
            path.unlink()
    if source.resolve() != run.resolve():
        for path in _files(source):
            if _step(path) <= step and not path.is_symlink():  # of a run of others, a link could lead anywhere
                folder = run / path.parent.name
                folder.mkdir(exist_ok=True)
                copy_file(path, folder / path.name)
    for path in _files(run):
        _add_columns(path)


def _add_columns(path: Path) -> None:
    from pyarrow import ArrowInvalid, parquet

    try:
        if MESSAGES in parquet.read_schema(path).names:
            return
        columns = parquet.read_table(path).to_pydict()
    except (ArrowInvalid, OSError):  # a damaged file, which the report names
        return
    rows = len(columns["prompt"])
    save_completions(path, {**columns, MESSAGES: [()] * rows, VARIABLES: [None] * rows})


def _files(run: Path) -> list[Path]:
    return [path for folder in (COMPLETIONS, EVALUATIONS) for path in (run / folder).glob("*.parquet")]


def _step(path: Path) -> int:
    """Return the step of a file; ``before`` precedes all steps, ``after`` follows them."""
    found = re.match(r"step-(\d+)", path.name)
    return int(found[1]) if found else 0 if path.stem == "before" else sys.maxsize
