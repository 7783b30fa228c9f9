"""Code in the folder or repository of a model: it runs only for models that the user allows, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_allowed: set[str] = set()


def allow_remote_code(*names: str) -> None:
    """Let the code of models run: names on the Hub, or folders and the folders in them."""
    _allowed.update(_key(name) for name in names if name)


def remote_code(name: str) -> dict[str, bool]:
    """Return the argument of ``from_pretrained`` that decides about the code of the model ``name``.

    Without it, transformers asks on the terminal.
    """
    key = _key(name)
    return {"trust_remote_code": bool(name) and not _allowed.isdisjoint([key, *map(str, Path(key).parents)])}


def uses_remote_code(config: PreTrainedConfig) -> bool:
    """Return whether the model of ``config`` needs code from its repository, which the user has allowed."""
    return bool(getattr(config, "auto_map", None)) and remote_code(str(config.name_or_path))["trust_remote_code"]


def _key(name: str) -> str:
    return str(Path(name).expanduser().resolve())
