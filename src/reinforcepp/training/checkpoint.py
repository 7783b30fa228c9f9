"""Checkpoints of a run: whole or absent, without pickle, with all that decides what the run does next.

A checkpoint of a policy is itself a model folder, so ``generate --model RUN/checkpoints/step-000050`` works.

    config.json, model.safetensors, tokenizer...   the policy
    policy_optimizer.safetensors                   AdamW's moments, and float32 masters where it computes in bfloat16;
                                                   a folder with a file of each process where they are sharded
    critic.safetensors, critic_optimizer...        only ppo
    rollout.safetensors, rollout.json              a rollout batch that has been used for some of its optimiser steps
    state.json                                     position, settings, schedule, random generators, counters, versions
    metrics.jsonl, timings.jsonl                   the log up to here
    manifest.json                                  size and SHA-256 of each of these
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reinforcepp.config import Keeping, as_dict
from reinforcepp.errors import ConfigError, ModelError, nearest
from reinforcepp.files import DISK_FULL, PARTIAL, damage, disk_errors, whole_folder, write_json
from reinforcepp.monitoring import LOGS, echo
from reinforcepp.run_dir import check_unchanged
from reinforcepp.runtime import versions_of

if TYPE_CHECKING:  # who exports a model needs none of these, and they load what takes a second
    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.distributed.shards import Template
    from reinforcepp.training.learner import Learner

FOLDER = "checkpoints"
STATE = "state.json"
NAME = re.compile(r"step-(\d{6,})(?:\+(\d+))?")
LIBRARIES = ("reinforcepp", "torch", "transformers", "trl", "accelerate", "safetensors", "numpy")

Tensors = dict[str, torch.Tensor]
Learnt = tuple[Tensors, dict[str, Any], dict[str, Any]]
"""State dicts of a model, its optimiser and its schedule."""


@dataclass(frozen=True)
class Checkpoint:
    """One that is whole."""

    folder: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """Contents of state.json."""
        return dict(json.loads((self.folder / STATE).read_text(encoding="utf-8")))

    @property
    def step(self) -> int:
        """Finished training steps."""
        return place_of(self.folder)[0]

    def tensors(self, name: str, like: Template = lambda name, shape: None) -> Tensors:
        """Contents of NAME.safetensors or of the folder NAME with what several processes wrote, cut as ``like`` says.

        Raises:
            ModelError: if it is something else.
        """
        from reinforcepp.distributed.shards import read_shards

        parts = self.folder / name
        path = parts if parts.is_dir() else self.folder / f"{name}.safetensors"
        try:
            return read_shards(parts, like) if path is parts else load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{path} can't be read as safetensors ({error}): resume from another checkpoint."
            ) from error


def name_of(step: int, updates: int = 0) -> str:
    """Name of the folder after ``step`` steps and, of the step that follows, ``updates`` optimiser steps."""
    return f"step-{step:06d}" + (f"+{updates}" if updates else "")


def place_of(folder: Path) -> tuple[int, int]:
    """Finished steps and optimiser steps, from the folder's name; (-1, 0) for what is no checkpoint."""
    match = NAME.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def listed(run: Path) -> list[Path]:
    """All folders of a run that bear a checkpoint's name, the oldest first."""
    return sorted((p for p in (run / FOLDER).glob("step-*") if place_of(p)[0] >= 0), key=place_of)


def newest(run: Path) -> Checkpoint | None:
    """The last whole checkpoint of a run; damaged ones are named and passed over."""
    for folder in reversed(listed(run)):
        if (damaged := damage(folder)) is None:
            return Checkpoint(folder)
        echo(f"The checkpoint {folder} is damaged ({damaged}); the one before it is used.", "yellow")
    return None


def chosen(run: Path, config: Keeping) -> Checkpoint | None:
    """The checkpoint that the setting ``resume`` means; None to begin at the beginning.

    Raises:
        ModelError: if there is one, but none that is whole.
        ConfigError: if its run had other settings than ``config``, which doesn't name them as meant.
    """
    resume = config.resume
    if not resume:
        return None
    found = given(resume) if isinstance(resume, str) else newest(run)
    if found is None and listed(run):
        raise ModelError(f"All checkpoints in {run / FOLDER} are damaged: start again with --overwrite.")
    if found is None:
        echo("The run was stopped before its first checkpoint: it begins again.", "yellow")
        return None
    now = _versions()
    other = [
        f"{name} {was}, now {now.get(name)}" for name, was in found.state["versions"].items() if now.get(name) != was
    ]
    if other:
        echo(
            f"The run was stopped with other libraries ({'; '.join(other)}), so it may go on a little differently.",
            "yellow",
        )
    check_unchanged(found.state["settings"], as_dict(config), config.allowed_changes)
    return found


def given(path: str) -> Checkpoint:
    """The checkpoint in a folder that the user names.

    Raises:
        ModelError: if it is none, or damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / STATE).is_file():
        raise ModelError(f"{path} is not a checkpoint: give a folder like RUN/{FOLDER}/{name_of(50)}.")
    if (damaged := damage(folder)) is not None:
        raise ModelError(f"The checkpoint {path} is damaged ({damaged}): give an earlier one.")
    return Checkpoint(folder)


def better(best: dict[str, Any], metric: str | None, metrics: Mapping[str, float], name: str) -> dict[str, Any]:
    """Return the better of the best checkpoint so far and the new one called ``name``, by the metric of keep_best.

    Raises:
        ConfigError: the run doesn't measure that metric.
    """
    if metric is None:
        return best
    sign, key = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    if key not in metrics:
        if metrics.get("skipped_updates"):
            return best
        raise ConfigError(f"keep_best names {key!r}, which is not among the metrics.{nearest(key, metrics)}")
    value = metrics[key]
    if best and sign * best["value"] >= sign * value:
        return best
    return {"metric": metric, "value": value, "checkpoint": name}


def save(
    run: Path,
    place: tuple[int, int],
    state: Mapping[str, Any],
    fill: Callable[[Path], None],
    *,
    keep_last: int,
    keep: str | None = None,
) -> bool:
    """Write a checkpoint and drop those that need not be kept; where the disk is full, say so and go on without it.

    Args:
        run: the run's folder.
        place: finished steps, and optimiser steps of the one that follows.
        state: what goes into state.json.
        fill: writes all other files into the folder that it is given.
        keep_last: number of checkpoints to keep.
        keep: name of one to keep in any case, the best.

    Returns:
        Whether it was written.
    """
    final = run / FOLDER / name_of(*place)
    try:
        with whole_folder(final) as folder, disk_errors():
            fill(folder)
            for name in LOGS:
                if (run / name).is_file():
                    shutil.copyfile(run / name, folder / name)
            write_json(folder / STATE, {**state, "versions": _versions()})
    except OSError as error:
        tell_full_disk(error, run, place[0])
        return False
    _prune(run, place, keep_last, keep)
    return True


def tell_full_disk(error: OSError, run: Path, step: int) -> None:
    """Say that a checkpoint could not be saved, and that the run goes on; any other error is raised again."""
    if error.errno not in DISK_FULL:
        raise error
    before = listed(run)
    rest = f"{before[-1].name} is the last" if before else "there is none before it"
    echo(
        f"The checkpoint after step {step} could not be saved: {error.strerror}. {rest}; training goes on. "
        "Free some space, or lower keep_last.",
        "yellow",
    )


def write_parts(run: Path, learnt: Mapping[str, Learnt], ranks: Ranks) -> None:
    """Have every rank write its parts of sharded optimisers, for :func:`fill_with` to find; every rank has to call it.

    Raises:
        OSError: on all ranks, if one of them can't write.
    """
    from reinforcepp.distributed.shards import write_shards

    for name, (_, optimizer, _) in learnt.items():
        folder = _parts(run / FOLDER, name)
        if ranks.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        ranks.barrier()
        write_shards(_flat(optimizer), folder)


def fill_with(learnt: Mapping[str, Learnt], folder: Path) -> dict[str, Any]:
    """Write the tensors of the learners' states, or take what :func:`write_parts` wrote; returns what belongs into the state.

    The policy's weights are left out: they are saved as a model folder.
    """
    state: dict[str, Any] = {}
    for name, (model, optimizer, scheduler) in learnt.items():
        if name != "policy":
            save_file({k: v.detach().cpu().clone() for k, v in model.items()}, folder / f"{name}.safetensors")
        if (parts := _parts(folder.parent, name)).is_dir():
            parts.rename(folder / f"{name}_optimizer")
            groups = optimizer["param_groups"]
        else:
            groups = save_optimizer(optimizer, name, folder)
        state[name] = {"optimizer_groups": groups, "scheduler": scheduler}
    return state


def load_into(learners: Mapping[str, Learner], checkpoint: Checkpoint, policy: Tensors) -> None:
    """Bring learners where they were; ``policy`` holds its weights, as loaded from the checkpoint's model folder."""
    for name, learner in learners.items():
        state = checkpoint.state["learners"][name]
        optimizer = load_optimizer(checkpoint, name, state["optimizer_groups"], learner.cut)
        learner.load_state(policy if name == "policy" else checkpoint.tensors(name), optimizer, state["scheduler"])


def save_optimizer(state: Mapping[str, Any], name: str, folder: Path) -> list[dict[str, Any]]:
    """Write an optimiser's tensors as ``index/name``; returns its groups, which are plain values."""
    tensors = {name: value.detach().cpu().clone() for name, value in _flat(state).items()}
    save_file(tensors, folder / f"{name}_optimizer.safetensors")
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def load_optimizer(
    checkpoint: Checkpoint,
    name: str,
    groups: list[dict[str, Any]],
    cut: Callable[[int, torch.Size], torch.Tensor | None] = lambda index, shape: None,
) -> dict[str, Any]:
    """The state that :func:`save_optimizer` or :func:`write_parts` wrote; ``cut`` says like what parts of it are cut."""
    state: dict[int, Tensors] = {}
    found = checkpoint.tensors(f"{name}_optimizer", lambda key, shape: cut(int(key.partition("/")[0]), shape))
    for key, value in found.items():
        index, _, field = key.partition("/")
        state.setdefault(int(index), {})[field] = value
    return {"state": state, "param_groups": groups}


def _flat(optimizer: Mapping[str, Any]) -> Tensors:
    """An optimiser's tensors, by the index of their parameter and their name."""
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, values in optimizer["state"].items()
        for key, value in values.items()
    }


def _parts(checkpoints: Path, name: str) -> Path:
    """Where the ranks write their parts until the checkpoint takes them; whatever is left there is dropped in time."""
    return checkpoints / f"{name}_optimizer{PARTIAL}"


def described(config: Keeping, inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a checkpoint says of the run: its settings, one short word for all of them, and what it starts from."""
    settings = as_dict(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {"settings": settings, "settings_hash": digest, "inputs": dict(inputs)}


def _versions() -> dict[str, str]:
    return versions_of(LIBRARIES)


def _prune(run: Path, place: tuple[int, int], keep_last: int, keep: str | None) -> None:
    """Drop older checkpoints, later ones of a future that was given up, and what a crash left half written."""
    kept = [folder for folder in listed(run) if place_of(folder) <= place][-keep_last:]
    for folder in (run / FOLDER).iterdir():
        if folder not in kept and folder.name != keep:
            shutil.rmtree(_out_of_the_way(folder))


def _out_of_the_way(folder: Path) -> Path:
    """Under another name, so that a folder half removed isn't taken for a checkpoint."""
    if folder.name.endswith(PARTIAL):
        return folder
    target = folder.with_name(folder.name + ".dropped" + PARTIAL)
    shutil.rmtree(target, ignore_errors=True)
    return folder.rename(target)
