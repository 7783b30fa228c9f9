"""The folder of a run: whether it can be written, is free and has enough disk space, and the settings stored there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError
from reinforcepp.files import PARTIAL, write_json

RENAMED_SETTINGS = {"mini_batch_size": "micro_batch_size"}
"""Settings by their old names, with the current ones; runs of 0.1.0 are stored under the old names."""
REMOVED_SETTINGS = dict.fromkeys(
    ("nodes", "trainers", "network_gbps"),
    "reinforcepp plan estimates one node. For several, run python benchmarks/forecast.py in a checkout: docs/scaling.md.",
)
"""Settings of earlier versions, with what replaces them."""

HANDED_OVER = f"rollout_weights{PARTIAL}"
"""Weights in transfer to a server; exists only while a training runs."""
RUN_FILE = "run.json"
REWARD_CARD = "reward_model.json"
MARKS = (RUN_FILE, REWARD_CARD)  # Only a folder with one of these was written by a run.
OURS = (
    *MARKS,
    "metrics.jsonl",
    "timings.jsonl",
    "events.jsonl",
    "stacks.txt",
    "evaluation.json",
    "completions",
    "evaluations",
    "trackers",
    "heldout.parquet",
    "report.html",
    "checkpoints",
    "model.partial",
    HANDED_OVER.removesuffix(PARTIAL),
    "policy",
    "reward_model",
    "result.json",
    "comparison.json",
    "comparison.html",
    "compare.json",
    "compare.html",
    "answers.jsonl",
    "runs",
    "training_curve.png",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
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
# A resumed run can change these settings, because they affect only its place, its checkpoints and its checks.
FREE_ON_RESUME = (
    "output_dir",
    "overwrite",
    "resume",
    "dry_run",
    "allow_changes",
    "save_every",
    "keep_last",
    "keep_best",
    "watchdog_seconds",
    "processes",
    "sync_check_every",
    "judge",
    "log_completions",
    "report_to",
    "vllm_gpu_memory_utilization",
    "reward_timeout",
    "reward_attempts",
    "reward_batch_size",
)


def rename_settings(settings: Mapping[str, Any], known: Collection[str] | None = None) -> dict[str, Any]:
    """Return ``settings`` under their current names, whether a user gave them or an earlier version stored them.

    Args:
        settings: Values by the names of settings.
        known: The settings that exist where these values go; by default every current name does.

    Raises:
        ConfigError: If a setting has a value under its old and its current name, or was removed.
    """
    for name, reason in REMOVED_SETTINGS.items():
        if name in settings and (known is None or name not in known):
            raise ConfigError(f"{name}: {reason}")
    current = dict(settings)
    for old, new in RENAMED_SETTINGS.items():
        if old not in current or (known is not None and new not in known):
            continue
        value = current.pop(old)
        if value is not None and current.get(new) is not None:
            raise ConfigError(f"{old} and {new}: both are given, but {old} is the old name of {new}. Remove {old}.")
        if current.get(new) is None:
            current[new] = value
    return current


def check_output(output_dir: str, *, overwrite: bool, resume: bool | str = False, needed_bytes: int = 0) -> Path:
    """Check that a run can write to ``output_dir``, and return its path. Changes nothing.

    ``resume`` is the setting: the run resumes from a checkpoint in that folder or, if the folder is free, from the
    checkpoint at the given path.

    Raises:
        ConfigError: If the folder already holds files, can't be written, or the disk is too full.
    """
    folder = Path(output_dir).expanduser()
    _check_writable(folder)
    free = shutil.disk_usage(_existing_parent(folder)).free
    if free < needed_bytes:
        raise ConfigError(
            f"{output_dir} is on a disk with {_size(free)} free, but this run writes about {_size(needed_bytes)}: "
            "free some space or give another output_dir."
        )
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    held = [name for name in names if not (name.endswith(PARTIAL) and name.removesuffix(PARTIAL) in OURS)]
    own = isinstance(resume, str) and folder.resolve() in Path(resume).expanduser().resolve().parents
    if resume is True and not (has_checkpoint(folder) or (folder / RUN_FILE).is_file()):
        raise ConfigError(f"{output_dir} holds no checkpoint to resume from: start without --resume.")
    if resume is True or own:
        return folder
    foreign = [name for name in held if name not in OURS and not name.startswith(("model-", "stacks-"))]
    if not _is_marked(folder):
        foreign = held  # For example a downloaded model, whose files have the same names as a saved policy.
    if foreign:
        raise ConfigError(
            f"{output_dir} holds files that no run of this tool wrote ({_some(foreign)}), so nothing is written there: "
            "move them away or give another folder."
        )
    if held and not overwrite:
        cure = (
            "--resume to go on with it, or --overwrite to replace it"
            if has_checkpoint(folder)
            else "--overwrite to replace it"
        )
        raise ConfigError(f"{output_dir} already holds a run ({_some(held)}): give {cure}, or another folder.")
    return folder


def noted_settings(folder: Path) -> dict[str, Any]:
    """Return the settings with which the run in ``folder`` was started.

    Raises:
        ConfigError: If ``run.json`` is missing or damaged.
    """
    path = folder / RUN_FILE
    try:
        return rename_settings(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is missing or damaged, so the run can't be resumed: start with --overwrite."
        ) from error


def check_unchanged(began: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Check that a resumed run has the settings with which it was started, as far as they affect its results.

    Raises:
        ConfigError: If a setting differs that isn't in ``allowed``; names all of them.
    """
    # One of the two was read from a file, where a tuple is a list.
    began, now = (json.loads(json.dumps(rename_settings(settings))) for settings in (began, now))
    changed = {
        name: f"{name} was {began[name]} and is {value}"
        for name, value in now.items()
        if name in began
        and _as_noted(began[name]) != _as_noted(value)
        and name not in FREE_ON_RESUME
        and name not in allowed
    }
    if changed:
        raise ConfigError(
            f"The run was started with other settings ({'; '.join(changed.values())}): resume it with the same ones, name "
            f"those that you mean to change (--allow_changes {','.join(changed)}), or start anew in another folder or with "
            "--overwrite."
        )


def _as_noted(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # JSON has no tuples


def clear(folder: Path) -> None:
    """Remove an earlier run's files from a folder that :func:`check_output` has passed for overwriting."""
    for path in folder.iterdir() if folder.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def describe_run(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write ``run.json``: the settings, and the facts known before the start."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, {"settings": settings, **facts})


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has saved a checkpoint."""
    return any(folder.glob("checkpoints/step-*[0-9]/state.json"))


def _is_marked(folder: Path) -> bool:
    """Return whether a run wrote ``folder`` or a folder in it, as the demo does."""
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
