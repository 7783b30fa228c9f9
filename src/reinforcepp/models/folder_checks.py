"""Checks of a model folder whose author isn't trusted: which files its links and configurations lead to.

Weights are loaded from safetensors files in the folder only, because a pickle can run any code. A link could make an export
or an upload publish a private file of the user, for example ``chat_template.jinja`` that leads to a key.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from reinforcepp.errors import ModelError
from reinforcepp.models.tokenizer_files import TEMPLATES, TOKENIZER_PATTERNS

HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
"""Files of a model on the Hub that are downloaded; neither code nor pickled weights."""
READ_FILES = (*HUB_FILES, *TOKENIZER_PATTERNS, "*.codes", TEMPLATES)
"""Files and folders of a model that this package or transformers reads."""
STORED = re.compile(r"blobs/[0-9a-f]{40,64}|[0-9a-f]{2}/[0-9a-f]{30,62}|[^/]+/[A-Z0-9]+-s\d+--[0-9a-f]{30,}(\..+)?")
"""Folder and name of a file in a store by content, to which the caches of the Hub, DVC and git-annex link."""
WEIGHTS = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"model{INDEX_SUFFIX}"
"""File that names the weight files of a large model."""
PICKLES = (".bin", ".pt", ".pth")
NO_PICKLES = "Pickled weights (.bin, .pt) are never loaded, because a pickle can run any code."
CONVERT = "If you trust the model, load it with transformers and call save_pretrained. Otherwise, use another model."


def check_links(folder: Path, name: str) -> None:
    """Check that links in the model ``name`` lead to files of a model: of the same name, safetensors, or in a store by content.

    Raises:
        ModelError: a link leads to another file outside the folder.
    """
    for path in (*folder.iterdir(), *(folder / TEMPLATES).glob("*")):
        if not path.is_symlink() or not any(map(path.match, READ_FILES)):
            continue
        target = Path(os.path.realpath(path))  # unlike resolve, it accepts loops
        same = target.name == path.name or STORED.fullmatch(f"{target.parent.name}/{target.name}")
        weights = path.suffix == target.suffix == ".safetensors"
        if not same and not weights and not target.is_relative_to(folder.resolve()):
            raise ModelError(
                f"{name}: {path.name} is a link to {target}, outside the folder and with another name. An export would publish "
                "that file. If you trust the model, replace the link with a copy of the file."
            )


def check_weights(folder: Path, name: str) -> None:
    """Check that the weights of the model ``name`` are safetensors files in ``folder``.

    Raises:
        ModelError: they are pickled, missing, or files outside the folder.
    """
    file = _read(folder / "config.json").get("transformers_weights")  # transformers prefers this file
    where = "config.json"
    if file is None:
        pickled = [path.name for suffix in PICKLES for path in folder.glob(f"*{suffix}")]
        file = next((file for file in (WEIGHTS, INDEX, *pickled) if (folder / file).is_file()), WEIGHTS)
    parts = [file]
    if isinstance(file, str) and file.endswith(INDEX_SUFFIX) and Path(file).name == file:
        where, shards = file, _read(folder / file).get("weight_map")
        parts = list(shards.values()) if isinstance(shards, dict) else []
    for part in parts:
        if not isinstance(part, str) or Path(part).name != part:
            raise ModelError(
                f"{name}: {where} names the weight file {part!r}, which isn't in the folder. Copy the model again, or use "
                "another one."
            )
        if not part.endswith(".safetensors"):
            raise ModelError(f"{name}: no safetensors weights. {NO_PICKLES} {CONVERT}")


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; none if it is missing or damaged, which transformers reports."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
