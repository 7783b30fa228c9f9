"""Save models so that they load again, and find out before training whether they can be saved.

Transformers refuses to save some configurations that it loads, and a tokenizer can change when it is saved. Both would
otherwise be noticed at the first checkpoint or, for a tokenizer, never.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from reinforcepp.errors import ModelError, first_line
from reinforcepp.files import disk_errors, flush, free_partial, move
from reinforcepp.models.devices import quiet_deepspeed
from reinforcepp.models.loading import PROGRESS_BAR_BYTES, end_ids, progress_bars
from reinforcepp.models.lora import base_model, has_adapter
from reinforcepp.models.tokenizer_files import save_tokenizer
from reinforcepp.runtime.terminal import warn_once

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLING_SETTINGS = frozenset(
    ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
)
"""Settings of a generation config that transformers refuses to save without ``do_sample``."""


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save weights as safetensors, configuration, tokenizer and chat template; each file is written atomically.

    If the model has an adapter, only the adapter is saved.
    """
    partial = free_partial(folder / "model")
    partial.mkdir(parents=True)
    repair_generation_config(model)
    _stop_at_end_of_turn(model, tokenizer)
    quiet_deepspeed()
    with progress_bars(sum(p.nbytes for p in model.parameters()) >= PROGRESS_BAR_BYTES), disk_errors():
        if has_adapter(model):
            model.save_pretrained(partial, save_embedding_layers=False)
            (partial / "README.md").unlink()  # an empty template
        else:
            model.save_pretrained(partial)
    save_tokenizer(tokenizer, partial)
    for path in sorted(partial.iterdir()):
        if path.is_dir():  # a tokenizer with several chat templates
            move(path, folder / path.name)
        else:
            flush(path)
            path.replace(folder / path.name)
    partial.rmdir()
    flush(folder)


def check_savable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save everything but the weights into a temporary folder within ``folder``, and check that it loads again.

    Raises:
        ModelError: a part of the model can't be saved.
        OSError: the disk can't be written.
    """
    partial = free_partial(folder / "model")
    partial.mkdir(parents=True)
    name = model.config.name_or_path or "the given model"
    try:
        repair_generation_config(model)
        _save_configs(model, partial, name)
        save_tokenizer(tokenizer, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_configs(model: PreTrainedModel, folder: Path, name: str) -> None:
    plain = base_model(model)
    try:
        plain.config.save_pretrained(folder)
        if plain.can_generate() and plain.generation_config is not None:
            plain.generation_config.save_pretrained(folder)
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{name}: the configuration can't be saved: {first_line(error)} Fix the model's config.json."
        ) from error


def repair_generation_config(model: PreTrainedModel) -> None:
    """Change the settings of the generation config that transformers refuses to save.

    Sampling settings turn on ``do_sample``, because their author meant to sample. Other refused settings have no effect and
    are removed.

    Raises:
        ModelError: the generation config still can't be saved.
    """
    plain = base_model(model)
    settings = plain.generation_config if plain.can_generate() else None
    if settings is None:
        return
    changes = []
    for _ in range(2):  # removing one setting can make another one invalid
        refused = set(_refused(settings))
        if refused & SAMPLING_SETTINGS:
            settings.do_sample = True
            changes.append("do_sample set to true")
        for name in sorted(refused - SAMPLING_SETTINGS):
            setattr(settings, name, None)
            changes.append(f"{name} removed")
    name = plain.config.name_or_path or "the given model"
    if changes:
        warn_once(f"{name}: transformers can't save the generation config as it is. Saved with {', '.join(changes)}.")
    try:
        settings.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"{name}: the generation config can't be saved: {first_line(error)} Fix generation_config.json."
        ) from error


def _stop_at_end_of_turn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Add the end token of the chat template to the generation config, because other programs read it there only."""
    plain = base_model(model)
    settings = plain.generation_config if plain.can_generate() else None
    ends = end_ids(settings.eos_token_id, tokenizer) if settings is not None else frozenset()
    if settings is not None and ends > end_ids(settings.eos_token_id, tokenizer, template=False):
        settings.eos_token_id = sorted(ends)


def _refused(settings: object) -> list[str]:
    """Return the names of the settings that a strict validation lists."""
    try:
        settings.validate(strict=True)  # type: ignore[attr-defined]
    except ValueError as error:
        return re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE)
    return []
