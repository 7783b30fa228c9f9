"""The folder of a model for other people: without paths of the author's node, and with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reinforcepp.files import write_json
from reinforcepp.models.lora import ADAPTER_CONFIG
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.publish.card import write_card

BASE = "base_model_name_or_path"
PATH_SETTINGS = ("_path", "_file", "_dir")
"""Ends of the names of those settings in a model's JSON files that can be paths."""


def finish_folder(folder: Path, card: str, settings: Mapping[str, Any], *, uploaded: bool) -> None:
    """Remove local paths from the files of a saved model, and write its card.

    Args:
        folder: of the model; no longer changed afterwards.
        card: in Markdown.
        settings: of the training, if they are recorded.
        uploaded: an adapter doesn't name the folder of its base model. Otherwise it does, because it can't be loaded without.
    """
    for file in folder.glob("*config.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        public = _without_local_paths(values)
        if file.name == ADAPTER_CONFIG and public.get(BASE) != values.get(BASE):
            problem = f"{ADAPTER_CONFIG}: the base model is the local folder {values[BASE]}"
            if uploaded:
                echo(f"{problem}, so the uploaded adapter doesn't name it. Set {BASE} there.", "yellow")
            else:
                public[BASE] = values[BASE]
                echo(f"{problem}. Before you publish the adapter, set {BASE} to a model on the Hub.", "yellow")
        if public != values:
            write_json(file, public)
    if settings.get("system_prompt"):
        echo("chat_template.jinja: everyone who gets the model can read the system_prompt in its chat template.")
    write_card(card, folder)


def _without_local_paths(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _without_local_paths(each, key) for key, each in value.items()}
    if not isinstance(value, str) or not name.endswith(PATH_SETTINGS):
        return value
    return None if value.startswith(("/", "~", ".", "\\")) or Path(value).exists() else value
