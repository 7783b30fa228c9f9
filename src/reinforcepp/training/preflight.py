"""Find out before training whether its checkpoints can be written: the files of the model, and space on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.config import CheckpointConfig
from reinforcepp.errors import ConfigError
from reinforcepp.models.lora import has_adapter
from reinforcepp.models.saving import check_savable
from reinforcepp.run_dir import format_size
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.checkpoint import FOLDER

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from reinforcepp.distributed.ranks import Ranks

MOMENT_BYTES = 8
"""AdamW's two moments of a parameter, in float32."""
MASTER_BYTES = 4
"""Float32 master weight of a parameter that is trained in a lower precision."""


def check_before_training(
    folder: Path,
    models: Sequence[PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    config: CheckpointConfig,
    *,
    steps: int,
    ranks: Ranks,
) -> None:
    """Save everything of the first model but its weights for a test, and print how much space the checkpoints need.

    Every rank must call this; rank 0 writes.

    Args:
        folder: the run directory.
        models: all trained models; the first one is saved as a folder.
        tokenizer: saved with it.
        config: how many checkpoints are kept.
        steps: of the whole training.
        ranks: of the training.

    Raises:
        ModelError: the configuration or the tokenizer can't be saved.
        ConfigError: the disk is too full, or can't be written.
    """

    def check() -> None:
        if not ranks.is_main:
            return
        try:
            check_savable(models[0], tokenizer, folder)
        except OSError as error:
            raise ConfigError(
                f"output_dir: {folder} can't be written ({error.strerror or error}). Free some space or give another "
                "output_dir."
            ) from error
        _check_space(folder, models, config, steps)

    ranks.run_or_raise_all(check)


def checkpoint_bytes(models: Iterable[PreTrainedModel]) -> int:
    """Return the size of a checkpoint: trained models and the states of their optimizers."""
    return sum(_saved_bytes(model) + _optimizer_bytes(model) for model in models)


def _saved_bytes(model: PreTrainedModel) -> int:
    """Return the size of the weights that are saved: all, or those of the adapter."""
    return sum(p.nbytes for p in model.parameters() if p.requires_grad or not has_adapter(model))


def _optimizer_bytes(model: PreTrainedModel) -> int:
    trained = (p for p in model.parameters() if p.requires_grad)
    return sum(p.numel() * (MOMENT_BYTES + (MASTER_BYTES if p.element_size() < MASTER_BYTES else 0)) for p in trained)


def _check_space(folder: Path, models: Sequence[PreTrainedModel], config: CheckpointConfig, steps: int) -> None:
    each, model = checkpoint_bytes(models), _saved_bytes(models[0])
    count = config.checkpoints_at_most
    if config.save_every > 0:
        count = min(count, steps // config.save_every + 1)
    needed = count * each + model
    free = shutil.disk_usage(folder).free
    checkpoints = "1 checkpoint" if count == 1 else f"up to {count} checkpoints"
    deleted = "" if config.keeps_checkpoints else ", deleted when training ends,"
    echo(
        f"Disk: {checkpoints} of {format_size(each)}{deleted} and the model of {format_size(model)}, {format_size(needed)} in "
        f"total; {format_size(free)} free"
    )
    written = sum(path.stat().st_size for path in (folder / FOLDER).rglob("*") if path.is_file())  # of a resumed run
    if free + written < needed:
        raise ConfigError(
            f"output_dir: {folder} is on a disk with {format_size(free)} free, but the checkpoints need up to "
            f"{format_size(needed)}. Free some space, lower keep_last if it is above 1, or "
            "give another output_dir."
        )
