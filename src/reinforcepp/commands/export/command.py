"""The command ``export``: write a model to a new folder, completely or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

from reinforcepp.commands.export.card import CARD, model_card
from reinforcepp.commands.export.source import Source, find_source, plain_model
from reinforcepp.config import ExportConfig
from reinforcepp.errors import ConfigError
from reinforcepp.files import appearing_folder, flush
from reinforcepp.locks import file_lock
from reinforcepp.models.loading import load_tokenizer, weight_bytes
from reinforcepp.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter_dir
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenizer_files import save_tokenizer
from reinforcepp.monitoring import echo
from reinforcepp.run_dir import check_output


def run_export(config: ExportConfig) -> None:
    """Write the model to the new folder ``config.output_dir``.

    Raises:
        ReinforceError: For a model that can't be loaded, or a folder that isn't empty.
    """
    source = find_source(config.model)
    folder = Path(config.output_dir).expanduser()
    _check_empty(folder)
    check_output(config.output_dir, overwrite=False, needed_bytes=weight_bytes(source.name))
    with file_lock(folder, "output_dir"):
        _check_empty(folder)  # Another export can have ended since.
        with appearing_folder(folder) as partial:
            write_folder(source, config.dtype, partial, folder.name, merge=config.merge)
    echo(f"Wrote {config.output_dir}, with {CARD} as its model card.", "green")


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} isn't empty. Give another folder.")


def write_folder(source: Source, dtype: str, folder: Path, name: str, *, merge: bool = True) -> None:
    """Write the model, its tokenizer and its card, with the title ``name``, into an existing folder.

    An adapter is merged into its base model, or copied alone if ``merge`` is off.
    """
    if merge or not is_adapter_dir(Path(source.name)):
        model, tokenizer = plain_model(source.name, dtype)
        save_model(model, tokenizer, folder)
    else:
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(Path(source.name) / file, folder / file)
        save_tokenizer(load_tokenizer(source.name), folder)
    card = folder / CARD
    card.write_text(model_card(source, name), encoding="utf-8")
    flush(card)
