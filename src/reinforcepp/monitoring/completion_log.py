"""What the policy answered, as Parquet files that ``datasets`` reads: one for each training step and evaluation.

completions/step-000012.parquet   step, prompt, completion, reward, one column per reward function, kl, length,
                                  finish_reason; kl is the completion's mean of k3 per token, in nats, length in tokens
evaluations/before.parquet        prompt, completion, reward, judge (where there is one), length, finish_reason

``datasets.load_dataset("parquet", data_dir="RUN/completions")`` gives all steps as one table.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reinforcepp.files import PARTIAL

if TYPE_CHECKING:
    from reinforcepp.types import Completion

COMPLETIONS, EVALUATIONS = "completions", "evaluations"


def step_file(step: int) -> str:
    """The name of a step's file."""
    return f"step-{step:06d}.parquet"


def evaluation_file(run: Path, when: str) -> Path:
    """Where the answers of the evaluation ``before``, ``step N`` or ``after`` are."""
    name = when if not when.startswith("step ") else f"step-{int(when.removeprefix('step ')):06d}"
    return run / EVALUATIONS / f"{name}.parquet"


def columns_of(completions: Sequence[Completion]) -> dict[str, Sequence[Any]]:
    """What is known of completions by themselves."""
    return {
        "prompt": [c.prompt.text for c in completions],
        "completion": [c.text for c in completions],
        "length": [len(c.ids) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
    }


def save_answers(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table, whole or not at all; the same values are the same bytes."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    table = {  # a column of rewards stays one of numbers where no answer of a step was scored
        name: pyarrow.array(values, pyarrow.float64()) if name.startswith(("reward", "judge")) else values
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(table), partial, compression="zstd")
    partial.replace(path)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """The rows of one file, or of all files of a folder in the order of steps; none where there is nothing."""
    from pyarrow import parquet

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def steps_with_answers(run: Path) -> list[int]:
    """The steps whose completions ``run`` holds, in order."""
    return sorted({step for step, _ in files_of_steps(run)})


def files_of_steps(run: Path) -> list[tuple[int, Path]]:
    """Step and file of all completions that ``run`` holds, in order."""
    return sorted((_step(path), path) for path in (run / COMPLETIONS).glob("step-*.parquet"))


def restore_answers(source: Path, run: Path, step: int) -> None:
    """Take back what came after ``step``; in a ``run`` that goes on elsewhere, bring what its ``source`` has up to there."""
    for path in _files(run):
        if _step(path) > step:
            path.unlink()
    if source.resolve() == run.resolve():
        return
    for path in _files(source):
        if _step(path) <= step:
            folder = run / path.parent.name
            folder.mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.name)


def _files(run: Path) -> list[Path]:
    return [path for folder in (COMPLETIONS, EVALUATIONS) for path in (run / folder).glob("*.parquet")]


def _step(path: Path) -> int:
    """The step that a file belongs to; ``before`` comes before all of them, ``after`` after."""
    found = re.match(r"step-(\d+)", path.name)
    return int(found[1]) if found else 0 if path.stem == "before" else sys.maxsize
