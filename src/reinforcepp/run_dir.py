"""The output folder of a run: checks before writing, and the settings stored in the folder."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from reinforcepp.errors import ConfigError, option
from reinforcepp.files import PARTIAL, remove, write_json
from reinforcepp.locks import RUN_LOCK, OutputLock, check_unlocked, folder_lock
from reinforcepp.runtime.redaction import without_secrets

RENAMED_SETTINGS = {"mini_batch_size": "micro_batch_size"}
"""Current names of settings by their old names, which version 0.1.0 stored in ``run.json``."""
REMOVED_SETTINGS = dict.fromkeys(
    ("nodes", "trainers", "network_gbps"),
    "the setting was removed, because reinforcepp plan estimates a single node. For several nodes, run python "
    "benchmarks/forecast.py in a checkout (see docs/scaling.md).",
)
"""Problem and fix for each setting that existed only in earlier versions."""

HANDED_OVER = f"rollout_weights{PARTIAL}"
"""Folder with weights in transfer to a server; exists only during training."""
FAILED_EPISODES = "failed_episodes.jsonl"
"""File with the episodes that an environment broke off."""
EARLIER = "earlier_runs"
"""Folder in an output folder with the runs that were in it before, each in a numbered folder."""
RUN_FILE = "run.json"
FINISHED = "finished"
"""Entry of ``run.json`` that exists when training is finished and the model is saved."""
REWARD_CARD = "reward_model.json"
MARKS = (RUN_FILE, REWARD_CARD)  # A folder without either of these files wasn't written by a run.
OURS = (
    *MARKS,
    "metrics.jsonl",
    "timings.jsonl",
    "events.jsonl",
    FAILED_EPISODES,
    "stacks.txt",
    "evaluation.json",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "test_results.json",
    "trainer_state.json",
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
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors.index.json",
    # Files that tokenizers of transformers save.
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "bpe.codes",
    "dict.txt",
    "byte_maps.json",
    "emoji.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "source.spm",
    "target.spm",
    "target_vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
)
CHOSEN_AT_START = {"learning_rate": None, "mixed_precision": "auto", "rollout_batch_size": None}
"""Settings with a default that depends on the model and the device. A resumed run with the default keeps its first value."""
# A resumed run can change these settings, because they affect only its location, checkpoints and checks.
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
    "use_cpu",
    "processes",
    "sync_check_every",
    "judge",
    "eval_every",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "log_completions",
    "num_completions_to_print",
    "log_unique_prompts",
    "report_to",
    "logging_steps",
    "logging_first_step",
    "run_name",
    "vllm_gpu_memory_utilization",
    "reward_timeout",
    "reward_attempts",
    "reward_batch_size",
)

FREE_JUDGE_OPTIONS = re.compile(
    r"([?&])(?:env|no_verdict|timeout|attempts|concurrency|cache|max_requests|max_dollars|input_price|output_price)=[^&]*(?:&|$)"
)
"""Options of a judge that a resumed run can change, such as a budget that was used up."""


def rename_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that an earlier version stored under their current names."""
    return {RENAMED_SETTINGS.get(name, name): value for name, value in stored.items()}


def check_output(
    output_dir: str,
    *,
    overwrite: bool,
    resume: bool | str = False,
    set_aside: bool = False,
    needed_bytes: int = 0,
) -> Path:
    """Check that a run can write to ``output_dir``, without changing anything, and return its path.

    ``resume`` is the setting: the run resumes from a checkpoint in that folder or, if the folder is free, from the
    checkpoint at the given path. With ``set_aside``, a run in the folder is accepted, because :func:`set_run_aside` will
    move it, and so are other files that no run would replace.

    Raises:
        ConfigError: If the folder already holds files, is being written by another process, can't be written, or the disk is
            too full.
    """
    folder = Path(output_dir).expanduser()
    _check_writable(folder)
    check_unlocked(folder)
    free = shutil.disk_usage(_existing_parent(folder)).free
    if free < needed_bytes:
        raise ConfigError(
            f"output_dir: {output_dir} is on a disk with {format_size(free)} free, but this run writes about "
            f"{format_size(needed_bytes)}. Free some space, lower keep_last if it is above 1, or give another output_dir."
        )
    _check_contents(folder, output_dir, overwrite=overwrite, resume=resume, set_aside=set_aside)
    return folder


def claim_output(
    output_dir: str, *, overwrite: bool, resume: bool | str = False, set_aside: bool = False
) -> OutputLock:
    """Lock a folder that :func:`check_output` has checked, and check it again; return the lock.

    Another run can have written the folder in between, for example while this one was loading its model.

    Raises:
        ConfigError: If the folder holds files of another run by now, or another process is writing it.
    """
    folder = Path(output_dir).expanduser()
    lock = folder_lock(folder).acquire()
    try:
        _check_contents(folder, output_dir, overwrite=overwrite, resume=resume, set_aside=set_aside)
    except ConfigError:
        lock.release()
        raise
    return lock


def _check_contents(folder: Path, output_dir: str, *, overwrite: bool, resume: bool | str, set_aside: bool) -> None:
    names = _contents(folder)
    held = [name for name in names if not (name.endswith(PARTIAL) and name.removesuffix(PARTIAL) in OURS)]
    resumes_folder = isinstance(resume, str) and folder.resolve() in Path(resume).expanduser().resolve().parents
    if resume is True and not (has_checkpoint(folder) or (folder / RUN_FILE).is_file()):
        raise ConfigError(f"resume: {output_dir} holds no checkpoint to resume from. Start without {option('resume')}.")
    if resume is True or resumes_folder:
        return
    foreign = [name for name in held if not _is_ours(name)]
    marked = _is_marked(folder)
    if set_aside and not overwrite and (marked or held == foreign):
        return
    if not marked:
        foreign = held  # For example, a downloaded model has files with the same names as a saved policy.
    if foreign:
        raise ConfigError(
            f"output_dir: {output_dir} holds files that reinforcepp didn't write ({_some(foreign)}). Move them away or give "
            "another folder."
        )
    if held and not overwrite:
        resuming = f"{option('resume')} to continue it, or " if has_checkpoint(folder) else ""
        raise ConfigError(
            f"output_dir: {output_dir} already holds a run ({_some(held)}). Add {resuming}{option('overwrite')} to replace it, "
            "or give another folder."
        )


def _without_free_options(value: Any) -> Any:
    """Return a setting without the options of judges that can change."""
    if isinstance(value, list):
        return [_without_free_options(each) for each in value]
    if not isinstance(value, str) or not re.match(r"[^:?]*judge:", value):
        return value
    while (shorter := FREE_JUDGE_OPTIONS.sub(r"\1", value)) != value:
        value = shorter
    return value.rstrip("?&")


def _contents(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without the lock and earlier runs."""
    return sorted(p.name for p in folder.iterdir() if p.name not in (RUN_LOCK, EARLIER)) if folder.is_dir() else []


def _is_ours(name: str) -> bool:
    """Return whether a run writes a file or folder with this name."""
    return name in OURS or name.startswith(("model-", "stacks-"))


def noted_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in ``folder`` at its start.

    Raises:
        ConfigError: If ``run.json`` is missing or damaged.
    """
    path = folder / RUN_FILE
    try:
        return rename_settings(json.loads(path.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: the file is missing or damaged, so the run can't be resumed. Start a new run with {option('overwrite')}."
        ) from error


def check_unchanged(began: Mapping[str, Any], now: Mapping[str, Any], allowed: Collection[str] = ()) -> None:
    """Check that a resumed run has the same settings as at its start, if they affect its results.

    Raises:
        ConfigError: If settings that aren't in ``allowed`` differ; the message names all of them.
    """
    changed = {name: change for name, change in changed_settings(began, now).items() if name not in allowed}
    if changed:
        raise ConfigError(
            f"resume: the run was started with other settings ({'; '.join(changed.values())}). Restore them, allow the changes "
            f"with {option('allow_changes', ','.join(changed))}, or start a new run in another folder or with "
            f"{option('overwrite')}."
        )


def changed_settings(began: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return a description of each changed setting that affects the results of a run, by its name."""
    # Stored settings come from JSON, which has no tuples, so both go through JSON before the comparison. Files of earlier
    # versions hold secrets. Without them, a run also resumes after its server's token was replaced.
    began, now = (without_secrets(json.loads(json.dumps(rename_settings(settings)))) for settings in (began, now))
    return {
        name: f"{name} was {began[name]} and is {value}"
        for name, value in now.items()
        if name in began
        and _without_free_options(began[name]) != _without_free_options(value)
        and name not in FREE_ON_RESUME
        and not (name in CHOSEN_AT_START and value == CHOSEN_AT_START[name])
    }


def clear(folder: Path) -> None:
    """Remove the run from ``folder``, after :func:`check_output` has confirmed that a run wrote its files.

    The lock and earlier runs stay.
    """
    for path in map(folder.joinpath, _contents(folder)):
        remove(path)


def set_run_aside(folder: Path) -> Path | None:
    """Move the files of a run in ``folder`` to ``earlier_runs/NUMBER`` in it, and return that folder; None without a run.

    Other files stay. If the process is killed in between, the next call moves the rest to the same place.
    """
    names = [name for name in _contents(folder) if _is_ours(name.removesuffix(PARTIAL))]
    parent = folder / EARLIER
    begun = next(parent.glob(f"*{PARTIAL}"), None)
    if begun is not None and any((begun / name).exists() for name in names):  # by now, the files of another run
        begun.rename(parent / begun.name.removesuffix(PARTIAL))
        begun = None
    if not names and begun is None:
        return None
    numbers = [int(path.name) for path in parent.glob("*") if path.name.isdecimal()]
    target = parent / str(max(numbers, default=0) + 1)
    moving = begun or target.with_name(target.name + PARTIAL)
    moving.mkdir(parents=True, exist_ok=True)
    for name in sorted(
        names, key=lambda name: name in MARKS
    ):  # The marks go last, because they show that a run wrote the rest.
        (folder / name).rename(moving / name)
    return moving.rename(moving.with_name(moving.name.removesuffix(PARTIAL)))


def describe_run(folder: Path, settings: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write ``run.json`` with the settings and the ``facts`` known before the start, without secrets."""
    day = _run_date(settings.get("output_dir"), settings.get("resume", False)).isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, without_secrets({"settings": settings, "date": day, **facts}))


def write_finished(folder: Path, finished: Mapping[str, Any] | None) -> None:
    """Record in ``run.json`` that training is finished or, with None, that it continues; the other entries stay."""
    entries = _run_entries(folder)
    if finished is None and FINISHED not in entries:
        return
    entries.pop(FINISHED, None)
    write_json(folder / RUN_FILE, entries if finished is None else {**entries, FINISHED: finished})


def read_finished(folder: Path) -> dict[str, Any] | None:
    """Return what :func:`write_finished` has recorded; None if the training isn't finished."""
    finished = _run_entries(folder).get(FINISHED)
    return finished if isinstance(finished, dict) else None


def _run_entries(folder: Path) -> dict[str, Any]:
    """Return the contents of ``run.json``; empty if the file is missing or damaged."""
    try:
        return dict(json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def run_date(settings: Any) -> date:
    """Return the day on which the run of ``settings`` started first: chat templates with a date show this one."""
    return _run_date(getattr(settings, "output_dir", None), getattr(settings, "resume", False))


@cache
def today() -> date:
    """Return the date at the first call, so that a run that passes midnight keeps its date."""
    return date.today()


def unfinished_settings(output_dir: str) -> dict[str, Any] | None:
    """Return the settings of the run in ``output_dir`` if it can be resumed."""
    folder = Path(output_dir).expanduser()
    began = _run_entries(folder).get("settings") if has_checkpoint(folder) else None
    return began if isinstance(began, dict) else None


def began_without(settings: Any, name: str) -> bool:
    """Return whether ``settings`` resume a run of an earlier version, which didn't have the setting ``name``."""
    run = _resumed_run(getattr(settings, "output_dir", None), getattr(settings, "resume", False))
    began = _run_entries(run).get("settings") if run is not None else None
    return isinstance(began, dict) and name not in began


def _resumed_run(output_dir: str | None, resume: bool | str) -> Path | None:
    if not resume or output_dir is None:
        return None
    return Path(resume).expanduser().parent.parent if isinstance(resume, str) else Path(output_dir).expanduser()


def _run_date(output_dir: str | None, resume: bool | str) -> date:
    run = _resumed_run(output_dir, resume)
    if run is None:
        return today()
    try:
        return date.fromisoformat(_run_entries(run)["date"])
    except (ValueError, KeyError, TypeError):  # a run that an earlier version began
        return today()


def has_checkpoint(folder: Path) -> bool:
    """Return whether a run has saved a checkpoint."""
    return any(folder.glob("checkpoints/step-*[0-9]/state.json"))


def _is_marked(folder: Path) -> bool:
    """Return whether a run wrote ``folder`` or, as in a demo, a folder in it."""
    return any(any(folder.glob(prefix + mark)) for prefix in ("", "*/") for mark in MARKS)


def _existing_parent(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _check_writable(folder: Path) -> None:
    parent = _existing_parent(folder)
    if not parent.is_dir():
        raise ConfigError(
            f"output_dir: {folder} can't be a folder, because {parent} is a file. Give another output_dir."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(
            f"output_dir: {folder} can't be written, because you have no permission to write in {parent}. Give another "
            "output_dir."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def format_size(count: float) -> str:
    """Return a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
