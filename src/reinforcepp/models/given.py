"""Models that a Python program passes: a name, a path, or a loaded model."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from reinforcepp.errors import ConfigError
from reinforcepp.models.lora import base_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_loaded(model: Any, setting: str) -> PreTrainedModel | None:
    """Return a loaded model that is given as an argument, or None if ``model`` is a name or a path.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(model, (str, os.PathLike)):
        return None
    if not (isinstance(model, torch.nn.Module) and hasattr(model, "config")):
        raise ConfigError(
            f"{setting}: {type(model).__name__} isn't a model. Give a name, a folder, or a loaded transformers model."
        )
    return model


def name_of(model: str | os.PathLike[str] | PreTrainedModel) -> str:
    """Return the name of a model that is given as an argument."""
    return os.fspath(model) if isinstance(model, (str, os.PathLike)) else model.config.name_or_path or "the given model"


@contextmanager
def preserve_modes(model: PreTrainedModel | None) -> Iterator[None]:
    """Restore the mode, training or evaluation, of each module of ``model`` afterwards."""
    modes = [(module, module.training) for module in model.modules()] if model is not None else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def preserve_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Restore the generation config of ``model`` afterwards, because saving a model completes it."""
    base = base_model(model)
    before = base.generation_config
    base.generation_config = copy.deepcopy(before)
    try:
        yield
    finally:
        base.generation_config = before
