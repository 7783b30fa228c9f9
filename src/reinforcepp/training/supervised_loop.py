"""What trainings on the rows of a file, of a reward model or a warm-up, do alike before their first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from reinforcepp.config import RewardModelConfig, SftConfig, as_dict
from reinforcepp.data import DiskRows
from reinforcepp.errors import ConfigError, DataError
from reinforcepp.models.loading import context_length, load_config, weight_bytes
from reinforcepp.monitoring import echo, reading_progress
from reinforcepp.run_dir import RUN_FILE, check_output, check_unchanged, clear, describe_run
from reinforcepp.runtime import started
from reinforcepp.training import checkpoint
from reinforcepp.types import RowId

if TYPE_CHECKING:
    from datasets import Dataset

    from reinforcepp.distributed.ranks import Ranks

Settings = RewardModelConfig | SftConfig
SUBJECTS: Mapping[type, str] = {RewardModelConfig: "reward model", SftConfig: "model for a warm-up"}
MAX_MEASURED_ROWS = 2000


class Numbered(Protocol):
    """Anything with a row number."""

    @property
    def row(self) -> RowId:
        """The row's number in its file."""
        ...


T = TypeVar("T", bound=Numbered)


@dataclass(frozen=True)
class RunContext:
    """Where a training writes and what it starts from: fingerprints of its inputs, the checkpoint it goes on from, and who
    takes part.
    """

    folder: Path
    inputs: Mapping[str, str]
    saved: checkpoint.Checkpoint | None
    ranks: Ranks


def join_ranks(config: Settings) -> None:
    """Meet the other processes, if there are any; due before anything that may fail in one alone.

    Raises:
        ConfigError: they don't meet, or can't train this way.
    """
    if started() == 1:
        return
    from reinforcepp.distributed.ranks import (
        Ranks,
        init_process_group,
    )  # which takes seconds: alone, a wrong path is told before

    init_process_group(config.watchdog_seconds)
    ranks, subject = Ranks(), SUBJECTS[type(config)]
    if ranks.sharded:
        raise ConfigError(
            f"A {subject} is trained whole on each process: leave FSDP and DeepSpeed out for this job; --use_peft needs less "
            "memory."
        )
    if config.batch_size % ranks.count:
        fitting = ranks.count * max(1, round(config.batch_size / ranks.count))
        raise ConfigError(
            f"A {subject} is trained with batches of {config.batch_size}, and the launcher has started {ranks.count} processes: "
            f"give a batch_size that they can share evenly, such as {fitting}, or start fewer of them."
        )


def open_run_dir(config: Settings) -> tuple[Path, checkpoint.Checkpoint | None]:
    """The folder to write to, which is left as it is for now, and the checkpoint to go on from.

    Raises:
        ConfigError: the folder can't be used, or the settings can't on this machine.
        ModelError: there are checkpoints, but none that is whole.
    """
    copies = 3 * (config.keep_last + 1) + 1  # checkpoints, with Adam's moments, the one being written, and the model
    folder = check_output(
        config.output_dir,
        overwrite=config.overwrite,
        resume=config.resume,
        needed_bytes=copies * weight_bytes(config.model),
    )
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(f"mixed_precision fp16 needs a GPU when a {SUBJECTS[type(config)]} is trained: use bf16.")
    return folder, checkpoint.chosen(folder, config)


def begin(
    folder: Path,
    config: Settings,
    inputs: Mapping[str, str],
    saved: checkpoint.Checkpoint | None,
    facts: Mapping[str, Any],
) -> RunContext:
    """Clear the folder, or check that the checkpoint's run began with the same; note settings and ``facts``. All call it.

    Raises:
        ConfigError: the data or the model is another than when the run was stopped.
    """
    if saved is not None:
        check_unchanged(saved.state["inputs"], inputs, config.allowed_changes)
    from reinforcepp.distributed.ranks import Ranks

    ranks = Ranks()
    ranks.barrier()  # until all have looked at the folder
    if ranks.is_main:
        if saved is None:
            clear(folder)
        if not (folder / RUN_FILE).is_file():
            describe_run(folder, as_dict(config), dict(facts))
    return RunContext(folder, inputs, saved, ranks)


def length_limit(config: Settings) -> int:
    """How many tokens a row may have: no more than the model can attend to."""
    return min(config.max_length, context_length(load_config(config.model)) or config.max_length)


def skip_long(rows: Sequence[T], length: Callable[[T], int], limit: int, what: str) -> Sequence[T]:
    """The rows of at most ``limit`` tokens; of those left out, called ``what``, number and rows are told."""
    return _without(rows, [place for place, row in enumerate(rows) if length(row) > limit], limit, what)


def tokenize_rows(
    rows: Sequence[T], ids_of: Callable[[T], Mapping[str, list[int]]], limit: int, what: str, scratch: str
) -> tuple[Sequence[T], Sequence[Mapping[str, list[int]]] | Dataset]:
    """The rows of at most ``limit`` tokens, and what ``ids_of`` makes of them; of rows on the disk that is in ``scratch``."""
    from datasets import Dataset, Features, List, Value

    long: list[int] = []

    def short() -> Iterator[Mapping[str, list[int]]]:
        with reading_progress(isinstance(rows, DiskRows), "tokenising") as on_progress:
            for place, row in enumerate(rows):
                ids = ids_of(row)
                if longest(ids) > limit:
                    long.append(place)
                else:
                    yield ids
                on_progress((place + 1) / len(rows))

    made: Sequence[Mapping[str, list[int]]] | Dataset
    if isinstance(rows, DiskRows):
        features = Features({name: List(Value("int32")) for name in (ids_of(rows[0]) if rows else {})})
        with no_progress_bars():  # there is one already
            made = Dataset.from_generator(short, features=features, cache_dir=scratch, fingerprint=rows.digest)
    else:
        made = list(short())
    return _without(rows, long, limit, what), made


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """The ``datasets`` library's own progress bars are off meanwhile."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def longest(ids: Mapping[str, list[int]]) -> int:
    """Tokens of the longest of them."""
    return max(map(len, ids.values()))


def sample_rows(rows: Sequence[T]) -> Sequence[T]:
    """Of rows on the disk those that figures are made of: to measure millions would take as long as to train on them."""
    if not isinstance(rows, DiskRows) or len(rows) <= MAX_MEASURED_ROWS:
        return rows
    echo(f"Figures are those of {MAX_MEASURED_ROWS:,} of {len(rows):,} rows, evenly spread.")
    return list(rows.spread(MAX_MEASURED_ROWS))


def _without(rows: Sequence[T], long: Sequence[int], limit: int, what: str) -> Sequence[T]:
    """``rows`` but for those at the places ``long``, which are told."""
    if not long:
        return rows
    named = ", ".join(str(rows[place].row) for place in long[:5]) + (", …" if len(long) > 5 else "")
    echo(f"Left out {len(long)} {what} longer than {limit} tokens (rows {named}); raise max_length to keep them.")
    if isinstance(rows, DiskRows):
        return rows.without(long)
    left_out = set(long)
    return [row for place, row in enumerate(rows) if place not in left_out]


def check_not_empty(rows: Sequence[Any], what: str, source: str, limit: int) -> None:
    """Raises a DataError if none of the training rows of ``source``, one of which is called ``what``, is left."""
    if not rows:
        raise DataError(f"No training {what} of {source} fits into max_length {limit} tokens: raise max_length.")
