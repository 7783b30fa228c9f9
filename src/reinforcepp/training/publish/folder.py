"""The folder of a model for other people: without paths of the author's node, and with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforcepp.files import write_json
from reinforcepp.models.lora import ADAPTER_CONFIG
from reinforcepp.terminal import echo
from reinforcepp.training.publish.card import write_card

BASE = "base_model_name_or_path"
PATH_SETTINGS = ("_path", "_file", "_dir")
"""Ends of the names of those settings in a model's JSON files that can be paths."""


def finish_folder(folder: Path, card: str, settings: Mapping[str, Any]) -> None:
    """Remove local paths from the files of a saved model, and write its card.

    Args:
        folder: of the model; no longer changed afterwards.
        card: in Markdown.
        settings: of the training, if they are recorded.
    """
    for file in folder.glob("*config.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        base = values.get(BASE) if file.name == ADAPTER_CONFIG else None
        if (public := _without_local_paths(values)) != values:
            write_json(file, public)
        if base is not None and public[BASE] is None:
            echo(
                f"{ADAPTER_CONFIG}: the base model {base} is a local folder, so the published adapter doesn't name it. To load "
                f"the adapter, set {BASE} there.",
                "yellow",
            )
    if settings.get("system_prompt"):
        echo("chat_template.jinja: everyone who gets the model can read the system_prompt in its chat template.")
    write_card(card, folder)


def _without_local_paths(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_local_paths(each, key) for key, each in value.items()}
    if not isinstance(value, str) or not name.endswith(PATH_SETTINGS):
        return value
    return None if value.startswith(("/", "~", ".", "\\")) or Path(value).exists() else value
