"""The folder a run writes to: may it be written, is it free, is there room."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError
from reinforcepp.models import write_json

RUN_FILE = "run.json"
MARKS = (RUN_FILE, "reward_model.json")  # a folder without one of them is none of ours, whatever else is in it
OURS = (
    *MARKS,
    "metrics.jsonl",
    "evaluation.json",
    "checkpoints",
    "policy",
    "reward_model",
    "result.json",
    "comparison.json",
    "comparison.html",
    "runs",
    "training_curve.png",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
# What a resumed run may set otherwise: where it is, how long it goes on, what it saves and how fast it is.
FREE_ON_RESUME = (
    "output_dir",
    "overwrite",
    "resume",
    "max_steps",
    "num_train_epochs",
    "save_every",
    "processes",
    "rollout_batch_size",
    "sync_check_every",
    "vllm_gpu_memory_utilization",
)


def check_output(output_dir: str, *, overwrite: bool, resume: bool = False, needed_bytes: int = 0) -> Path:
    """Check that a run can write to ``output_dir``; changes nothing.

    Raises:
        ConfigError: if the folder holds something already, can't be written, or the disk is too full.
    """
    folder = Path(output_dir).expanduser()
    _check_writable(folder)
    free = shutil.disk_usage(_existing_parent(folder)).free
    if free < needed_bytes:
        raise ConfigError(
            f"{output_dir} is on a disk with {_size(free)} free, but this run writes about {_size(needed_bytes)}: "
            "free some space or give another output_dir."
        )
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if resume:
        if not _has_checkpoint(folder):
            raise ConfigError(f"{output_dir} holds no checkpoint to resume from: start without --resume.")
        return folder
    foreign = [name for name in held if name.removesuffix(".partial") not in OURS and not name.startswith("model-")]
    if not _is_marked(folder):
        foreign = held  # a model from elsewhere, for example, whose files have the names of a saved policy's
    if foreign:
        raise ConfigError(
            f"{output_dir} holds files that no run of this tool wrote ({_some(foreign)}), so nothing is written there: "
            "move them away or give another folder."
        )
    if held and not overwrite:
        cure = (
            "--resume to go on with it, or --overwrite to replace it"
            if _has_checkpoint(folder)
            else "--overwrite to replace it"
        )
        raise ConfigError(f"{output_dir} already holds a run ({_some(held)}): give {cure}, or another folder.")
    return folder


def check_resume(folder: Path, settings: dict[str, Any]) -> None:
    """Check that ``settings`` are those with which the run in ``folder`` was started, as far as they matter.

    Raises:
        ConfigError: if one differs, or the run didn't note them.
    """
    path = folder / RUN_FILE
    try:
        began: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is missing or damaged, so the run can't be resumed: start with --overwrite."
        ) from error
    for name, value in settings.items():
        if name not in FREE_ON_RESUME and name in began and began[name] != value:
            raise ConfigError(
                f"The run in {folder} was started with {name} {began[name]}, not {value}: resume it with the same "
                "settings, or start anew with --overwrite or in another folder."
            )


def clear(folder: Path) -> None:
    """Remove an earlier run's files from a folder that :func:`check_output` has passed for overwriting."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def describe_run(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write ``run.json``: the complete settings and what was found out before the start."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, {"settings": settings, **facts})


def _has_checkpoint(folder: Path) -> bool:
    return any(folder.glob("checkpoints/step-*[0-9]/state.json"))


def _is_marked(folder: Path) -> bool:
    """Whether a run wrote ``folder``, or a part of it, as the demo's runs do."""
    return any(any(folder.glob(place + mark)) for place in ("", "*/") for mark in MARKS)


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _check_writable(folder: Path) -> None:
    parent = _existing_parent(folder)
    if not parent.is_dir():
        raise ConfigError(f"{folder} can't be a folder: {parent} is a file.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder} can't be written: there is no permission to write in {parent}; give another output_dir."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
