"""The policy's completions as Parquet files that ``datasets`` reads: one per training step and evaluation.

completions/step-000012.parquet   step, prompt, completion, reward, one column per reward function, kl, length,
                                  finish_reason; kl is the completion's mean of k3 per token, in nats, length in tokens
evaluations/before.parquet        prompt, completion, reward, judge (if available), length, finish_reason

``datasets.load_dataset("parquet", data_dir="RUN/completions")`` loads all steps as one table.
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
        "length": [len(c.ids) for c in completions],
        "finish_reason": [c.finish_reason for c in completions],
    }


def save_completions(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a table atomically; equal values give equal bytes."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    table = {  # a reward column keeps its type if no completion of a step was scored
        name: pyarrow.array(values, pyarrow.float64()) if name.startswith(("reward", "judge")) else values
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(table), partial, compression="zstd")
    partial.replace(path)


def read_completions(path: Path) -> list[dict[str, Any]]:
    """Return the rows of one file, or of all files of a folder in the order of steps; none if there are no files."""
    from pyarrow import parquet

    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def saved_steps(run: Path) -> list[int]:
    """Return the steps whose completions ``run`` contains, in order."""
    return sorted({step for step, _ in step_files(run)})


def step_files(run: Path) -> list[tuple[int, Path]]:
    """Return step and file of all completions that ``run`` contains, in order."""
    return sorted((_step(path), path) for path in (run / COMPLETIONS).glob("step-*.parquet"))


def restore_completions(source: Path, run: Path, step: int) -> None:
    """Remove completions after ``step``. If ``run`` resumes another folder ``source``, copy its completions up to ``step``."""
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
    """Return the step of a file; ``before`` precedes all steps, ``after`` follows them."""
    found = re.match(r"step-(\d+)", path.name)
    return int(found[1]) if found else 0 if path.stem == "before" else sys.maxsize
