"""Prepare supervised training of a reward model or a policy: ranks, run directory and rows that fit.

Kept apart from ``supervised_loop``, because importing that loads TRL, which takes seconds: a wrong path or setting is
reported before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from reinforcepp.config import DEFAULT_MAX_LENGTH, RewardModelConfig, SftConfig, as_dict
from reinforcepp.data import DiskRows
from reinforcepp.errors import ConfigError, DataError, setting
from reinforcepp.models.devices import check_compiler, choose_device
from reinforcepp.models.loading import check_trainable, context_length, load_config, weight_bytes
from reinforcepp.monitoring import PROGRESS_ROWS, reading_progress
from reinforcepp.run_dir import RUN_FILE, check_output, claim_output, clear, describe_run, write_finished
from reinforcepp.runtime.process import started
from reinforcepp.runtime.terminal import echo
from reinforcepp.training import checkpoint
from reinforcepp.training.preflight import check_before_training
from reinforcepp.training.setup import first_rows
from reinforcepp.types import RowId

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.distributed.ranks import Ranks

SupervisedConfig = RewardModelConfig | SftConfig
TASKS: Mapping[type, str] = {RewardModelConfig: "reward model training", SftConfig: "SFT"}
MAX_MEASURED_ROWS = 2000
TOKENIZED_ROWS = 256


CheckMemory = Callable[[SupervisedConfig, int], None]
"""Called before the weights are loaded, with the settings and the tokens of the longest training row."""


class HasRow(Protocol):
    """Anything with a row number."""

    @property
    def row(self) -> RowId:
        """Number of the row in its file."""
        ...


T = TypeVar("T", bound=HasRow)
TokenizedRow = Mapping[str, list[int] | list[float]]
"""Token ids of a row by column, and columns with lists of floats."""


@dataclass(frozen=True)
class RunContext:
    """A run's directory, the fingerprints of its inputs, the checkpoint it resumes from, and its ranks."""

    folder: Path
    inputs: Mapping[str, str]
    saved: checkpoint.Checkpoint | None
    ranks: Ranks


def join_ranks(config: SupervisedConfig) -> None:
    """Choose the device and connect to the other ranks, if there are any. Call it before anything that can fail on one alone.

    Raises:
        ConfigError: the GPU can't be used, a rank didn't connect, or this task doesn't support the setup.
    """
    choose_device(config.use_cpu)
    if config.torch_compile:
        check_compiler(setting("torch_compile"))
    if started() == 1:
        return
    from reinforcepp.distributed.ranks import (  # takes seconds, and a single process doesn't need it
        Ranks,
        init_process_group,
    )

    init_process_group(config.watchdog_seconds)
    ranks, task = Ranks(), TASKS[type(config)]
    if ranks.sharded:
        raise ConfigError(
            f"FSDP and DeepSpeed: {task} keeps the whole model on each rank. Launch without them; use_peft lowers memory."
        )
    if config.batch_size % ranks.count:
        divisible = ranks.count * max(1, round(config.batch_size / ranks.count))
        raise ConfigError(
            f"batch_size: {config.batch_size} can't be split evenly over {ranks.count} processes. "
            f"Set batch_size to {divisible}, or start fewer processes."
        )


OpenedRun = tuple[Path, checkpoint.Checkpoint | checkpoint.FinishedRun | None]
"""The output directory, and the checkpoint to resume from, or the finished run."""


def open_run_dir(config: SupervisedConfig, *, loaded: bool = False) -> OpenedRun:
    """Return the output directory, still unchanged, and the checkpoint to resume from, or the finished run.

    With ``loaded``, the model is in memory, and ``config.model`` is only its name.

    Raises:
        ConfigError: the directory can't be used, or the hardware doesn't support a setting.
        ModelError: there are checkpoints, but all are damaged.
    """
    if not loaded:
        check_trainable(config.model, use_peft=config.use_peft)
    # Each checkpoint holds the weights and Adam's two moments; the trained model is one more copy.
    copies = 3 * config.checkpoints_at_most + 1
    folder = check_output(
        config.output_dir,
        overwrite=config.overwrite,
        resume=config.resume,
        needed_bytes=0 if config.use_peft or loaded else copies * weight_bytes(config.model),
    )
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(f"mixed_precision: fp16 needs a GPU for {TASKS[type(config)]}. Use bf16.")
    if config.report_to:
        from reinforcepp.distributed.ranks import check_trackers  # takes seconds

        check_trackers(config.report_to)
    return folder, checkpoint.checkpoint_to_resume(folder, config)


@contextmanager
def begin(
    folder: Path,
    config: SupervisedConfig,
    inputs: Mapping[str, str],
    saved: checkpoint.Checkpoint | None,
    facts: Mapping[str, Any],
) -> Iterator[RunContext]:
    """Lock the directory for this block; clear it, or check the inputs of a resumed run; record settings and ``facts``.

    All ranks must call it.

    Raises:
        ConfigError: the data or the model changed since the run stopped, or another run uses the directory.
    """
    checkpoint.check_inputs(saved, inputs, config.allowed_changes)
    from reinforcepp.distributed.ranks import Ranks

    ranks = Ranks(config.report_to, folder)
    ranks.barrier()  # until every rank has checked the directory
    with ExitStack() as lock:

        def prepare() -> None:
            if not ranks.is_main:
                return
            lock.enter_context(claim_output(config.output_dir, overwrite=config.overwrite, resume=config.resume))
            if saved is None:
                clear(folder)
            if not (folder / RUN_FILE).is_file():
                describe_run(folder, as_dict(config), dict(facts))
            write_finished(folder, None)

        ranks.run_or_raise_all(prepare)
        yield RunContext(folder, inputs, saved, ranks)


def check_run(
    run: RunContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: SupervisedConfig,
    rows: Sequence[Any] | Dataset,
) -> None:
    """Check that checkpoints can be written; see :func:`check_before_training`. All ranks must call it."""
    check_before_training(run.folder, [model], tokenizer, config, steps=count_steps(rows, config), ranks=run.ranks)


def count_steps(rows: Sequence[Any] | Dataset, config: SupervisedConfig) -> int:
    """Return the number of optimizer steps of the whole training."""
    return config.max_steps or math.ceil(math.ceil(len(rows) / config.batch_size) * config.num_train_epochs)


# --- rows -------------------------------------------------------------------------------------------------------------


def length_limit(config: SupervisedConfig, model: PreTrainedConfig | None = None) -> int:
    """Return the largest number of tokens in a row: ``max_length``, or the model's context if that is shorter.

    ``model`` is the configuration of the model; by default, that of ``config.model``.
    """
    limit = config.max_length or DEFAULT_MAX_LENGTH
    return min(limit, context_length(model or load_config(config.model)) or limit)


def tokenize_rows(
    rows: Sequence[T],
    ids_of: Callable[[Sequence[T]], Sequence[TokenizedRow]],
    limit: int,
    label: str,
    scratch: str,
) -> tuple[Sequence[T], Dataset]:
    """Return the rows of at most ``limit`` tokens, and their token ids.

    Args:
        rows: in memory or on disk.
        ids_of: returns the token ids of several rows, by column, and other columns with lists of floats.
        limit: tokens in the longest column of a row.
        label: plural noun for the rows in the report of skipped ones.
        scratch: folder for the token ids, which are mapped from there into memory.
    """
    from datasets import Dataset

    too_long: list[int] = []
    longest_kept = 0
    writer = _IdWriter(Path(scratch) / f"{label.replace(' ', '_')}.arrow")
    with reading_progress(len(rows) >= PROGRESS_ROWS, "tokenizing") as report, writer:
        for start in range(0, len(rows), TOKENIZED_ROWS):
            batch = [rows[index] for index in range(start, min(start + TOKENIZED_ROWS, len(rows)))]
            kept = []
            for index, ids in enumerate(ids_of(batch), start):
                if longest(ids) > limit:
                    too_long.append(index)
                else:
                    kept.append(ids)
                    longest_kept = max(longest_kept, longest(ids))
            writer.write(kept)
            report((start + len(batch)) / len(rows))
    if longest_kept:
        echo(
            f"The longest of {len(rows) - len(too_long):,} {label} has {longest_kept:,} of {limit:,} tokens (max_length)."
        )
    return _without(rows, too_long, limit, label), Dataset.from_file(str(writer.path))


class _IdWriter:
    """Writes token ids to an Arrow file, batch by batch, so that memory holds one batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = ExitStack()
        self._stream: Any = None

    def __enter__(self) -> _IdWriter:
        self._sink = self._file.enter_context(open(self.path, "wb"))
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream is None and not any(error):
            self._write({})
        self._file.close()

    def write(self, rows: Sequence[TokenizedRow]) -> None:
        """Append rows."""
        if rows:
            self._write({name: [row[name] for row in rows] for name in rows[0]})

    def _write(self, columns: Mapping[str, list[list[int] | list[float]]]) -> None:
        import pyarrow
        from pyarrow import ipc

        ids, floats = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.float32())
        arrays = {
            name: pyarrow.array(values, type=ids if _are_ids(values[0]) else floats) for name, values in columns.items()
        }
        batch = pyarrow.RecordBatch.from_pydict(arrays)
        if self._stream is None:
            self._stream = self._file.enter_context(ipc.new_stream(self._sink, batch.schema))
        self._stream.write_batch(batch)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Turn off the progress bars of ``datasets``."""
    import datasets

    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def longest(ids: TokenizedRow) -> int:
    """Return the number of tokens in the longest column of token ids."""
    return max(len(column) for column in ids.values() if _are_ids(column))


def longest_row(rows: Dataset) -> int:
    """Return the number of tokens in the longest column of token ids of all rows."""
    from pyarrow import compute

    columns = [name for name in rows.column_names if name.endswith("_ids")]
    return max(int(compute.max(compute.list_value_length(rows.data.column(name))).as_py() or 0) for name in columns)


def _are_ids(values: list[int] | list[float]) -> bool:
    return not (values and isinstance(values[0], float))


def sample_rows(rows: Sequence[T]) -> Sequence[T]:
    """Return an evenly spaced sample of rows on disk, because evaluating millions takes as long as training on them."""
    if not isinstance(rows, DiskRows) or len(rows) <= MAX_MEASURED_ROWS:
        return rows
    echo(f"Evaluating on {MAX_MEASURED_ROWS:,} of {len(rows):,} rows, evenly spaced.")
    return list(rows.spread(MAX_MEASURED_ROWS))


def check_not_empty(rows: Sequence[Any], noun: str, source: str, limit: int) -> None:
    """Raise a DataError if no training row of ``source`` is left; ``noun`` names one row."""
    if not rows:
        raise DataError(f"{source}: no training {noun} fits into max_length {limit} tokens. Raise max_length.")


def _without(rows: Sequence[T], too_long: Sequence[int], limit: int, label: str) -> Sequence[T]:
    if not too_long:
        return rows
    echo(
        f"Skipped {len(too_long)} {label} longer than {limit} tokens (rows {first_rows(rows, too_long)}). Raise max_length to "
        "keep them."
    )
    if isinstance(rows, DiskRows):
        return rows.without(too_long)
    skipped = set(too_long)
    return [row for index, row in enumerate(rows) if index not in skipped]
