"""The command and function ``export``: write a model to a new folder, completely or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from reinforcepp.config import ExportConfig
from reinforcepp.errors import ConfigError
from reinforcepp.files import appearing_folder
from reinforcepp.locks import file_lock
from reinforcepp.models.given import check_loaded, name_of, preserve_generation_config
from reinforcepp.models.loading import load_tokenizer, tokenizer_for, weight_bytes
from reinforcepp.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, has_adapter, is_adapter_dir
from reinforcepp.models.saving import save_model
from reinforcepp.models.tokenizer_files import save_tokenizer
from reinforcepp.rollout.engine import preserve_random_state
from reinforcepp.run_dir import check_output
from reinforcepp.runtime.process import silence
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.publish.card import CARD, model_card
from reinforcepp.training.publish.folder import finish_folder
from reinforcepp.training.publish.source import Source, find_source, plain_copy, plain_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def export(
    model: str | Path | PreTrainedModel,
    output_dir: str | Path,
    *,
    processing_class: PreTrainedTokenizerBase | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    merge: bool = ExportConfig.merge,
    verbose: bool = False,
) -> Path:
    """Write a trained model to a folder with a model card, for programs that read transformers models.

    Example:
        >>> from reinforcepp import export
        >>> folder = export("builtin:tiny", "exported", dtype="bfloat16")
        >>> sorted(path.name for path in folder.glob("*.safetensors"))
        ['model.safetensors']

    Args:
        model: Folder of a run or a model, a Hub name, or a loaded model, which stays as it is.
        output_dir: Folder to write; must be empty or not exist.
        processing_class: The tokenizer of a loaded model; default: that of the folder it was loaded from.
        dtype: Data type of the weights; auto keeps the model's.
        merge: Merge an adapter into its base model; otherwise export the adapter (PEFT).
        verbose: Print progress and notes to standard error.

    Returns:
        The folder.

    Raises:
        ConfigError: The folder isn't empty or can't be written, or ``model`` isn't a model.
        ModelError: The model can't be loaded or saved.
    """
    loaded = check_loaded(model, "model")
    config = ExportConfig(model=name_of(model), output_dir=str(output_dir), dtype=dtype, merge=merge)
    with silence(not verbose), preserve_random_state():
        if loaded is None:
            return _export(config, find_source(config.model))
        tokenizer = tokenizer_for(loaded.config, processing_class)
        return _export(config, Source(config.model, None, None), loaded, tokenizer)


def run_export(config: ExportConfig) -> None:
    """Write the model to the new folder ``config.output_dir``.

    Raises:
        ReinforceError: For a model that can't be loaded, or a folder that isn't empty.
    """
    _export(config, find_source(config.model))
    echo(f"Wrote {config.output_dir}, with {CARD} as its model card.", "green")


def _export(
    config: ExportConfig,
    source: Source,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    folder = Path(config.output_dir).expanduser()
    _check_empty(folder)
    check_output(config.output_dir, overwrite=False, needed_bytes=weight_bytes(source.name) if model is None else 0)
    with file_lock(folder, "output_dir"):
        _check_empty(folder)  # Another export can have ended since.
        with appearing_folder(folder) as partial:
            if model is None or tokenizer is None:
                write_folder(source, config.dtype, partial, folder.name, merge=config.merge)
            else:
                whole = config.merge or not has_adapter(model)
                with preserve_generation_config(model):
                    save_model(plain_copy(model, config.dtype) if whole else model, tokenizer, partial)
                finish_folder(partial, model_card(source, folder.name, adapter=not whole), {}, uploaded=False)
    return folder


def _check_empty(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"output_dir: {folder} isn't empty. Give another folder.")


def write_folder(source: Source, dtype: str, folder: Path, name: str, *, merge: bool = True) -> None:
    """Write the model, its tokenizer and its card, with the title ``name``, into an existing folder.

    An adapter is merged into its base model, or copied alone if ``merge`` is off.
    """
    adapter = not merge and is_adapter_dir(Path(source.name))
    if not adapter:
        model, tokenizer = plain_model(source.name, dtype)
        save_model(model, tokenizer, folder)
    else:
        for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            shutil.copyfile(Path(source.name) / file, folder / file)
        save_tokenizer(load_tokenizer(source.name), folder)
    settings = source.record.settings if source.record is not None else {}
    finish_folder(folder, model_card(source, name, adapter=adapter), settings, uploaded=False)
