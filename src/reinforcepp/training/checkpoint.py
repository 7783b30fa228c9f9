"""Checkpoints of a run: complete or absent, without pickle, with everything that decides how the run continues.

A checkpoint of a policy is itself a model folder, so ``generate --model RUN/checkpoints/step-000050`` works.

    config.json, model.safetensors, tokenizer...   the policy
    policy_optimizer.safetensors                   AdamW's moments, and float32 master weights if training in bfloat16;
                                                   a folder with one file per rank if they are sharded
    critic.safetensors, critic_optimizer...        only ppo
    reference.safetensors                          only with sync_ref_model: the reference policy's weights
    rollout.safetensors, rollout.json              the batch of an unfinished step
    ahead.json                                     only with staleness: completions of later steps
    state.json                                     position, settings, schedule, random generators, counters, versions
    metrics.jsonl, timings.jsonl                   the log up to here
    manifest.json                                  size and SHA-256 of each of these files
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reinforcepp.config import CheckpointConfig, as_dict
from reinforcepp.errors import ConfigError, ModelError, nearest, option
from reinforcepp.files import DISK_FULL, PARTIAL, damage, disk_errors, free_partial, remove, whole_folder, write_json
from reinforcepp.monitoring import LOGS
from reinforcepp.run_dir import changed_settings, check_unchanged, claim_output, read_finished, write_finished
from reinforcepp.runtime.process import is_main, versions_of
from reinforcepp.runtime.terminal import echo

if TYPE_CHECKING:  # these load Accelerate, which takes a second and isn't needed to export a model
    from reinforcepp.distributed.ranks import Ranks
    from reinforcepp.distributed.shards import Template
    from reinforcepp.training.learner import Learner

FOLDER = "checkpoints"
STATE = "state.json"
EVALUATION_PREFIX = "eval_"
REFERENCE = "reference"
NAME = re.compile(r"step-(\d{6,})(?:\+(\d+))?")
NEEDED = (STATE, "*model*.safetensors")
"""Files without which a checkpoint is damaged, as patterns: its state, and a policy or reward model or an adapter."""
LIBRARIES = ("reinforcepp", "torch", "transformers", "trl", "accelerate", "safetensors", "numpy")

Tensors = dict[str, torch.Tensor]
LearnerState = tuple[Tensors, dict[str, Any], dict[str, Any]]
"""State dicts of a model, its optimizer and its learning rate schedule."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    folder: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """Contents of state.json."""
        return dict(json.loads((self.folder / STATE).read_text(encoding="utf-8")))

    @property
    def step(self) -> int:
        """Finished training steps."""
        return position_of(self.folder)[0]

    def tensors(self, name: str, like: Template = lambda name, shape: None) -> Tensors:
        """Return the tensors of NAME.safetensors, or of the folder NAME with the files of all ranks.

        ``like`` returns the sharded tensor whose layout a tensor gets, or None for a whole tensor.

        Raises:
            ModelError: the file isn't a safetensors file.
        """
        from reinforcepp.distributed.shards import read_shards

        parts = self.folder / name
        path = parts if parts.is_dir() else self.folder / f"{name}.safetensors"
        try:
            return read_shards(parts, like) if path is parts else load_file(path)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{path}: can't be read as safetensors ({error}). Resume from another checkpoint."
            ) from error


@dataclass(frozen=True)
class FinishedRun:
    """A run that is finished and has no checkpoints; its model is saved in ``folder``."""

    folder: Path
    state: dict[str, Any]
    """Number of steps, and settings and inputs of the training, as in a checkpoint."""

    @property
    def step(self) -> int:
        """Finished training steps."""
        return int(self.state["steps"])

    def check_same(self, kind: str, now: Mapping[str, Any]) -> None:
        """Check that the ``kind`` of values, settings or inputs, is the same ``now``.

        Raises:
            ConfigError: some differ; the message names all of them.
        """
        if changed := changed_settings(self.state[kind], now):
            raise ConfigError(
                f"resume: {self.reason}, so it can't continue with other settings ({'; '.join(changed.values())}). "
                f"{self.fix}"
            )

    @property
    def reason(self) -> str:
        """Reason why the run can't continue."""
        deleted = self.state["checkpoints_deleted"] and not self._too_short
        no_checkpoint = "its checkpoints were deleted" if deleted else "it has no checkpoint"
        return f"the run in {self.folder} finished after {self.step} steps and {no_checkpoint}"

    @property
    def fix(self) -> str:
        """Advice on how to train more."""
        keep = option("keep_last", 1)
        if self._too_short:
            keep = f"{option('save_every', self.step)} and {keep}"
        return (
            f"Start a new run from its model ({option('model', str(self.folder))} and another output_dir). To keep the latest "
            f"checkpoint next time, add {keep}."
        )

    @property
    def _too_short(self) -> bool:
        """Whether the run ended before its first checkpoint."""
        every = self.state["settings"].get("save_every")
        return not every or every > self.step

    def close(self, config: CheckpointConfig, inputs: Mapping[str, str]) -> None:
        """Print that there is nothing to train; delete checkpoints that a killed process left behind.

        Raises:
            ConfigError: ``inputs`` have changed.
        """
        self.check_same("inputs", inputs)
        if is_main() and self.state["checkpoints_deleted"] and (self.folder / FOLDER).exists():
            with claim_output(config.output_dir, overwrite=False, resume=True):
                delete_all(self.folder)
        echo(f"Nothing to train: {self.reason}. {self.fix}")


def name_of(step: int, updates: int = 0) -> str:
    """Return the folder name after ``step`` finished steps and ``updates`` optimizer steps of the next one."""
    return f"step-{step:06d}" + (f"+{updates}" if updates else "")


def position_of(folder: Path) -> tuple[int, int]:
    """Return finished steps and optimizer steps from a folder's name; (-1, 0) if it isn't a checkpoint's name."""
    match = NAME.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def list_checkpoints(run: Path) -> list[Path]:
    """Return all folders of a run that have a checkpoint's name, the oldest first."""
    return sorted((p for p in (run / FOLDER).glob("step-*") if position_of(p)[0] >= 0), key=position_of)


def latest(run: Path) -> Checkpoint | None:
    """Return the last complete checkpoint of a run; print and skip damaged ones."""
    for folder in reversed(list_checkpoints(run)):
        if (damaged := damage(folder, *NEEDED)) is None:
            return Checkpoint(folder)
        echo(f"Checkpoint {folder} is damaged ({damaged}); using the one before it.", "yellow")
    return None


def checkpoint_to_resume(
    run: Path, config: CheckpointConfig, resume: bool | str | None = None, allowed: Collection[str] = ()
) -> Checkpoint | FinishedRun | None:
    """Return the checkpoint that ``resume`` names, or the finished run; None to start from the beginning.

    Args:
        run: the run directory.
        config: the settings.
        resume: overrides the setting.
        allowed: settings that can change in addition to those in allow_changes.

    Raises:
        ModelError: the run has checkpoints, but all are damaged.
        ConfigError: the run had other settings than ``config``, and allow_changes doesn't name them.
    """
    resume = config.resume if resume is None else resume
    if not resume:
        return None
    if resume is True and (finished := finished_run(run)) is not None:
        finished.check_same("settings", as_dict(config))
        return finished
    found = open_checkpoint(resume) if isinstance(resume, str) else latest(run)
    if found is None and list_checkpoints(run):
        raise ModelError(f"{run / FOLDER}: all checkpoints are damaged. Start over with {option('overwrite')}.")
    if found is None:
        echo("The run stopped before its first checkpoint; it starts over.", "yellow")
        return None
    now = _versions()
    other = [
        f"{name} {was}, now {now.get(name)}" for name, was in found.state["versions"].items() if now.get(name) != was
    ]
    if other:
        echo(
            f"The checkpoint was written with other versions ({'; '.join(other)}); results can differ slightly.",
            "yellow",
        )
    now_set = as_dict(config)
    check_unchanged(found.state["settings"], now_set, [*config.allowed_changes, *allowed])
    for name, change in changed_settings(found.state["settings"], now_set).items():
        if name in allowed:
            echo(
                f"Resuming with another number of steps: {change}. The learning rate schedule is that of the new number."
            )
    return found


def finished_run(run: Path) -> FinishedRun | None:
    """Return a finished run whose checkpoints are deleted, or will be; None if the run can be resumed."""
    finished = read_finished(run)
    if finished is None or (list_checkpoints(run) and not finished["checkpoints_deleted"]):
        return None
    return FinishedRun(run, finished)


def check_inputs(resumed: Checkpoint | FinishedRun | None, inputs: Mapping[str, str], allowed: Collection[str]) -> None:
    """Check the fingerprints of the inputs of a resumed run.

    Raises:
        ConfigError: inputs have changed, and ``allowed`` doesn't name them.
    """
    if isinstance(resumed, FinishedRun):
        resumed.check_same("inputs", inputs)
    elif resumed is not None:
        check_unchanged(resumed.state["inputs"], inputs, allowed)


def open_checkpoint(path: str) -> Checkpoint:
    """Return the checkpoint in the folder ``path``.

    Raises:
        ModelError: the folder isn't a checkpoint, or the checkpoint is damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / STATE).is_file():
        if folder.parent.name == FOLDER and (finished := finished_run(folder.parent.parent)) is not None:
            raise ModelError(f"resume {path}: {finished.reason}. {finished.fix}")
        raise ModelError(f"resume {path}: not a checkpoint. Give a folder such as RUN/{FOLDER}/{name_of(50)}.")
    if (damaged := damage(folder, *NEEDED)) is not None:
        raise ModelError(f"resume {path}: the checkpoint is damaged ({damaged}). Give an earlier one.")
    return Checkpoint(folder)


def check_metric(keep_best: str | None, metrics: Mapping[str, float]) -> None:
    """Check after each step that the metric of ``keep_best`` exists, because the first checkpoint can be many steps away.

    Raises:
        ConfigError: the run doesn't measure that metric.
    """
    key = (keep_best or "").removeprefix("-")
    if key and not key.startswith(EVALUATION_PREFIX) and key not in metrics and not metrics.get("skipped_updates"):
        raise ConfigError(f"keep_best: metric {key!r} not found.{nearest(key, metrics)}")


def check_evaluation_metric(keep_best: str | None, metrics: Mapping[str, float]) -> None:
    """Check after an evaluation that it has the metric of ``keep_best``, if that is one of evaluations.

    Raises:
        ConfigError: it hasn't.
    """
    key = (keep_best or "").removeprefix("-")
    if key.startswith(EVALUATION_PREFIX) and key not in metrics:
        raise ConfigError(f"keep_best: metric {key!r} not found.{nearest(key, metrics)}")


def best_checkpoint(
    best: dict[str, Any], metric: str | None, metrics: Mapping[str, float], name: str
) -> dict[str, Any]:
    """Return the better of the best checkpoint so far and the new one called ``name``, by the metric of keep_best.

    A step without the metric, because its update was skipped, isn't the best.
    """
    if metric is None:
        return best
    sign, key = (-1.0, metric[1:]) if metric.startswith("-") else (1.0, metric)
    if key not in metrics:
        return best
    value = metrics[key]
    if best and sign * best["value"] >= sign * value:
        return best
    return {"metric": metric, "value": value, "checkpoint": name}


def save(
    run: Path,
    position: tuple[int, int],
    state: Mapping[str, Any],
    write_files: Callable[[Path], None],
    *,
    keep_last: int,
    keep: str | None = None,
) -> bool:
    """Write a checkpoint and delete those that aren't kept; if the disk is full, print a warning and continue.

    Args:
        run: the run directory.
        position: finished steps, and optimizer steps of the next one.
        state: contents of state.json.
        write_files: writes all other files into a folder.
        keep_last: number of checkpoints to keep.
        keep: name of a checkpoint to keep in addition, the best one.

    Returns:
        Whether the checkpoint was written.
    """
    final = run / FOLDER / name_of(*position)
    try:
        with whole_folder(final) as folder, disk_errors():
            write_files(folder)
            for name in LOGS:
                if (run / name).is_file():
                    shutil.copyfile(run / name, folder / name)
            write_json(folder / STATE, {**state, "versions": _versions()})
    except OSError as error:
        warn_full_disk(error, run, position[0])
        return False
    _prune(run, position, keep_last, keep)
    return True


def warn_full_disk(error: OSError, run: Path, step: int) -> None:
    """Print that the disk is too full for a checkpoint and training continues; raise any other error again."""
    if error.errno not in DISK_FULL:
        raise error
    before = list_checkpoints(run)
    last = f"The last one is {before[-1].name}" if before else "There is no earlier one"
    echo(
        f"Step {step}: checkpoint not saved ({error.strerror}). {last}; training continues. Free some space, or lower "
        "keep_last if it is above 1.",
        "yellow",
    )


def write_optimizer_shards(run: Path, learners: Mapping[str, LearnerState], ranks: Ranks) -> None:
    """Write this rank's shards of the optimizers, for :func:`write_learners` to move; every rank must call this.

    Raises:
        OSError: a rank can't write; raised on all ranks.
    """
    from reinforcepp.distributed.shards import write_shards

    for name, (_, optimizer, _) in learners.items():
        folder = _shard_folder(run / FOLDER, name)
        if ranks.is_main:
            remove(folder)
            folder.mkdir(parents=True)
        ranks.barrier()
        write_shards(_flat(optimizer), folder)


def write_learners(learners: Mapping[str, LearnerState], folder: Path) -> dict[str, Any]:
    """Write the learners' tensors, or move the files of :func:`write_optimizer_shards`; return the part for state.json.

    The policy's weights are skipped, because they are saved as a model folder.
    """
    state: dict[str, Any] = {}
    for name, (model, optimizer, scheduler) in learners.items():
        if name != "policy":
            save_file({k: v.detach().cpu().clone() for k, v in model.items()}, folder / f"{name}.safetensors")
        if (parts := _shard_folder(folder.parent, name)).is_dir():
            parts.rename(folder / f"{name}_optimizer")
            groups = optimizer["param_groups"]
        else:
            groups = save_optimizer(optimizer, name, folder)
        state[name] = {"optimizer_groups": groups, "scheduler": scheduler}
    return state


def restore_learners(learners: Mapping[str, Learner], checkpoint: Checkpoint, policy: Tensors) -> None:
    """Restore the learners; ``policy`` holds the policy's weights, loaded from the checkpoint's model folder."""
    for name, learner in learners.items():
        state = checkpoint.state["learners"][name]
        optimizer = load_optimizer(checkpoint, name, state["optimizer_groups"], learner.shard_like)
        learner.load_state(policy if name == "policy" else checkpoint.tensors(name), optimizer, state["scheduler"])


def save_optimizer(state: Mapping[str, Any], name: str, folder: Path) -> list[dict[str, Any]]:
    """Write an optimizer's tensors as ``index/name``; return its parameter groups, which are plain values."""
    tensors = {name: value.detach().cpu().clone() for name, value in _flat(state).items()}
    save_file(tensors, folder / f"{name}_optimizer.safetensors")
    groups: list[dict[str, Any]] = state["param_groups"]
    return groups


def load_optimizer(
    checkpoint: Checkpoint,
    name: str,
    groups: list[dict[str, Any]],
    shard_like: Callable[[int, torch.Size], torch.Tensor | None] = lambda index, shape: None,
) -> dict[str, Any]:
    """Read an optimizer state of :func:`save_optimizer` or :func:`write_optimizer_shards`, sharded like ``shard_like``."""
    state: dict[int, Tensors] = {}
    found = checkpoint.tensors(f"{name}_optimizer", lambda key, shape: shard_like(int(key.partition("/")[0]), shape))
    for key, value in found.items():
        index, _, field = key.partition("/")
        state.setdefault(int(index), {})[field] = value
    return {"state": state, "param_groups": groups}


def _flat(optimizer: Mapping[str, Any]) -> Tensors:
    """Return an optimizer's tensors by the index of their parameter and their name."""
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, values in optimizer["state"].items()
        for key, value in values.items()
    }


def _shard_folder(checkpoints: Path, name: str) -> Path:
    """Return where the ranks write their shards before the checkpoint takes them; leftovers are deleted by ``_prune``."""
    return checkpoints / f"{name}_optimizer{PARTIAL}"


def run_description(config: CheckpointConfig, inputs: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of the run, their hash, and the fingerprints of its inputs, for state.json."""
    settings = as_dict(config)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return {"settings": settings, "settings_hash": digest, "inputs": dict(inputs)}


def _versions() -> dict[str, str]:
    return versions_of(LIBRARIES)


def finish(run: Path, config: CheckpointConfig, inputs: Mapping[str, str], step: int) -> None:
    """Record that training is finished, then delete the checkpoints unless the settings keep them.

    Call it on rank 0 when the model and everything else is written. If the process is killed in between, the next one with
    ``resume`` deletes the rest.
    """
    deleted = {"steps": step, "checkpoints_deleted": not config.keeps_checkpoints}
    write_finished(run, deleted | run_description(config, inputs))
    if list_checkpoints(run) and not config.keeps_checkpoints:
        echo(
            f"Deleting the checkpoints, because training is finished. To keep the latest one, set {option('keep_last', 1)}."
        )
        delete_all(run)


def delete_all(run: Path) -> None:
    """Delete the checkpoints of a run whose model is saved; print a warning if one can't be deleted."""
    folder = run / FOLDER
    try:
        for path in folder.iterdir():
            remove(path)
        if not folder.is_symlink():
            folder.rmdir()
    except OSError as error:
        echo(
            f"{folder}: can't be deleted ({error.strerror}). The model is saved; delete the folder yourself.", "yellow"
        )


def _prune(run: Path, position: tuple[int, int], keep_last: int, keep: str | None) -> None:
    """Delete older checkpoints, later ones from before a rollback, and incomplete ones of a crash."""
    kept = [folder for folder in list_checkpoints(run) if position_of(folder) <= position][-keep_last:]
    for folder in (run / FOLDER).iterdir():
        if folder not in kept and folder.name != keep:
            remove(_renamed(folder))


def _renamed(folder: Path) -> Path:
    """Rename a folder, so that a half-deleted one isn't mistaken for a checkpoint."""
    if folder.name.endswith(PARTIAL):
        return folder
    return folder.rename(free_partial(folder.with_name(folder.name + ".dropped")))
