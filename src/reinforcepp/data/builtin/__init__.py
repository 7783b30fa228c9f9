"""The built-in model and data, for training and evaluation offline on a laptop.

``builtin:tiny`` is a causal language model with two million parameters. It was trained on sixty network-troubleshooting
facts and answers about half of the questions well. ``builtin:network`` is a dataset of preference pairs on the same facts.
``corpus`` holds the texts and the split, ``judge`` an independent score of answer quality; both read ``facts.yaml``.
``scripts/make_builtin.py`` writes the model and the data files. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

MODEL_NAME = "builtin:tiny"
DATA_NAME = "builtin:network"
JUDGE_NAME = "builtin:judge"

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    """Return the folder of the built-in model, in the layout that ``from_pretrained`` reads."""
    return _FOLDER / "tiny"


def data_paths() -> tuple[Path, Path]:
    """Return the training and the held-out preference files, with columns ``prompt,chosen,rejected,topic``."""
    return _FOLDER / "network_train.csv", _FOLDER / "network_heldout.csv"
