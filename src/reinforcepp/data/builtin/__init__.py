"""The built-in model and data, with which the whole job runs offline on a laptop.

``builtin:tiny`` is a causal language model of two million parameters that knows sixty network-troubleshooting facts
and answers about half of the time well. ``builtin:network`` is a set of preference pairs over the same facts.
``corpus`` holds the texts and the split, ``judge`` the independent measure of how good an answer is; both are made
from ``facts.yaml``. ``scripts/make_builtin.py`` writes the model and the data files. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "builtin:tiny"
DATA_NAME = "builtin:network"
JUDGE_NAME = "builtin:judge"

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    """Folder of the built-in model, in the layout that ``from_pretrained`` reads."""
    return _FOLDER / "tiny"


def data_paths() -> tuple[Path, Path]:
    """The training and the held-out preference files, with columns ``prompt,chosen,rejected,topic``."""
    return _FOLDER / "network_train.csv", _FOLDER / "network_heldout.csv"
